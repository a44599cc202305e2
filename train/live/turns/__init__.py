"""Completions of several turns: rows that call tools, wait, and go on independently."""
