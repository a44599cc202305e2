"""Decoder-only language models, from Llama to Phi-3."""

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.model import Decoder

__all__ = ["Decoder", "DecoderConfig"]
