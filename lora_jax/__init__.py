"""LoRA for JAX and Flax, as a pure transform of a parameter tree.

The packages for models, training and files are imported at their first use: ``lora_jax.models``.
"""

import importlib
from typing import TYPE_CHECKING

from lora_jax import init, optim, quantized, sharding, subspace
from lora_jax.adapt import (
    MergeError,
    MergeWarning,
    RoleError,
    RoleWarning,
    activate,
    adapt,
    invoked,
)
from lora_jax.core import base
from lora_jax.core.factored import TokensError
from lora_jax.core.weight import LoraWeight, Part, Trained, TrainedRows, is_node
from lora_jax.lorafy import (
    count_params,
    join,
    left_out,
    lorafy,
    merge,
    split,
    strip,
    summary,
    swap,
    trainable_mask,
)
from lora_jax.rules import LoraRule, TrainRule
from lora_jax.saving import exported
from lora_jax.saving.checkpoint import adapter_info, load_adapter, save_adapter
from lora_jax.saving.errors import AdapterError
from lora_jax.select.explain import explain
from lora_jax.select.left_out import LeftOutWarning

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "LeftOutWarning",
    "LoraRule",
    "LoraWeight",
    "MergeError",
    "MergeWarning",
    "Part",
    "RoleError",
    "RoleWarning",
    "TokensError",
    "TrainRule",
    "Trained",
    "TrainedRows",
    "__version__",
    "activate",
    "adapt",
    "adapter_info",
    "bank",
    "base",
    "count_params",
    "explain",
    "exported",
    "hf",
    "init",
    "invoked",
    "is_node",
    "join",
    "left_out",
    "load_adapter",
    "lorafy",
    "merge",
    "models",
    "optim",
    "peft",
    "quantized",
    "save_adapter",
    "sharding",
    "split",
    "strip",
    "subspace",
    "summary",
    "swap",
    "trainable_mask",
    "training",
    "variants",
]

if TYPE_CHECKING:
    from lora_jax import bank, hf, models, peft, training, variants
else:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")

    def __dir__():
        return sorted({*globals(), *__all__})
