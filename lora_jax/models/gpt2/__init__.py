"""GPT-2."""

from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.gpt2.model import GPT2

__all__ = ["GPT2", "GPT2Config"]
