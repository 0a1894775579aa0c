"""What a user sees of models and merges: where experts changed and meet, where layers come from."""
