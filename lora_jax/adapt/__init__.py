"""`adapt`, with its warnings and errors."""

from lora_jax.adapt.activate import activate, invoked
from lora_jax.adapt.interpreter import RoleError
from lora_jax.adapt.merging import MergeError, MergeWarning
from lora_jax.adapt.sides import RoleWarning
from lora_jax.adapt.transform import adapt

__all__ = [
    "MergeError",
    "MergeWarning",
    "RoleError",
    "RoleWarning",
    "activate",
    "adapt",
    "invoked",
]
