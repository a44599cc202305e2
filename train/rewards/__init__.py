"""Rewards of completions: a user's functions, in processes of their own, and those of ours."""
