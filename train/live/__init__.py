"""Batches that need a model: references, and rollouts of the adapter that trains."""
