"""LoRA for JAX and Flax, as a pure transform of a parameter tree."""

from lora_jax import base, init, optim, sharding
from lora_jax.adapt import MergeError, MergeWarning, RoleError, adapt, explain
from lora_jax.checkpoint import AdapterError, load_adapter, save_adapter
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
from lora_jax.weight import LoraWeight, Trained, TrainedRows, is_node

__all__ = [
    "AdapterError",
    "LoraRule",
    "LoraWeight",
    "MergeError",
    "MergeWarning",
    "RoleError",
    "TrainRule",
    "Trained",
    "TrainedRows",
    "adapt",
    "base",
    "count_params",
    "explain",
    "init",
    "is_node",
    "join",
    "load_adapter",
    "lorafy",
    "merge",
    "optim",
    "save_adapter",
    "sharding",
    "split",
    "strip",
    "summary",
    "swap",
    "trainable_mask",
]
