"""Losses: their contract, and a file for each.

A loss of tokens with a name is a `TokenLoss` called LOSS in a file of its own, and a line in
registry.py.
"""

from lora_jax.training.losses.classes import CLASSES, classification_loss, logits_of
from lora_jax.training.losses.contract import (
    HELD_OUT,
    OWN_METRICS,
    SCORE,
    Logits,
    Loss,
    Reduction,
    Sums,
    number_of_units,
)
from lora_jax.training.losses.cross_entropy import summed_loss
from lora_jax.training.losses.registry import CROSS_ENTROPY, DEFAULT, TOKEN_LOSSES, token_loss
from lora_jax.training.losses.tokens import number_of_chunks

__all__ = [
    "CLASSES",
    "CROSS_ENTROPY",
    "DEFAULT",
    "HELD_OUT",
    "OWN_METRICS",
    "SCORE",
    "TOKEN_LOSSES",
    "Logits",
    "Loss",
    "Reduction",
    "Sums",
    "classification_loss",
    "logits_of",
    "number_of_chunks",
    "number_of_units",
    "summed_loss",
    "token_loss",
]
