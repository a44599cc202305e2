"""Optimisers by name, their schedules, and where their state lies on a mesh."""
