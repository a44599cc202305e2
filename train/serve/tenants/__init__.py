"""Tenants: the log of their commands, their seats in the engine, and their states on disk."""
