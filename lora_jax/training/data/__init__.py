"""Converts rows of data sets to examples, and orders the examples."""
