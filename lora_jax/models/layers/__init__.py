"""Layers and helpers that several models share."""
