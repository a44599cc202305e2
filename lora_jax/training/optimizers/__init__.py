"""Optimisers by name, and their schedules."""
