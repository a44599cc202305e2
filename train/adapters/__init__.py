"""Adapters as the scripts find them in folders."""
