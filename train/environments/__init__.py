"""Environments that judge a completion: sums, a guessing game, and SQL databases."""
