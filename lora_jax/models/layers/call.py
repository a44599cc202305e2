"""The facts of a call of attention by which a kernel decides whether it supports the call."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models.layers.masks import Mask, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The static facts of one call.

    Attributes:
      queries: queries on this device.
      head_dim: the size of a head.
      dtype: the dtype of queries, keys and values.
      capped: whether scores are capped.
      sinks: whether heads have sinks.
      cached: whether keys come from a cache, and are more than the queries.
      split: how the queries of a row are split over devices; None where they are not.
    """

    queries: int
    head_dim: int
    dtype: DTypeLike
    capped: bool = False
    sinks: bool = False
    cached: bool = False
    split: Split | None = None

    @classmethod
    def from_arguments(
        cls, q: jax.Array, mask: Mask, cap: float | None, sinks: jax.Array | None = None
    ) -> AttentionCall:
        """Returns the facts of an implementation's arguments."""
        return cls(
            queries=q.shape[1],
            head_dim=q.shape[-1],
            dtype=jnp.dtype(q.dtype),
            capped=cap is not None,
            sinks=sinks is not None,
            cached=not mask.aligned and mask.split is None,
            split=mask.split,
        )
