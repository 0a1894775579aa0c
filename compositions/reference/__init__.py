"""What the declarations say, written out: the reference page, the commands, and a JSON Schema of recipes."""
