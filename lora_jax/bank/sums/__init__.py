"""Sums of adapters, and adapters taken out of fine-tuned models."""
