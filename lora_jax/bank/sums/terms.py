"""Sums the arrays of one weight in several adapters, by groups of layers with equal ranks.

A *term* is an adapter in a sum. A *lane* is a part of the rank that is a sum of its own: a weight
of whose uses each has its own half of the rank has two lanes.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.bank.sums.arithmetic import CombineMethod, combined
from lora_jax.bank.sums.lowrank import Factors, stack_layers
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.weight import LoraWeight

Ranks = tuple[int, ...]
ARRAYS = ("a", "b", "scale", "start_a", "start_b")


def ranks_by_layer(nodes: Sequence[LoraWeight]) -> tuple[Ranks, ...]:
    """Returns the ranks of all nodes' changes, layer by layer, or once if layers do not differ.

    A weight with start factors, W + s(AB − A₀B₀), changes W by twice its rank.
    """
    depth = max(len(node.ranks) for node in nodes)
    ranks_of_layers = []
    for layer in range(depth):
        layer_ranks = []
        for node in nodes:
            rank = node.ranks[layer % len(node.ranks)]
            layer_ranks.append(rank if node.start is None else 2 * rank)
        ranks_of_layers.append(tuple(layer_ranks))
    return tuple(ranks_of_layers)


def rank_of_sum(
    ranks: Ranks, sizes: tuple[int, int], method: CombineMethod, rank: int | None
) -> int:
    """Returns the rank of the sum.

    Args:
      ranks: ranks of its terms; 0 of those that are absent.
      sizes: in and out.
      method: the way to combine.
      rank: the rank asked for; None for the largest of `ranks`.
    """
    if not any(ranks):
        return 0
    sums_ranks = method.summands == "ranks"
    if not method.is_compressed:
        return sum(ranks) if sums_ranks else max(ranks)
    limit = min(*sizes, sum(ranks)) if sums_ranks else min(sizes)
    return min(rank or max(ranks), limit)


@functools.partial(
    jax.jit, static_argnames=("by_layer", "ranks", "n_batch", "uses", "method", "dtype")
)
def summed(
    arrays: Sequence[Mapping[str, jax.Array]],
    weights: jax.Array,
    key: jax.Array,
    *,
    by_layer: tuple[Ranks, ...],
    ranks: Ranks,
    n_batch: int,
    uses: str,
    method: CombineMethod,
    dtype: DTypeLike,
) -> Factors:
    """Returns the summed A [batch…, r, in] and B [batch…, r, out], padded to the largest rank.

    Args:
      arrays: arrays of each adapter, those of `ARRAYS` that it has.
      weights: weights of the adapters, [n].
      key: PRNG key of random pruning.
      by_layer: see `ranks_by_layer`.
      ranks: ranks of the sum in each layer, as `by_layer` has them.
      n_batch: the number of batch axes.
      uses: uses of the weight; of "each", both halves of the rank are sums of their own.
      method: see `lora_jax.bank.sums.arithmetic.combined`.
      dtype: dtype of the result.
    """
    layers_of_ranks: dict[Ranks, list[int]] = defaultdict(list)
    for layer, term_ranks in enumerate(by_layer):
        layers_of_ranks[term_ranks].append(layer)
    n_lanes = 2 if uses == "each" else 1

    def sum_layers(lane: int, term_ranks: Ranks, layers: list[int]) -> Factors | None:
        """Returns the factors of layers with equal ranks; None if all ranks are 0."""
        terms = [term for term, rank in enumerate(term_ranks) if rank > 0]
        if not terms:
            return None
        factors = []
        scales = []
        for term in terms:
            term_factors, scale = _factors_and_scale(
                arrays[term],
                rank=term_ranks[term],
                layers=None if len(by_layer) == 1 else np.asarray(layers),
                lane=lane,
                n_lanes=n_lanes,
                n_batch=n_batch,
                dtype=accumulation_dtype(dtype),
            )
            factors.append(term_factors)
            scales.append(scale)
        first_layer = layers[0]
        return combined(
            factors,
            scales,
            weights[np.asarray(terms)],
            jax.random.fold_in(jax.random.fold_in(key, lane), first_layer),
            method=method,
            rank=ranks[first_layer] // n_lanes,
            is_mirrored=lane == 1 or uses == "product",
        )

    lanes = []
    for lane in range(n_lanes):
        groups = [
            (layers, sum_layers(lane, term_ranks, layers))
            for term_ranks, layers in layers_of_ranks.items()
        ]
        factors, _ = stack_layers(groups, len(by_layer))
        lanes.append(factors)
    joined_a = jnp.concatenate([a for a, _ in lanes], axis=-2)
    joined_b = jnp.concatenate([b for _, b in lanes], axis=-2)
    return joined_a.astype(dtype), joined_b.astype(dtype)


def _factors_and_scale(
    arrays: Mapping[str, jax.Array],
    *,
    rank: int,
    layers: np.ndarray | None,
    lane: int,
    n_lanes: int,
    n_batch: int,
    dtype: DTypeLike,
) -> tuple[Factors, jax.Array]:
    """Returns A [batch…, r, in], B [batch…, r, out] and s [batch…] of some layers.

    A₀ and B₀ are part of them: W + s(AB − A₀B₀) is W + s·[A A₀][B; −B₀].

    Args:
      arrays: see `summed`.
      rank: rank of these layers' change.
      layers: their indices; None for all.
      lane: 0, or 1 for the second half of the rank.
      n_lanes: 1 or 2.
      n_batch: the number of batch axes.
      dtype: dtype of the result.
    """
    has_start = "start_a" in arrays
    lane_rank = rank // (2 if has_start else n_lanes)
    lane_slice = slice(lane * lane_rank, (lane + 1) * lane_rank)

    def take_layers(name: str) -> jax.Array:
        array = arrays[name] if layers is None else arrays[name][layers]
        return array.astype(dtype)

    def take_lane(name: str) -> jax.Array:
        factor = take_layers(name)
        factor = factor.reshape(*factor.shape[: n_batch + 1], -1)
        return factor[..., lane_slice, :]

    a = take_lane("a")
    b = take_lane("b")
    if has_start:
        a = jnp.concatenate([a, take_lane("start_a")], axis=-2)
        b = jnp.concatenate([b, -take_lane("start_b")], axis=-2)
    return (a, b), take_layers("scale")


@jax.jit
def summed_biases(
    biases: Sequence[jax.Array], scales: Sequence[jax.Array], weights: jax.Array
) -> jax.Array:
    """Returns Σ w·s·c of biases c [batch…, out…], in the dtype of the weights [n]."""
    terms = []
    for bias, scale, weight in zip(biases, scales, weights, strict=True):
        factor = scale.astype(weights.dtype) * weight
        factor = jnp.expand_dims(factor, range(scale.ndim, bias.ndim))
        terms.append(bias.astype(weights.dtype) * factor)
    return functools.reduce(jnp.add, terms)
