"""Prints progress to stderr, and results to stdout or a file, for all scripts."""
