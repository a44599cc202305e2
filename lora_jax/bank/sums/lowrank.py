"""Factors of low rank: the best approximation of a matrix, and stacks of several ranks."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.parts import filled
from lora_jax.core.types import Tree
from lora_jax.core.weight import LoraWeight

Factors = tuple[jax.Array, jax.Array]  # A [batch…, r, in] and B [batch…, r, out]


def nearest_product(a: jax.Array, b: jax.Array, rank: int) -> Factors:
    """Returns the best approximation of a product AᵀB by one of lower rank (Eckart–Young).

    From QR decompositions of both factors and the singular values of a core [R, R]: nothing of the
    product's size is formed. Each factor gets the roots of the singular values.

    The matrices of a batch take turns. XLA splits a batched decomposition over the threads of a
    CPU, and two of them at once were seen to wait for each other forever (JAX 0.10.2, two threads).

    Args:
      a: [batch…, R, in].
      b: [batch…, R, out].
      rank: at most R, in and out.
    """

    def nearest(factors: Factors) -> Factors:
        a, b = factors
        q_a, r_a = jnp.linalg.qr(a.mT)  # [in, k], [k, R]
        q_b, r_b = jnp.linalg.qr(b.mT)
        u, s, vt = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
        a, b = split_roots(u, s, vt, rank)
        return a @ q_a.mT, b @ q_b.mT

    return map_batch(nearest, (a, b), a.ndim - 2)


def map_batch(fn: Callable[[Tree], Factors], arrays: Tree, n_batch: int) -> Factors:
    """Returns a function's results for each index of the batch axes, computed one after the other.

    Args:
      fn: called with arrays that lack the batch axes.
      arrays: a tree of arrays with the same batch axes in front.
      n_batch: their number.
    """
    batch = jax.tree.leaves(arrays)[0].shape[:n_batch]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[n_batch:]), arrays)
    a, b = lax.map(fn, flat)
    return a.reshape(*batch, *a.shape[1:]), b.reshape(*batch, *b.shape[1:])


def nearest_factors(change: jax.Array, rank: int) -> Factors:
    """Returns the factors of the best approximation of a matrix [batch…, in, out] of this rank."""
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    return split_roots(u, s, vt, rank)


def split_roots(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> Factors:
    """Returns the factors of the largest singular values, whose roots each of the two gets."""
    root = jnp.sqrt(s[..., :rank, None])
    return root * u[..., :rank].mT, root * vt[..., :rank, :]


def replace_factors(node: LoraWeight, factors: Factors, ranks: tuple[int, ...]) -> LoraWeight:
    """Returns a weight with other factors, and a scale of 1; of 0 in layers of rank 0."""
    node = node.replace(arrays={}, ranks=ranks if len(set(ranks)) > 1 else ranks[:1])
    a, b = (f.reshape(node.shape_of(name)) for f, name in zip(factors, "ab", strict=True))
    scale = node.where_adapted(jnp.ones(node.shape_of("scale"), jnp.float32), 0)
    return node.replace(a=a, b=b, scale=scale)


def stack_layers(
    groups: Iterable[tuple[list[int], Factors | None]], depth: int
) -> tuple[Factors, tuple[int, ...]]:
    """Returns the factors of a stack, from those of its layers, and the layers' ranks.

    Ranks below the largest are filled up with zeros.

    Args:
      groups: layers of one rank, and their factors [layers, batch…, r, …]; None: of rank 0. A depth
        of 1 has one group, whose factors have no axis of layers, or all of them.
      depth: the number of layers.
    """
    present = [(layers, factors) for layers, factors in groups if factors is not None]
    largest = max(a.shape[-2] for _, (a, _) in present)
    ranks = [0] * depth
    for layers, (a, _) in present:
        for layer in layers:
            ranks[layer] = a.shape[-2]
    if depth == 1:
        return present[0][1], (largest,)
    order = [layer for layers, _ in present for layer in layers]
    absent = [layer for layer in range(depth) if layer not in order]
    places = np.argsort([*order, *absent])

    def whole(parts: list[jax.Array]) -> jax.Array:
        *batch, _, width = parts[0].shape
        parts = [filled(part, -2, largest) for part in parts]
        if absent:
            shape = (len(absent), *batch[1:], largest, width)
            parts.append(jnp.zeros(shape, parts[0].dtype))
        return jnp.concatenate(parts)[places]

    a, b = (whole([factors[which] for _, factors in present]) for which in (0, 1))
    return (a, b), tuple(ranks) if len(set(ranks)) > 1 else (largest,)
