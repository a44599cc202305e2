"""Blocks of a cache: what it holds of some consecutive tokens, to be put into other caches.

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
    """Keys, values and memories of some consecutive tokens of one row, on the device or the host.

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
        """The bytes of its arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(tuple(self)))


def take_block(cache: Cache, first: Number, n: int) -> CacheBlock:
    """Returns a copy of n tokens of a prompt, of which the last is the newest in the cache.

    Args:
      cache: the cache of one row.
      first: [] int32, the first of the tokens.
      n: number of tokens.
    """
    key, value = (lax.dynamic_slice_in_dim(x, first, n, axis=3) for x in (cache.key, cache.value))
    return CacheBlock(key, value, _copy(cache.recurrent))


def take_row_block(rows: DecodingRows, row: Number, first: Number, n: int) -> CacheBlock:
    """Returns a copy of n tokens of a row, and its memory after its newest token."""
    key, value = (lax.dynamic_slice_in_dim(x, first, n, axis=3) for x in take_row(rows, row))
    return CacheBlock(key, value, take_recurrent(rows, row))


def put_block(cache: Cache, first: Number, block: CacheBlock) -> Cache:
    """Returns the cache of one row with a block behind its first tokens, [] int32 of them.

    A block without a memory leaves that of the tokens before it: one that has it has to follow.
    """
    end = jnp.asarray(first + block.key.shape[3], jnp.int32)

    def put(old: jax.Array, new: jax.Array | np.ndarray) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, new, first, axis=3)

    cache = cache._replace(
        key=put(cache.key, block.key),
        value=put(cache.value, block.value),
        recurrent=cache.recurrent if block.recurrent is None else _copy(block.recurrent),
    )
    return with_length(cache, end)


def with_length(cache: Cache, n: Number) -> Cache:
    """Returns the cache of one row, whose first n slots are in use, [] int32."""
    slots = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)
    return cache._replace(
        positions=jnp.where(slots < n, slots, -1)[None],
        filled=jnp.asarray(n, jnp.int32),
        length=jnp.full(1, n, jnp.int32),
    )


def _copy(recurrent: Recurrent | None) -> Recurrent | None:
    """Returns a memory in arrays of its own: caches are given away to what runs next."""
    return recurrent and Recurrent(*(jnp.array(x, copy=True) for x in recurrent))
