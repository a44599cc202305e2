"""Tenants: the log of their commands, their places in the engine, and their saved states."""
