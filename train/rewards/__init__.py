"""Rewards of completions: built-in functions, and users' functions in separate processes."""
