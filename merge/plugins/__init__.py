"""Operators that others wrote: found by an option or an entry point, and mergekit's methods among them made ours."""
