"""Attention by accelerator kernels."""
