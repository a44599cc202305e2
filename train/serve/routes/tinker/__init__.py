"""Tinker's API."""
