"""How checkpoints differ: sums over changes and task vectors, tensor by tensor, and the ranks of changes."""
