"""The tests: one file for each idea, small checkpoints made on the spot."""
