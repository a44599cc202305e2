"""Plans a run: the compiled step, its memory, FLOPs and traffic."""
