"""Adapters in files, and functions of adapted trees written by `jax.export`."""
