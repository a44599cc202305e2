"""Folders in buckets (gs://): read by copies on this machine, and written whole."""
