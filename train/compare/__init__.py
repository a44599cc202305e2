"""Compares LoRA with full fine-tuning by measurements: `python -m train.compare`."""
