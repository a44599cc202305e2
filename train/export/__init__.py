"""Exports for others: their model card, and the hub."""
