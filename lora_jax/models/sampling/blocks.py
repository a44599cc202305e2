"""Blocks of a cache: the keys and values of some consecutive tokens, to be put into other caches.

All functions are pure; the caller compiles them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.layers.cache import Cache, Recurrent
from lora_jax.models.sampling.slots import DecodingRows, Number, take_row


class CacheBlock(NamedTuple):
    """Keys, values and memories of some consecutive tokens of one row.

    Attributes:
      key, value: [layers, 1, kv_heads, n, head_dim].
      recurrent: what linear layers remember after the last of the tokens; None without such layers.
    """

    key: jax.Array
    value: jax.Array
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
    return CacheBlock(key, value, cache.recurrent)


def take_row_block(rows: DecodingRows, row: Number, first: Number, n: int) -> CacheBlock:
    """Returns a copy of n tokens of a row; of models without linear layers."""
    key, value = (lax.dynamic_slice_in_dim(x, first, n, axis=3) for x in take_row(rows, row))
    return CacheBlock(key, value)


def put_block(cache: Cache, first: Number, block: CacheBlock) -> Cache:
    """Returns the cache of one row with a block behind its first tokens, [] int32 of them."""
    end = first + block.key.shape[3]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, new, first, axis=3)

    slots = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)
    return cache._replace(
        key=put(cache.key, block.key),
        value=put(cache.value, block.value),
        positions=jnp.where(slots < end, slots, -1)[None],
        filled=jnp.asarray(end, jnp.int32),
        length=jnp.full_like(cache.length, end),
        recurrent=block.recurrent,
    )


def grow_cache(cache: Cache, length: int) -> Cache:
    """Returns a prompt's cache with room for so many tokens."""

    def grow(x: jax.Array, axis: int, fill: int) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, room, constant_values=fill)

    return cache._replace(
        key=grow(cache.key, 3, 0),
        value=grow(cache.value, 3, 0),
        positions=grow(cache.positions, 1, -1),
    )
