"""Completions from a server that loads the adapter as it trains, and the check that it does."""
