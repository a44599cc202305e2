"""Scripts that fine-tune, evaluate and serve; run from the repository as `python -m train.sft`."""
