"""The tasks of the scripts."""
