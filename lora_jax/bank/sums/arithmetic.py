"""Sums of the factors of several adapters: exact ones, and PEFT's `add_weighted_adapter`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.bank.sums.lowrank import Factors, map_batch, nearest_factors, nearest_product

Sign = Literal["total", "frequency"]


@dataclasses.dataclass(frozen=True)
class CombineMethod:
    """A method to combine adapters, such as "ties" or "dare".

    Attributes:
      summands: "ranks" lays the factors side by side along the rank, which is the exact sum;
        "factors" sums the A's, and the B's; "changes" sums the products s·AB, formed for one matrix
        of a stack at a time.
      is_compressed: whether the result is reduced to a given rank.
      prunes: which elements of each factor or change are set to zero: those of the smallest
        magnitude, or random ones (DARE, Yu et al., arXiv 2311.03099). None: none.
      elects: whether the mean is taken over the elements that have the sign of the majority (TIES,
        Yadav et al., arXiv 2306.01708), rather than the sum over all.
      name: name of the way, for messages.
      density: the share of elements that pruning leaves.
      sign: the majority's: of the sum of elements ("total"), or of their signs ("frequency").
    """

    summands: Literal["ranks", "factors", "changes"]
    prunes: Literal["magnitude", "random"] | None = None
    elects: bool = False
    is_compressed: bool = False
    name: str = ""
    density: float = 1.0
    sign: Sign = "total"


_PRUNED = {
    "magnitude_prune": CombineMethod("factors", prunes="magnitude"),
    "ties": CombineMethod("factors", prunes="magnitude", elects=True),
    "dare_linear": CombineMethod("factors", prunes="random"),
    "dare_ties": CombineMethod("factors", prunes="random", elects=True),
}
METHODS = {
    "exact": CombineMethod("ranks"),
    "svd": CombineMethod("ranks", is_compressed=True),
    "linear": CombineMethod("factors"),
    **_PRUNED,
    **{
        f"{name}_svd": dataclasses.replace(method, summands="changes", is_compressed=True)
        for name, method in _PRUNED.items()
    },
}


def combined(
    factors: Sequence[Factors],
    scales: Sequence[jax.Array],
    weights: jax.Array,
    key: jax.Array,
    *,
    method: CombineMethod,
    rank: int = 0,
    is_mirrored: bool = False,
) -> Factors:
    """Returns the combined A [batch…, r, in] and B [batch…, r, out] of one weight's adapters.

    Their scale is 1.

    Args:
      factors: factors of each adapter, A [batch…, rᵢ, in] and B [batch…, rᵢ, out].
      scales: scales of each adapter, s [batch…].
      weights: weights of the adapters, [n].
      key: a PRNG key, of which random pruning makes use.
      method: one of `METHODS`, with the options that it takes.
      rank: rank of the result, where it is compressed.
      is_mirrored: whether PEFT calls B what is A here: signs of weights go to its A.
    """
    with jax.default_matmul_precision("highest"):
        if method.summands == "ranks":
            return _side_by_side(factors, scales, weights, rank if method.is_compressed else None)
        if method.summands == "changes":
            return _sum_changes(factors, scales, weights, key, rank, method)
        # The roots of s·w multiply both factors, and its sign one of them.
        products = jnp.stack([s * w for s, w in zip(scales, weights, strict=True)])
        products = products[..., None, None]  # [n, batch…, 1, 1]
        roots = jnp.sqrt(jnp.abs(products))
        signed_roots = jnp.where(products < 0, -roots, roots)
        weights_a = roots if is_mirrored else signed_roots
        weights_b = signed_roots if is_mirrored else roots
        all_a = jnp.stack([a for a, _ in factors])
        all_b = jnp.stack([b for _, b in factors])
        key_a, key_b = jax.random.split(key)
        return _summed(all_a, weights_a, key_a, method), _summed(all_b, weights_b, key_b, method)


def _side_by_side(
    factors: Sequence[Factors], scales: Sequence[jax.Array], weights: jax.Array, rank: int | None
) -> Factors:
    """Returns [w₁s₁A₁ w₂s₂A₂ …] and [B₁; B₂; …], compressed where a rank is given."""
    weighted = []
    for (a, _), scale, weight in zip(factors, scales, weights, strict=True):
        weighted.append(a * (weight * scale)[..., None, None])
    joined_a = jnp.concatenate(weighted, axis=-2)
    joined_b = jnp.concatenate([b for _, b in factors], axis=-2)
    if rank is None:
        return joined_a, joined_b
    return nearest_product(joined_a, joined_b, rank)


def _sum_changes(
    factors: Sequence[Factors],
    scales: Sequence[jax.Array],
    weights: jax.Array,
    key: jax.Array,
    rank: int,
    method: CombineMethod,
) -> Factors:
    """Returns the factors of a sum of s·AB, computed for one matrix of the stack at a time."""
    batch_shape = scales[0].shape

    def sum_matrix(member: tuple[list[Factors], list[jax.Array], jax.Array]) -> Factors:
        """Returns the factors of the sum for one matrix."""
        member_factors, member_scales, member_key = member
        changes = []
        for (a, b), scale in zip(member_factors, member_scales, strict=True):
            changes.append(scale * (a.mT @ b))
        change = _summed(jnp.stack(changes), weights[:, None, None], member_key, method)
        return nearest_factors(change, rank)

    keys = jax.random.split(key, batch_shape)
    return map_batch(sum_matrix, (list(factors), list(scales), keys), len(batch_shape))


def _summed(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, method: CombineMethod
) -> jax.Array:
    """Returns the weighted sum of matrices [n, batch…, rows, columns] over the first axis.

    PEFT's `task_arithmetic`, `magnitude_prune`, `ties`, `dare_linear` and `dare_ties`: the majority
    is that of the tensors without their weights.
    """
    if method.prunes == "magnitude" and method.density < 1:
        tensors = _largest(tensors, method.density)
    elif method.prunes == "random" and method.density < 1:
        is_kept = jax.random.bernoulli(key, method.density, tensors.shape)
        tensors = jnp.where(is_kept, tensors / method.density, 0)
    weighted = tensors * weights
    if not method.elects:
        return jnp.sum(weighted, axis=0)
    votes = tensors if method.sign == "total" else jnp.sign(tensors)
    majority_sign = jnp.where(jnp.sum(votes, axis=0) >= 0, 1, -1).astype(tensors.dtype)
    is_in_majority = jnp.sign(tensors) == majority_sign
    n_in_majority = jnp.maximum(jnp.sum(is_in_majority, axis=0), 1).astype(tensors.dtype)
    return jnp.sum(jnp.where(is_in_majority, weighted, 0), axis=0) / n_in_majority


def _largest(tensors: jax.Array, density: float) -> jax.Array:
    """Returns matrices […, rows, columns] with all but the largest elements set to 0."""
    elements = tensors.reshape(*tensors.shape[:-2], -1)
    n_kept = int(density * elements.shape[-1])
    _, indices = lax.top_k(jnp.abs(elements), n_kept)
    nothing_kept = jnp.zeros(elements.shape, bool)
    is_kept = jnp.put_along_axis(nothing_kept, indices, True, axis=-1, inplace=False)
    return jnp.where(is_kept, elements, 0).reshape(tensors.shape)
