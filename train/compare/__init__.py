"""LoRA beside full fine-tuning, on measurements: `python -m train.compare`."""
