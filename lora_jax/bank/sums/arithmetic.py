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
    """A way to combine adapters.

    Attributes:
      what: "ranks" lays the factors side by side along the rank, which is the exact sum; "factors"
        sums the A's, and the B's; "changes" sums the products s·AB, formed for one matrix of a
        stack at a time.
      is_compressed: whether the result is reduced to a given rank.
      prunes: which elements of each factor or change are set to zero: those of the smallest
        magnitude, or random ones (DARE, Yu et al., arXiv 2311.03099). None: none.
      elects: whether the mean is taken over the elements that have the sign of the majority (TIES,
        Yadav et al., arXiv 2306.01708), rather than the sum over all.
      name: name of the way, for messages.
      density: the share of elements that pruning leaves.
      sign: the majority's: of the sum of elements ("total"), or of their signs ("frequency").
    """

    what: Literal["ranks", "factors", "changes"]
    prunes: Literal["magnitude", "random"] | None = None
    elects: bool = False
    is_compressed: bool = False
    name: str = ""
    density: float = 1.0
    sign: Sign = "total"


_PRUNED: dict[str, tuple[Literal["magnitude", "random"], bool]] = {
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
HOWS = {
    "exact": CombineMethod("ranks"),
    "svd": CombineMethod("ranks", is_compressed=True),
    "linear": CombineMethod("factors"),
    **{name: CombineMethod("factors", *fields) for name, fields in _PRUNED.items()},
    **{f"{name}_svd": CombineMethod("changes", *fields, True) for name, fields in _PRUNED.items()},
}


def combined(
    factors: Sequence[Factors],
    scales: Sequence[jax.Array],
    weights: jax.Array,
    key: jax.Array,
    *,
    how: CombineMethod,
    rank: int = 0,
    is_mirrored: bool = False,
) -> Factors:
    """Returns A [batch…, r, in] and B [batch…, r, out] of several adapters of one matrix or stack.

    Their scale is 1.

    Args:
      factors: factors of each adapter, A [batch…, rᵢ, in] and B [batch…, rᵢ, out].
      scales: scales of each adapter, s [batch…].
      weights: weights of the adapters, [n].
      key: a PRNG key, of which random pruning makes use.
      how: one of `HOWS`, with the options that it takes.
      rank: rank of the result, where it is compressed.
      is_mirrored: whether PEFT calls B what is A here: signs of weights go to its A.
    """
    with jax.default_matmul_precision("highest"):
        if how.what == "ranks":
            return _side_by_side(factors, scales, weights, rank if how.is_compressed else None)
        if how.what == "changes":
            return _sum_changes(factors, scales, weights, key, rank, how)
        factor = jnp.stack([s * w for s, w in zip(scales, weights, strict=True)])[..., None, None]
        root = jnp.sqrt(jnp.abs(factor))
        signed = jnp.where(factor < 0, -root, root)
        key_a, key_b = jax.random.split(key)
        a, b = (jnp.stack(side) for side in zip(*factors, strict=True))
        of_a, of_b = (root, signed) if is_mirrored else (signed, root)
        return _summed(a, of_a, key_a, how), _summed(b, of_b, key_b, how)


def _side_by_side(
    factors: Sequence[Factors], scales: Sequence[jax.Array], weights: jax.Array, rank: int | None
) -> Factors:
    """Returns [w₁s₁A₁ w₂s₂A₂ …] and [B₁; B₂; …], compressed where a rank is given."""
    each = zip(factors, scales, weights, strict=True)
    a = jnp.concatenate([a * (w * s)[..., None, None] for (a, _), s, w in each], axis=-2)
    b = jnp.concatenate([b for _, b in factors], axis=-2)
    return (a, b) if rank is None else nearest_product(a, b, rank)


def _sum_changes(
    factors: Sequence[Factors],
    scales: Sequence[jax.Array],
    weights: jax.Array,
    key: jax.Array,
    rank: int,
    how: CombineMethod,
) -> Factors:
    """Returns the factors of a sum of changes s·AB, one matrix of the stack after the other."""
    batch = scales[0].shape

    def sum_matrix(member: tuple[list[Factors], list[jax.Array], jax.Array]) -> Factors:
        factors, scales, key = member
        each = zip(factors, scales, strict=True)
        changes = jnp.stack([s * (a.mT @ b) for (a, b), s in each])
        return nearest_factors(_summed(changes, weights[:, None, None], key, how), rank)

    keys = jax.random.split(key, batch)
    return map_batch(sum_matrix, (list(factors), list(scales), keys), len(batch))


def _summed(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, how: CombineMethod
) -> jax.Array:
    """Returns the weighted sum of matrices [n, batch…, rows, columns] over the first axis.

    PEFT's `task_arithmetic`, `magnitude_prune`, `ties`, `dare_linear` and `dare_ties`: the majority
    is that of the tensors without their weights.
    """
    if how.prunes == "magnitude" and how.density < 1:
        tensors = _largest(tensors, how.density)
    elif how.prunes == "random" and how.density < 1:
        kept = jax.random.bernoulli(key, how.density, tensors.shape)
        tensors = jnp.where(kept, tensors / how.density, 0)
    weighted = tensors * weights
    if not how.elects:
        return jnp.sum(weighted, axis=0)
    votes = jnp.sum(tensors if how.sign == "total" else jnp.sign(tensors), axis=0)
    agree = jnp.sign(tensors) == jnp.where(votes >= 0, 1, -1).astype(tensors.dtype)
    count = jnp.maximum(jnp.sum(agree, axis=0), 1).astype(tensors.dtype)
    return jnp.sum(jnp.where(agree, weighted, 0), axis=0) / count


def _largest(tensors: jax.Array, density: float) -> jax.Array:
    """Returns matrices […, rows, columns] with the largest elements alone, 0 for the others."""
    flat = tensors.reshape(*tensors.shape[:-2], -1)
    _, indices = lax.top_k(jnp.abs(flat), int(density * flat.shape[-1]))
    none = jnp.zeros(flat.shape, bool)
    kept = jnp.put_along_axis(none, indices, True, axis=-1, inplace=False)
    return jnp.where(kept, flat, 0).reshape(tensors.shape)
