"""Turns rows of data sets into examples, and orders them."""
