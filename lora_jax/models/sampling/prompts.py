"""Batches of prompts: padded arrays, and the longest common prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Forward, Tree
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
    """Returns prompts as padded arrays; see ``generate``."""
    ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones_like(ids, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
    return Prompts(ids, mask, shared, inputs)


def params_by_prompt(
    apply: Forward | None, params: Tree, prompts: Prompts, rows_each: int = 1
) -> tuple[Tree, Tree]:
    """Returns the parameters for the prompts, and those for later tokens.

    They differ where the function in the place of ``model.apply`` has an attribute
    ``params_by_prompt``, (params, [batch, seq] ids with -1 at padding) -> both, and says so.

    Args:
      apply, params: see ``generate``.
      prompts: the prompts.
      rows_each: the answers to each prompt, side by side.

    Raises:
      ValueError: they differ, and the prompts are not whole.
    """
    choose = getattr(apply, "params_by_prompt", None)
    if choose is None:
        return params, params
    ids = jnp.where(prompts.mask, prompts.ids, -1)
    prompt_params, answer_params = choose(params, ids)
    if prompt_params is params:  # no row differs
        return params, params
    if prompts.shared is not None:
        raise ValueError(
            "The adapter acts only after its invocation in a prompt, and shared tokens may contain "
            "the invocation. Remove shared=, and pass whole prompts."
        )
    if rows_each > 1:
        _, answer_params = choose(params, jnp.repeat(ids, rows_each, axis=0))
    return prompt_params, answer_params


def pad_left(
    prompts: Sequence[Sequence[int]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as (ids, mask), each [prompts, length] int32, padded on the left."""
    ids = np.full((len(prompts), length), pad, np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def count_common_prefix(
    first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray
) -> int:
    """Returns the number of leading tokens that two prompts share."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:n]) != np.asarray(second[:n]))
    return int(differ[0]) if len(differ) else n
