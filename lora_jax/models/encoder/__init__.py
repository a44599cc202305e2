"""Encoders: BERT, RoBERTa and XLM-RoBERTa, with their heads."""

from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.encoder.model import Encoder, EncoderOutput

__all__ = ["Encoder", "EncoderConfig", "EncoderOutput"]
