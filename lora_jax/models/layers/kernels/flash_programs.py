"""The programs of flash attention: each computes a block, and visits the blocks that it needs.

Their references are, in order: the first block to visit and the one behind the last; the slots and
the segments of queries, the segments of keys, the window; then arrays, of which a program has its
own block, or a whole row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lora_jax.models.layers.masks import Slots, root

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11: see `flash_call.missing_backend`
    triton = None

Ref: TypeAlias = Any  # a reference to an array in memory, or to a block of it

_LOG2_E = 1.4426950408889634
_HIDDEN = -1e30  # the score of a key that is not seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptions:
    """The static facts of a call: the mask's, the scores', and the sizes of blocks."""

    causal: bool
    branched: bool = False
    scale: float
    cap: float | None
    queries: int
    keys: int
    interpret: bool

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Returns the scores of a block, [queries, keys] in fp32."""
        scores = self.dot(q, k, trans_b=True) * self.scale
        return scores if self.cap is None else self.cap * _tanh(scores / self.cap)

    def dot(self, x: jax.Array, y: jax.Array, **transposed: bool) -> jax.Array:
        """Returns a product with sums in fp32."""
        product: jax.Array = triton.dot(x, y, **transposed)
        return product.astype(jnp.float32)

    def seen(
        self,
        slots: jax.Array,
        other: jax.Array,
        segments: jax.Array,
        others: jax.Array,
        window: jax.Array,
    ) -> jax.Array:
        """Returns [queries, keys] bool: True where a query of these slots may look."""
        distance = slots[:, None] - other[None, :]
        same = segments[:, None] == others[None, :]
        if self.branched:
            same = same | (root(segments)[:, None] == others[None, :])
        seen: jax.Array = same & (distance < window)
        return seen & (distance >= 0) if self.causal else seen

    def weights_and_slopes(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        seen: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        mean: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns a block's weights, and the gradient of its scores without their scale.

        Args:
          q, k, v: blocks of queries, keys and values.
          seen: see ``seen``.
          out: the cotangent of the queries' results.
          lse: [queries], the logarithms to base 2 of the sums of weights.
          mean: [queries], the means of the cotangents of weights.
        """
        scores = self.scores(q, k)
        weights = jnp.where(seen, jnp.exp2(scores * _LOG2_E - lse[:, None]), 0.0)
        slopes = weights * (self.dot(out, v, trans_b=True) - mean[:, None])
        if self.cap is not None:
            slopes *= 1.0 - (scores / self.cap) ** 2
        return weights, slopes


def _tanh(x: jax.Array) -> jax.Array:
    return 1.0 - 2.0 / (jnp.exp2(2 * _LOG2_E * x) + 1.0)


def forward(how: FlashOptions, head_dim: int, *refs: Ref) -> None:
    """Computes a block of queries: a running maximum, a running sum, and the sum of values."""
    start, stop, slots, segments, others, window, q, k, v, out, lse = refs
    rows = pl.ds(pl.program_id(0) * how.queries, how.queries)
    mine, of_mine, near, queries = slots[rows], segments[rows], window[0], _load(q, head_dim)

    def visit(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, largest, summed = carry
        at = pl.ds(j * how.keys, how.keys)
        keys = j * how.keys + jnp.arange(how.keys, dtype=jnp.int32)
        seen = how.seen(mine, keys, of_mine, others[at], near)
        scores = jnp.where(seen, how.scores(queries, _load(k, head_dim, at)) * _LOG2_E, _HIDDEN)
        now = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights, shrunk = jnp.exp2(scores - now[:, None]), jnp.exp2(largest - now)
        values = how.dot(weights.astype(v.dtype), _load(v, head_dim, at))
        return (
            total * shrunk[:, None] + values,
            now,
            summed * shrunk + jnp.sum(weights, axis=1),
        )

    nothing = jnp.zeros((how.queries, queries.shape[1]), jnp.float32)
    first = jnp.full(how.queries, _HIDDEN, jnp.float32)
    total, largest, summed = lax.fori_loop(
        start[...], stop[...], visit, (nothing, first, jnp.zeros(how.queries, jnp.float32))
    )
    summed = jnp.maximum(summed, jnp.finfo(jnp.float32).tiny)  # padding's, if it visits nothing
    _store(out, head_dim, total / summed[:, None])
    lse[...] = largest + jnp.log2(summed)


def query_gradient(how: FlashOptions, head_dim: int, *refs: Ref) -> None:
    """Computes the gradient of a block of queries."""
    start, stop, slots, segments, others, window, q, k, v, cotangent, lse, mean, dq = refs
    rows = pl.ds(pl.program_id(0) * how.queries, how.queries)
    mine, of_mine, near, queries = slots[rows], segments[rows], window[0], _load(q, head_dim)
    out, sums, means = _load(cotangent, head_dim), lse[...], mean[...]

    def visit(j: jax.Array, total: jax.Array) -> jax.Array:
        at = pl.ds(j * how.keys, how.keys)
        keys = j * how.keys + jnp.arange(how.keys, dtype=jnp.int32)
        seen = how.seen(mine, keys, of_mine, others[at], near)
        of_keys = _load(k, head_dim, at)
        _, slopes = how.weights_and_slopes(
            queries, of_keys, _load(v, head_dim, at), seen, out, sums, means
        )
        return total + how.dot(slopes.astype(k.dtype), of_keys)

    nothing = jnp.zeros((how.queries, queries.shape[1]), jnp.float32)
    total = lax.fori_loop(start[...], stop[...], visit, nothing)
    _store(dq, head_dim, total * how.scale)


def key_value_gradients(how: FlashOptions, head_dim: int, *refs: Ref) -> None:
    """Computes the gradients of a block of keys and of values, over the heads that look at them."""
    start, stop, slots, segments, others, window, q, k, v, cotangent, lse, mean, dk, dv = refs
    rows = pl.ds(pl.program_id(0) * how.keys, how.keys)
    mine = pl.program_id(0) * how.keys + jnp.arange(how.keys, dtype=jnp.int32)
    of_mine, near, keys, values = others[rows], window[0], _load(k, head_dim), _load(v, head_dim)

    def visit(
        head: jax.Array, j: jax.Array, totals: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        at = pl.ds(j * how.keys, how.keys)
        seen = how.seen(slots[at], mine, segments[at], of_mine, near)
        queries, out = _load(q, head_dim, at, head), _load(cotangent, head_dim, at, head)
        weights, slopes = how.weights_and_slopes(
            queries, keys, values, seen, out, lse[head, at], mean[head, at]
        )
        return (
            totals[0] + how.dot(slopes.astype(q.dtype), queries, trans_a=True),
            totals[1] + how.dot(weights.astype(out.dtype), out, trans_a=True),
        )

    def visit_heads(head: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        visit_head = functools.partial(visit, head)
        summed: tuple[jax.Array, ...] = lax.fori_loop(start[...], stop[...], visit_head, totals)
        return summed

    nothing = jnp.zeros((how.keys, keys.shape[1]), jnp.float32)
    of_keys, of_values = lax.fori_loop(0, lse.shape[0], visit_heads, (nothing, nothing))
    _store(dk, head_dim, of_keys * how.scale)
    _store(dv, head_dim, of_values)


def _load(ref: Ref, head_dim: int, rows: Slots = slice(None), *head: jax.Array) -> jax.Array:
    """Returns a block's rows, [rows, width], zero behind the head's own numbers."""
    width = ref.shape[-1]
    block: jax.Array = triton.load(
        ref.at[(rows, *head, slice(None))],
        mask=None if width == head_dim else (jnp.arange(width) < head_dim)[None],
        other=None if width == head_dim else 0.0,
    )
    return block


def _store(ref: Ref, head_dim: int, block: jax.Array) -> None:
    width = ref.shape[-1]
    mask = None if width == head_dim else (jnp.arange(width) < head_dim)[None]
    triton.store(ref.at[:, :], block.astype(ref.dtype), mask=mask)
