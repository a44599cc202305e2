"""Many adapters over one base: sums of them, and adapters taken out of fine-tuned models."""

from lora_jax.bank.combine import combine as combine
from lora_jax.bank.extract import Extraction as Extraction
from lora_jax.bank.extract import ExtractWarning as ExtractWarning
from lora_jax.bank.extract import extract as extract
