"""Folders in buckets (gs://): read through local copies, and replaced atomically when written."""
