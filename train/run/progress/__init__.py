"""Measures of a run on its way, beside its loss: the task's own score, sampled answers."""
