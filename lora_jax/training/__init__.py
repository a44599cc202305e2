"""Training: losses, the step, batches, checkpoints, and the loop."""
