"""Exports adapters: files for other libraries, a model card, and uploads to the hub."""
