"""Dense softmax attention, and code that all implementations of attention share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax.models.layers.cache import Shared
from lora_jax.models.layers.masks import Mask, Split, pad_rows

KERNEL_OUTPUT = "attention_kernel"  # names what a kernel returns, for policies that keep it


def wide_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns fp32, or the dtype itself if it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def dot_wide(x: jax.Array, y: jax.Array, contract: Any, precision: Any = None) -> jax.Array:
    """Computes ``lax.dot_general`` with a result in fp32 or wider, for logits."""
    return lax.dot_general(
        x, y, contract, precision=precision, preferred_element_type=wide_dtype(x.dtype)
    )


class KeysAndValues(NamedTuple):
    """Keys and values, with the einsum letters of their axes.

    Attributes:
      axes: "bntd", batch, kv_heads, keys, head_dim; or "ntd" of shared ones.
      keys, values: arrays with these axes.
    """

    axes: str
    keys: jax.Array
    values: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The static facts of an attention call, by which a kernel accepts or rejects it.

    Attributes:
      queries: queries on this device.
      head_dim: the size of a head.
      dtype: the dtype of queries, keys and values.
      capped: whether scores are capped.
      sinks: whether heads have sinks.
      cached: whether keys come from a cache, and are more than the queries.
      branched: whether rows have prompts with several completions; see ``Mask.branching``.
      windowed: whether the mask has a window.
      split: how the queries of a row are split over devices; None where they are not.
    """

    queries: int
    head_dim: int
    dtype: DTypeLike
    capped: bool = False
    sinks: bool = False
    cached: bool = False
    branched: bool = False
    windowed: bool = False
    split: Split | None = None

    def kernel_refusal(self, dtypes: Sequence[DTypeLike]) -> str | None:
        """Returns the reason why a slot-and-segment kernel cannot run the call.

        Args:
          dtypes: dtypes that the kernel computes.
        """
        if self.cached:
            return "keys lie in a cache"
        if self.branched and self.windowed:
            return "the kernel's windows count slots, not the positions of several completions"
        if self.dtype not in dtypes:
            return f"the kernel has no {jnp.dtype(self.dtype)}"
        return None


class AttentionInputs(NamedTuple):
    """The arrays and options of an attention call; see ``attend``."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    scale: float | jax.Array | None = None
    cap: float | None = None
    sinks: jax.Array | None = None

    @property
    def call(self) -> AttentionCall:
        """The static facts of the call."""
        return AttentionCall(
            queries=self.q.shape[1],
            head_dim=self.q.shape[-1],
            dtype=jnp.dtype(self.q.dtype),
            capped=self.cap is not None,
            sinks=self.sinks is not None,
            cached=not self.mask.aligned and self.mask.split is None,
            branched=self.mask.keys.branches is not None,
            windowed=self.mask.window is not None,
            split=self.mask.split,
        )

    @property
    def factor(self) -> jax.Array:
        """The scale of the scores, [] in their dtype: 1 / sqrt(head_dim) by default."""
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return jnp.asarray(scale, wide_dtype(self.q.dtype))

    @property
    def scaled_queries(self) -> jax.Array:
        """The scaled queries, for kernels that take no traced scale."""
        factor = self.factor
        return (self.q.astype(factor.dtype) * factor).astype(self.q.dtype)

    def padded(self, multiple: int) -> list[jax.Array]:
        """Returns padded q, k and v, and the segments of queries and keys, [batch, n].

        Rows are filled up to a multiple of a size, but for those that are split over devices.
        """
        segments = [jnp.broadcast_to(x, (len(self.q), x.shape[1])) for x in self.mask.segments()]
        arrays = [self.q, self.k, self.v, *segments]
        return arrays if self.mask.split else [pad_rows(x, multiple) for x in arrays]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of an ``Attend``, with sinks only if there are any."""
        return tuple(self[:-1] if self.sinks is None else self)


class SoftmaxOptions(NamedTuple):
    """The options that convert scores to weights.

    Attributes:
      factor: [], the factor of the scores, in their dtype.
      cap, sinks: see ``attend``.
    """

    factor: jax.Array
    cap: float | None
    sinks: jax.Array | None


class Implementation:
    """An implementation of attention over ``AttentionInputs``, callable like an ``Attend``."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float | jax.Array | None = None,
        cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        return self.compute(AttentionInputs(q, k, v, mask, scale, cap, sinks))

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        """Computes attention, [batch, seq, heads, head_dim]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DenseAttention(Implementation):
    """Computes attention with all scores in memory, [batch, heads, seq, keys].

    Heads lead in all operands, and the result is divided rather than the weights: otherwise XLA
    copies scores into another layout on CPU, and keeps both them and the weights for the backward
    pass. The scores of shared keys are one product for all rows; see ``attend``.
    """

    def compute(self, inputs: AttentionInputs, shared: Shared | None = None) -> jax.Array:
        """Computes attention with all scores in memory."""
        q, k, v, mask, _, cap, sinks = inputs
        batch, seq, _, head_dim = q.shape
        kv_heads = k.shape[2]
        dtype = wide_dtype(q.dtype)
        # [batch, kv_heads, group, queries, head_dim]
        grouped = q.reshape(batch, seq, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        key_sets = [KeysAndValues("bntd", k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))]
        if shared is not None:  # they come first in the mask
            shared_keys = shared.key.astype(k.dtype)
            shared_values = shared.value.astype(v.dtype)
            key_sets.insert(0, KeysAndValues("ntd", shared_keys, shared_values))
        factor = inputs.factor

        def compute_scores(key_set: KeysAndValues, visible: jax.Array) -> jax.Array:
            scores = jnp.einsum(
                f"bngsd,{key_set.axes}->bngst", grouped, key_set.keys, preferred_element_type=dtype
            )
            return jnp.where(visible, soft_cap(scores * factor, cap), jnp.finfo(dtype).min)

        # Each set of keys has its scores, [batch, kv_heads, group, queries, keys of the set].
        ends = np.cumsum([key_set.keys.shape[-2] for key_set in key_sets])
        visible_sets = jnp.split(mask.visible()[:, None, None], ends[:-1], axis=-1)
        score_sets = list(map(compute_scores, key_sets, visible_sets))
        # The softmax runs over all sets together. Its maximum changes no result, and needs no
        # derivative.
        maxima = [jnp.max(scores, axis=-1, keepdims=True) for scores in score_sets]
        largest = lax.stop_gradient(functools.reduce(jnp.maximum, maxima))
        largest, sink = add_sinks(largest, sinks, (kv_heads, -1, 1, 1))
        weight_sets = [jnp.exp(scores - largest) for scores in score_sets]
        sums = [jnp.sum(weights, axis=-1, keepdims=True) for weights in weight_sets]
        total = functools.reduce(jnp.add, sums) + sink

        def sum_values(key_set: KeysAndValues, weights: jax.Array) -> jax.Array:
            """Returns the weighted sum of values."""
            return jnp.einsum(
                f"bngst,{key_set.axes}->bngsd",
                weights.astype(v.dtype),
                key_set.values,
                preferred_element_type=dtype,
            )

        out = functools.reduce(jnp.add, map(sum_values, key_sets, weight_sets))
        # Back to [batch, queries, heads, head_dim].
        return (out / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


DENSE = DenseAttention()


def add_sinks(
    largest: jax.Array, sinks: jax.Array | None, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | float]:
    """Returns the maximum of scores and sinks, and the sinks' terms in the softmax sums.

    Args:
      largest: the largest scores, without a derivative.
      sinks: [heads], or None.
      shape: the shape by which sinks broadcast against ``largest``.
    """
    if sinks is None:
        return largest, 0.0
    sinks = sinks.astype(largest.dtype).reshape(shape)
    largest = jnp.maximum(largest, lax.stop_gradient(sinks))
    return largest, jnp.exp(sinks - largest)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap tanh(x / cap): about x if x is small, and never beyond ±cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
