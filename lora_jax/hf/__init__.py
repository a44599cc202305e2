"""Files of Hugging Face: the hub, configurations, weights and tokenizers, read and written.

Given what a family of models says of its files (`lora_jax.hf.family`); no model is known here.
"""
