"""Losses: their contract, those of tokens by their names (`TOKEN_LOSSES`), and of classes."""

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
from lora_jax.training.losses.tokens import (
    CROSS_ENTROPY,
    DEFAULT,
    TOKEN_LOSSES,
    number_of_chunks,
    summed_loss,
    token_loss,
)

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
