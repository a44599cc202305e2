"""The life of a run: asked for, opened, begun, compiled, trained, finished."""
