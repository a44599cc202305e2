"""Decoder-only language models, from Llama to Phi-3."""
