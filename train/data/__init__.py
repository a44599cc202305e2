"""Reads rows as people have them, and makes examples of them."""
