"""Sparse fine-tunes: which entries they change, how those are chosen, and the files that hold them."""
