"""Plain Flax models with pretrained weights. They know nothing of LoRA."""

from lora_jax.hf.fetch import fetch
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.hub import ModelNotFound
from lora_jax.hf.keys import Row, WeightsError, hf_tensors
from lora_jax.hf.tokenizer import load_tokenizer
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import compiler_options
from lora_jax.models.decoder.model import Decoder
from lora_jax.models.decoder.rope_fields import RopeScaling
from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.encoder.model import Encoder, EncoderOutput
from lora_jax.models.families import key_table, kinds, partition_specs, read_config
from lora_jax.models.generate import generate, share
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.layers.cache import Cache, Shared, init_cache
from lora_jax.models.pretrained import from_pretrained, save_pretrained
from lora_jax.models.rope_scaling import with_rope_scaling
from lora_jax.models.streaming import stream

__all__ = [
    "Cache",
    "ConfigError",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "GPT2",
    "GPT2Config",
    "ModelNotFound",
    "RopeScaling",
    "Row",
    "Shared",
    "WeightsError",
    "compiler_options",
    "fetch",
    "from_pretrained",
    "generate",
    "hf_tensors",
    "init_cache",
    "key_table",
    "kinds",
    "load_tokenizer",
    "partition_specs",
    "read_config",
    "save_pretrained",
    "share",
    "stream",
    "with_rope_scaling",
]
