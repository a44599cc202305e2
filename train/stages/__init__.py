"""The stages of a run: requested, opened, begun, compiled, trained, finished."""
