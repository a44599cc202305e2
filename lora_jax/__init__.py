"""LoRA for JAX and Flax, as a pure transform of a parameter tree."""

from lora_jax import init
from lora_jax.adapt import MergeError, MergeWarning, RoleError, adapt
from lora_jax.lorafy import (
    count_params,
    join,
    lorafy,
    merge,
    split,
    strip,
    summary,
    swap,
    trainable_mask,
)
from lora_jax.rules import LoraRule, TrainRule
from lora_jax.weight import LoraWeight, Trained

__all__ = [
    "LoraRule",
    "LoraWeight",
    "MergeError",
    "MergeWarning",
    "RoleError",
    "TrainRule",
    "Trained",
    "adapt",
    "count_params",
    "init",
    "join",
    "lorafy",
    "merge",
    "split",
    "strip",
    "summary",
    "swap",
    "trainable_mask",
]
