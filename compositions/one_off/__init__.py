"""A merge asked for on the command line: options from the declarations, and the recipe that is written of them."""
