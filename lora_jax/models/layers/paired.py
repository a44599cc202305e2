"""Causal attention on one of several devices, each with two chunks of a row, in plain JAX.

The row is cut into T tiles. Tile f sees f + 1 tiles of keys, and tile T - 1 - f sees T - f of them:
T + 1 together. So a loop over blocks of both has the same shape on every device, whatever its f is,
and computes about half of all scores. As in ``Blockwise``, a block is multiplied with all its keys
in one product, and its softmax needs no running maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.layers.attention import Softmax, add_sinks, soft_cap
from lora_jax.models.layers.masks import Mask, MaskTokens

_SUMS = "sums of values"
# Of a block, the backward pass computes scores and weights again, but not their sums of values: as
# large as queries, and an eighth of a block's products.
KEEPS_SUMS = jax.checkpoint_policies.save_only_these_names(_SUMS)


def name_sums(sums: jax.Array) -> jax.Array:
    """Returns the sums of values, by the name under which ``KEEPS_SUMS`` keeps them."""
    named: jax.Array = checkpoint_name(sums, _SUMS)
    return named


class VisibleTiles(NamedTuple):
    """The tiles of keys that a pair of tiles sees: first those of the earlier tile.

    Attributes:
      keys, values: [batch, kv_heads, tiles, tile, head_dim].
      tokens: positions of the keys; axes [tiles, tile] last.
      early: [tiles] bool, True for those of the earlier tile.
    """

    keys: jax.Array
    values: jax.Array
    tokens: MaskTokens
    early: jax.Array


def visible_tiles(
    first: jax.Array, keys: jax.Array, values: jax.Array, tokens: MaskTokens
) -> VisibleTiles:
    """Returns the keys that tiles ``first`` and T - 1 - ``first`` see, tile by tile.

    Args:
      first: [] int32.
      keys, values: [batch, kv_heads, T, tile, head_dim], of the whole row.
      tokens: positions of the keys; axes [T, tile] last.
    """
    turn = jnp.arange(keys.shape[2] + 1, dtype=jnp.int32)
    order = jnp.where(turn <= first, turn, turn - first - 1)
    return VisibleTiles(
        jnp.take(keys, order, axis=2),
        jnp.take(values, order, axis=2),
        jax.tree.map(lambda x: jnp.take(x, order, axis=-2), tokens),
        turn <= first,
    )


def attend_pair(
    q: jax.Array, queries: MaskTokens, seen: VisibleTiles, mask: Mask, softmax: Softmax
) -> jax.Array:
    """Computes attention of a block of the earlier tile and one of the later.

    Args:
      q: [batch, block, 2, kv_heads, group, head_dim]: of the earlier tile, of the later.
      queries: axes [2, block] last.
      seen: the tiles that these see, T + 1.
      mask: gives everything but the tokens.
      softmax: makes weights of scores.

    Returns:
      As q.
    """
    batch, size, _, kv_heads, group, head_dim = q.shape
    scale, cap, sinks = softmax
    dtype, early = scale.dtype, seen.early[:, None, None, None]

    def mine(pair: jax.Array) -> jax.Array:
        """Takes, of [2, batch, kv_heads, 1, …], what each tile of keys meets."""
        return jnp.where(early, pair[0], pair[1])

    def summed(x: jax.Array) -> jax.Array:
        """Sums [batch, kv_heads, T + 1, group, block, n] over each one's tiles: [2, …, 1, …]."""
        parts = (jnp.where(of, x, 0) for of in (early, ~early))
        return jnp.stack([jnp.sum(part, axis=2, keepdims=True) for part in parts])

    rows = mine(q.transpose(2, 0, 3, 4, 1, 5)[:, :, :, None])
    flat = (batch, kv_heads, seen.early.size, group * size)
    scores = jnp.einsum(
        "bntqd,bntkd->bntqk", rows.reshape(*flat, head_dim), seen.keys, preferred_element_type=dtype
    )
    scores = soft_cap(scores.reshape(*rows.shape[:-1], -1) * scale, cap)
    of_early = seen.early[:, None]
    looking = jax.tree.map(lambda x: jnp.where(of_early, x[..., :1, :], x[..., 1:, :]), queries)
    visible = jax.vmap(mask.visible, in_axes=-2, out_axes=1)(looking, seen.tokens)
    lowest = jnp.finfo(dtype).min
    scores = jnp.where(visible[:, None, :, None], scores, lowest)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    tops = (jnp.where(of, top, lowest) for of in (early, ~early))
    largest = jnp.stack([jnp.max(x, axis=2, keepdims=True) for x in tops])
    largest, sink = add_sinks(largest, sinks, (kv_heads, 1, group, 1, 1))
    weights = jnp.exp(scores - mine(largest))
    total = summed(jnp.sum(weights, axis=-1, keepdims=True)) + sink
    weights = weights.reshape(*flat, -1).astype(seen.values.dtype)
    out = jnp.einsum("bntqk,bntkd->bntqd", weights, seen.values, preferred_element_type=dtype)
    out = name_sums(summed(out.reshape(rows.shape))) / total
    return out[:, :, :, 0].astype(q.dtype).transpose(1, 4, 0, 2, 3, 5)
