"""Tokenises chats; each process does its part of the rows."""

from collections.abc import Sequence
from typing import Any

from lora_jax.training.batches import Tokens
from lora_jax.training.data import chats
from train.run.hosts import map_over_processes


def tokenize(
    rows: Sequence[chats.Row],
    tokenizer: Any,
    source: str,
    numbers: Sequence[int] | None = None,
) -> list[Tokens]:
    """Returns the rows as token sequences; see `lora_jax.training.data.chats.tokenize`."""
    return chats.tokenize(rows, tokenizer, source, numbers=numbers, mapped=map_over_processes)
