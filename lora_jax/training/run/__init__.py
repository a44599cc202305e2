"""A run's folder: its lock, checkpoints, log and best scores, and the signals that end it."""
