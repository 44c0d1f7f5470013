"""From rows to columns: the entries of a code, sorted by feature."""
