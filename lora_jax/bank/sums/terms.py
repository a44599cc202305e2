"""The arrays of one weight in several adapters, summed layers of one rank at a time."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.bank.sums.arithmetic import CombineMethod, combined
from lora_jax.bank.sums.lowrank import Factors, stack_layers
from lora_jax.core.magnitude import wide
from lora_jax.core.weight import LoraWeight

Ranks = tuple[int, ...]
ARRAYS = ("a", "b", "scale", "start_a", "start_b")


def ranks_by_layer(nodes: Sequence[LoraWeight]) -> tuple[Ranks, ...]:
    """Returns the rank of each node's change, layer by layer; of one layer where none differ.

    A weight with start factors, W + s(AB − A₀B₀), changes W by twice its rank.
    """
    depth = max(len(node.ranks) for node in nodes)
    times = [1 if node.start is None else 2 for node in nodes]
    return tuple(
        tuple(t * n.ranks[i % len(n.ranks)] for t, n in zip(times, nodes, strict=True))
        for i in range(depth)
    )


def rank_of_sum(ranks: Ranks, sizes: tuple[int, int], how: CombineMethod, rank: int | None) -> int:
    """Returns the rank of a sum.

    Args:
      ranks: ranks of its terms; 0 of those that are absent.
      sizes: in and out.
      how: the way to combine.
      rank: the rank asked for; None for the largest of `ranks`.
    """
    if not any(ranks):
        return 0
    if how.is_compressed:
        limit = min(*sizes, sum(ranks)) if how.what == "ranks" else min(sizes)
        return min(rank or max(ranks), limit)
    return sum(ranks) if how.what == "ranks" else max(ranks)


@functools.partial(
    jax.jit, static_argnames=("by_layer", "ranks", "n_batch", "uses", "how", "dtype")
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
    how: CombineMethod,
    dtype: DTypeLike,
) -> Factors:
    """Returns A [batch…, r, in] and B [batch…, r, out] of a sum; ranks are filled up with zeros.

    Args:
      arrays: arrays of each adapter, those of `ARRAYS` that it has.
      weights: weights of the adapters, [n].
      key: PRNG key of random pruning.
      by_layer: see `ranks_by_layer`.
      ranks: ranks of the sum in each layer, as `by_layer` has them.
      n_batch: the number of batch axes.
      uses: uses of the weight; of "each", both halves of the rank are sums of their own.
      how: see `lora_jax.bank.sums.arithmetic.combined`.
      dtype: dtype of the result.
    """
    layers_of: dict[Ranks, list[int]] = defaultdict(list)
    for layer, term_ranks in enumerate(by_layer):
        layers_of[term_ranks].append(layer)
    n_lanes = 2 if uses == "each" else 1

    def sum_lane(lane: int) -> Factors:
        def sum_group(term_ranks: Ranks, layers: list[int]) -> Factors | None:
            on = [term for term, rank in enumerate(term_ranks) if rank]
            at = None if len(by_layer) == 1 else np.asarray(layers)
            if not on:
                return None
            taken = [
                _taken(arrays[i], term_ranks[i], at, lane, n_lanes, n_batch, wide(dtype))
                for i in on
            ]
            factors, scales = zip(*taken, strict=True)
            return combined(
                factors,
                scales,
                weights[np.asarray(on)],
                jax.random.fold_in(jax.random.fold_in(key, lane), layers[0]),
                how=how,
                rank=ranks[layers[0]] // n_lanes,
                is_mirrored=lane == 1 or uses == "product",
            )

        groups = [
            (layers, sum_group(term_ranks, layers)) for term_ranks, layers in layers_of.items()
        ]
        return stack_layers(groups, len(by_layer))[0]

    a, b = zip(*map(sum_lane, range(n_lanes)), strict=True)
    return jnp.concatenate(a, axis=-2).astype(dtype), jnp.concatenate(b, axis=-2).astype(dtype)


def _taken(
    arrays: Mapping[str, jax.Array],
    rank: int,
    at: np.ndarray | None,
    lane: int,
    n_lanes: int,
    n_batch: int,
    dtype: DTypeLike,
) -> tuple[Factors, jax.Array]:
    """Returns A [batch…, r, in], B [batch…, r, out] and s [batch…] of some layers of an adapter.

    A₀ and B₀ are part of them: W + s(AB − A₀B₀) is W + s·[A A₀][B; −B₀].

    Args:
      arrays: see `summed`.
      rank: rank of these layers' change.
      at: their indices; None for all.
      lane: 0, or 1 for the second half of the rank.
      n_lanes: 1 or 2.
      n_batch: the number of batch axes.
      dtype: dtype of the result.
    """
    has_start = "start_a" in arrays
    each = rank // (2 if has_start else n_lanes)

    def take_layers(name: str) -> jax.Array:
        array = (arrays[name] if at is None else arrays[name][at]).astype(dtype)
        array = array.reshape(*array.shape[: n_batch + 1], -1)
        return array[..., lane * each : (lane + 1) * each, :]

    a, b = take_layers("a"), take_layers("b")
    if has_start:
        a = jnp.concatenate([a, take_layers("start_a")], axis=-2)
        b = jnp.concatenate([b, -take_layers("start_b")], axis=-2)
    scale = arrays["scale"] if at is None else arrays["scale"][at]
    return (a, b), scale.astype(dtype)


@jax.jit
def summed_biases(
    biases: Sequence[jax.Array], scales: Sequence[jax.Array], weights: jax.Array
) -> jax.Array:
    """Returns Σ w·s·c of biases c [batch…, out…], in the dtype of the weights [n]."""
    terms = [
        bias.astype(weights.dtype)
        * jnp.expand_dims(scale.astype(weights.dtype) * weight, range(scale.ndim, bias.ndim))
        for bias, scale, weight in zip(biases, scales, weights, strict=True)
    ]
    return functools.reduce(jnp.add, terms)
