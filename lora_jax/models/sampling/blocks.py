"""Blocks of a cache: keys, values and state of consecutive tokens, for use in other caches.

All functions are pure; the caller compiles them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.models.layers.cache import Cache, Recurrent
from lora_jax.models.sampling.slots import DecodingRows, Number, take_recurrent, take_row


class CacheBlock(NamedTuple):
    """Keys, values and state of consecutive tokens of one row, on the device or the host.

    Attributes:
      key, value: [layers, 1, kv_heads, n, head_dim].
      recurrent: what linear layers remember after the last of the tokens; None without such layers,
        or where nothing goes on from that token.
    """

    key: jax.Array | np.ndarray
    value: jax.Array | np.ndarray
    recurrent: Recurrent | None = None

    @property
    def size(self) -> int:
        """The number of bytes of its arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(tuple(self)))


def take_block(cache: Cache, first: Number, n: int) -> CacheBlock:
    """Returns a copy of n tokens of a prompt, ending with the cache's newest token.

    Args:
      cache: the cache of one row.
      first: [] int32, the first of the tokens.
      n: number of tokens.
    """
    return CacheBlock(
        key=lax.dynamic_slice_in_dim(cache.key, first, n, axis=3),
        value=lax.dynamic_slice_in_dim(cache.value, first, n, axis=3),
        recurrent=_copy_memory(cache.recurrent),
    )


def take_row_block(rows: DecodingRows, row: Number, first: Number, n: int) -> CacheBlock:
    """Returns a copy of n tokens of a row, with the state after the row's newest token."""
    row_key, row_value = take_row(rows, row)
    return CacheBlock(
        key=lax.dynamic_slice_in_dim(row_key, first, n, axis=3),
        value=lax.dynamic_slice_in_dim(row_value, first, n, axis=3),
        recurrent=take_recurrent(rows, row),
    )


def put_block(cache: Cache, first: Number, block: CacheBlock) -> Cache:
    """Returns a one-row cache with a block written after its first `first` tokens, [] int32.

    A block without a memory leaves the memory of the tokens before it, until a block that has one
    follows.
    """
    end = jnp.asarray(first + block.key.shape[3], jnp.int32)

    def write(array: jax.Array, tokens: jax.Array | np.ndarray) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, tokens, first, axis=3)

    cache = cache._replace(
        key=write(cache.key, block.key),
        value=write(cache.value, block.value),
        recurrent=cache.recurrent if block.recurrent is None else _copy_memory(block.recurrent),
    )
    return with_length(cache, end)


def with_length(cache: Cache, n: Number) -> Cache:
    """Returns a one-row cache with its first n slots, [] int32, marked as used."""
    slots = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)
    return cache._replace(
        positions=jnp.where(slots < n, slots, -1)[None],
        filled=jnp.asarray(n, jnp.int32),
        length=jnp.full(1, n, jnp.int32),
    )


def _copy_memory(recurrent: Recurrent | None) -> Recurrent | None:
    """Returns a copy of a recurrent state, because the next program donates its cache."""
    return recurrent and Recurrent(*(jnp.array(x, copy=True) for x in recurrent))
