"""What is measured while a run trains, beside its loss: the task's own score, sampled answers."""
