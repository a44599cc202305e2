"""Reads and writes Hugging Face's files: configurations, weights, tokenizers and hub models.

A family of models says in a `lora_jax.hf.format.ModelFormat` how its files are read and named. No
model is known here.
"""
