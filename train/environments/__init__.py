"""Worlds that answer a completion: sums, and databases in which SQL is executed."""
