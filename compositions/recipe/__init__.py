"""Recipes: YAML text with its lines, its schema, and the frozen value that is made of it."""
