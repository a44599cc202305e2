"""Attention by kernels of accelerators."""
