"""Optimisers by name, their schedules, and the sharding of their state."""
