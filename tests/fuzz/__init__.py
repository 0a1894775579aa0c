"""Fuzzing of everything that reads what strangers wrote: targets, the campaign that runs them, and its corpus."""
