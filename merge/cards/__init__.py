"""Model cards: what those of parents say, and what a result's says."""
