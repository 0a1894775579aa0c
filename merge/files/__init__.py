"""Where bytes are: files read and written at known places, weight files of either kind, the Hub's cache."""
