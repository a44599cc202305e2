"""Reads rows from files or the hub, and makes examples of them."""
