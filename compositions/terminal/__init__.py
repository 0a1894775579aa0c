"""The terminal: the options that commands share, what is printed, tables, pictures and bars."""
