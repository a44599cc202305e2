"""Tensors that safetensors files hold as codes and scales, kept as they were shipped."""
