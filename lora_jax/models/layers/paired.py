"""Causal attention in plain JAX on one of several devices, each with two chunks of a row.

The row is cut into T tiles. Tile f sees f + 1 tiles of keys, and tile T - 1 - f sees T - f of them:
T + 1 together. A pair is these two tiles of queries, the early and the late one. So a loop over
blocks of a pair has the same shape on every device, whatever its f is, and computes about half of
all scores. As in ``Blockwise``, a block is multiplied with all its keys in one product, and its
softmax needs no running maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.layers.attention import SoftmaxOptions, add_sinks, soft_cap
from lora_jax.models.layers.masks import Mask, MaskTokens

_SUMS = "sums of values"
# The backward pass of a block computes scores and weights again, but not the sums of values, which
# are as large as queries, and take an eighth of a block's products.
KEEPS_SUMS = jax.checkpoint_policies.save_only_these_names(_SUMS)


def name_sums(sums: jax.Array) -> jax.Array:
    """Returns the value sums under the checkpoint name that ``KEEPS_SUMS`` saves."""
    named: jax.Array = checkpoint_name(sums, _SUMS)
    return named


class VisibleTiles(NamedTuple):
    """The key tiles that a pair of query tiles sees, first those of the early tile.

    Attributes:
      keys, values: [batch, kv_heads, T + 1, tile, head_dim].
      tokens: positions of the keys; axes [T + 1, tile] last.
      early: [T + 1] bool, True for tiles that the early tile sees.
    """

    keys: jax.Array
    values: jax.Array
    tokens: MaskTokens
    early: jax.Array


def visible_tiles(
    first: jax.Array, keys: jax.Array, values: jax.Array, tokens: MaskTokens
) -> VisibleTiles:
    """Returns the keys that query tiles ``first`` and T - 1 - ``first`` see, by tile.

    Args:
      first: [] int32.
      keys, values: [batch, kv_heads, T, tile, head_dim], of the whole row.
      tokens: positions of the keys; axes [T, tile] last.
    """
    # Entries 0 to `first` are the early tile's keys; the rest are the late tile's, from tile 0 on.
    entry = jnp.arange(keys.shape[2] + 1, dtype=jnp.int32)
    is_early = entry <= first
    tile_of_entry = jnp.where(is_early, entry, entry - first - 1)
    return VisibleTiles(
        keys=jnp.take(keys, tile_of_entry, axis=2),
        values=jnp.take(values, tile_of_entry, axis=2),
        tokens=jax.tree.map(lambda x: jnp.take(x, tile_of_entry, axis=-2), tokens),
        early=is_early,
    )


def attend_pair(
    q: jax.Array, queries: MaskTokens, tiles: VisibleTiles, mask: Mask, softmax: SoftmaxOptions
) -> jax.Array:
    """Computes the attention of one query block of the early tile and one of the late tile.

    Args:
      q: [batch, block, 2, kv_heads, group, head_dim]: of the early tile, of the late.
      queries: axes [2, block] last.
      tiles: the tiles of keys that these see, T + 1.
      mask: gives everything but the tokens.
      softmax: makes weights of scores.

    Returns:
      As q.
    """
    # A pair is an early and a late tile of queries. The early one sees `first + 1` tiles of keys,
    # and the late one sees the rest of the T + 1 tiles, so that all pairs cost the same.
    batch, size, _, kv_heads, group, head_dim = q.shape
    scale, cap, sinks = softmax
    dtype = scale.dtype
    is_early = tiles.early[:, None, None, None]

    def select_query_tile(pair: jax.Array) -> jax.Array:
        """Selects from [2, batch, kv_heads, 1, …] the query tile of each key tile."""
        early, late = pair
        return jnp.where(is_early, early, late)

    def reduce_tiles(x: jax.Array, reduce: Callable[..., jax.Array], neutral: Any) -> jax.Array:
        """Reduces [batch, kv_heads, T + 1, …] over each query tile's key tiles."""
        of_early = reduce(jnp.where(is_early, x, neutral), axis=2, keepdims=True)
        of_late = reduce(jnp.where(is_early, neutral, x), axis=2, keepdims=True)
        return jnp.stack([of_early, of_late])

    # Each tile of keys gets the queries that see it:
    # [batch, kv_heads, T + 1, group, size, head_dim].
    rows = select_query_tile(q.transpose(2, 0, 3, 4, 1, 5)[:, :, :, None])
    flat = (batch, kv_heads, tiles.early.size, group * size)
    # [batch, kv_heads, T + 1, group * size, keys of a tile]
    scores = jnp.einsum(
        "bntqd,bntkd->bntqk",
        rows.reshape(*flat, head_dim),
        tiles.keys,
        preferred_element_type=dtype,
    )
    scores = soft_cap(scores.reshape(*rows.shape[:-1], -1) * scale, cap)
    query_tokens = jax.tree.map(
        lambda x: jnp.where(tiles.early[:, None], x[..., :1, :], x[..., 1:, :]), queries
    )
    # Hidden keys get the lowest score.
    visible = jax.vmap(mask.visible, in_axes=-2, out_axes=1)(query_tokens, tiles.tokens)
    lowest = jnp.finfo(dtype).min
    scores = jnp.where(visible[:, None, :, None], scores, lowest)
    # The softmax of a query runs over all tiles that its own tile sees.
    largest_of_tiles = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    largest = reduce_tiles(largest_of_tiles, jnp.max, lowest)
    largest, sink = add_sinks(largest, sinks, (kv_heads, 1, group, 1, 1))
    weights = jnp.exp(scores - select_query_tile(largest))
    total = reduce_tiles(jnp.sum(weights, axis=-1, keepdims=True), jnp.sum, 0) + sink
    weights = weights.reshape(*flat, -1).astype(tiles.values.dtype)
    out = jnp.einsum("bntqk,bntkd->bntqd", weights, tiles.values, preferred_element_type=dtype)
    # [2, batch, kv_heads, 1, group, size, head_dim]
    out = name_sums(reduce_tiles(out.reshape(rows.shape), jnp.sum, 0)) / total
    return out[:, :, :, 0].astype(q.dtype).transpose(1, 4, 0, 2, 3, 5)
