"""Softmax attention, by the implementation that is asked for."""

from __future__ import annotations

from typing import Protocol

import jax

from lora_jax.models.layers.attention import dense
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.placement import UNPLACED, Placement

# Queries from which on "auto" goes block by block: see tests/benchmarks/attention.py.
LONG = 512


class Attend(Protocol):
    """An implementation of attention; see ``attend`` for the arguments. It has to be hashable.

    On a mesh it is called in ``jax.shard_map``, with a device's batch, heads and queries, and with
    all keys of those: see ``Split`` for the queries of a long row.
    """

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float | jax.Array | None = None,
        cap: float | None = None,
        /,
    ) -> jax.Array: ...


IMPLEMENTATIONS: dict[str, Attend] = {"dense": dense, "blockwise": Blockwise()}
ATTENTION = ("auto", *IMPLEMENTATIONS)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float | jax.Array | None = None,
    cap: float | None = None,
    *,
    attention: str | Attend = "auto",
    placement: Placement = UNPLACED,
) -> jax.Array:
    """Computes softmax(soft_cap(scale * q k^T)) v, scores and softmax in fp32.

    Args:
      q: [batch, seq, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim]. Queries are grouped by key/value head, so that keys and
        values are never repeated in memory.
      v: as k.
      mask: the keys that each query may see. The result of a query that sees none (padding) is
        finite: an average of values, of which ones depends on the implementation.
      scale: a number or []; 1 / sqrt(head_dim) by default.
      cap: see ``soft_cap``.
      attention: the implementation; see ``implementation``.
      placement: shares the work out over a mesh; see ``Placement.attention``.

    Returns:
      [batch, seq, heads, head_dim].
    """
    local = implementation(attention, q.shape[1])
    return placement.attention(local)(q, k, v, mask, scale, cap)


def implementation(attention: str | Attend, seq: int) -> Attend:
    """Returns the implementation of a name; a function is its own.

    - "dense" holds all scores, [batch, heads, seq, keys] in fp32.
    - "blockwise" holds those of a block of queries; see ``Blockwise``.
    - "auto" is "blockwise" from 512 queries on, and "dense" for fewer.

    Args:
      attention: a name, or a function with the arguments of ``Attend``.
      seq: the number of queries, on all devices together.

    Raises:
      ValueError: for another name; lists those that there are.
    """
    if not isinstance(attention, str):
        return attention
    if attention == "auto":
        attention = "blockwise" if seq >= LONG else "dense"
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"attention {attention!r} is not one of {', '.join(ATTENTION)}")
    return IMPLEMENTATIONS[attention]
