"""Trains in a random subspace of few dimensions: intrinsic dimension (DID and SAID)."""

from lora_jax.subspace.fastfood import hadamard_transform
from lora_jax.subspace.saving import FACTS, base_of, facts_of, load, merge, save, theta_of, tree_of
from lora_jax.subspace.space import Subspace, make

__all__ = [
    "FACTS",
    "Subspace",
    "base_of",
    "facts_of",
    "hadamard_transform",
    "load",
    "make",
    "merge",
    "save",
    "theta_of",
    "tree_of",
]
