"""Files of Hugging Face: the hub, configurations, weights and tokenizers, read and written.

A family of models says in a `lora_jax.hf.format.ModelFormat` how its files are read and named. No
model is known here.
"""
