"""A run's folder: its lock, checkpoints, log and best scores, and signals that end the run."""
