"""Batches of prompts: padded to one length, as arrays, and what they begin with alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.layers.cache import Shared

Inputs = Mapping[str, jax.typing.ArrayLike]


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
      ids: [batch, seq] int32.
      mask: [batch, seq] bool, False at padding.
      shared, inputs: see ``generate``.
    """

    ids: jax.Array
    mask: jax.Array
    shared: Shared | None = None
    inputs: Inputs | None = None


def make_prompts(
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None,
    shared: Shared | None = None,
    inputs: Inputs | None = None,
) -> Prompts:
    """Returns prompts as arrays; see ``generate``."""
    ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones_like(ids, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
    return Prompts(ids, mask, shared, inputs)


def pad_left(
    prompts: Sequence[Sequence[int]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as (ids, mask), each [prompts, length] int32, padded at the left."""
    ids = np.full((len(prompts), length), pad, np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def common_prefix(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """Returns the number of tokens that two prompts begin with alike."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:n]) != np.asarray(second[:n]))
    return int(differ[0]) if len(differ) else n
