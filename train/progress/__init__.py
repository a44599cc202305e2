"""Measures during a run besides the loss: the task's own score, and sampled answers."""
