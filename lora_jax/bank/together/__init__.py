"""Trains many adapters over one base, side by side."""
