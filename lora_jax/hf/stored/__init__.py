"""Quantized tensors of safetensors files, kept as the codes and scales of the checkpoint."""
