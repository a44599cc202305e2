"""Sums of adapters, and adapters extracted from fine-tuned models."""
