"""Factors of low rank: best approximations, and stacks of layers that differ in rank."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.parts import pad_rank
from lora_jax.core.types import Tree
from lora_jax.core.weight import LoraWeight

Factors = tuple[jax.Array, jax.Array]  # A [batch…, r, in] and B [batch…, r, out]


def nearest_product(a: jax.Array, b: jax.Array, rank: int) -> Factors:
    """Returns the best approximation of a product AᵀB with a lower rank (Eckart–Young).

    From QR decompositions of both factors and the singular values of a core [R, R]: nothing of the
    product's size is formed. Each factor gets the roots of the singular values.

    The matrices of a batch take turns. XLA splits a batched decomposition over the threads of a
    CPU, and two of them at once were seen to wait for each other forever (JAX 0.10.2, two threads).

    Args:
      a: [batch…, R, in].
      b: [batch…, R, out].
      rank: at most R, in and out.
    """

    def compress(factors: Factors) -> Factors:
        """Returns the compressed factors, by QR and an SVD of the small core."""
        a, b = factors
        q_a, r_a = jnp.linalg.qr(a.mT)  # [in, k], [k, R]
        q_b, r_b = jnp.linalg.qr(b.mT)
        core_a, core_b = nearest_factors(r_a @ r_b.mT, rank)
        return core_a @ q_a.mT, core_b @ q_b.mT

    return map_batch(compress, (a, b), a.ndim - 2)


def map_batch(fn: Callable[[Tree], Factors], arrays: Tree, n_batch: int) -> Factors:
    """Returns a function's results for each index of the batch axes, one at a time.

    Args:
      fn: called with arrays that lack the batch axes.
      arrays: a tree of arrays with the same batch axes in front.
      n_batch: their number.
    """
    batch_shape = jax.tree.leaves(arrays)[0].shape[:n_batch]

    def join_batch_axes(array: jax.Array) -> jax.Array:
        return array.reshape(-1, *array.shape[n_batch:])

    a, b = lax.map(fn, jax.tree.map(join_batch_axes, arrays))
    return a.reshape(*batch_shape, *a.shape[1:]), b.reshape(*batch_shape, *b.shape[1:])


def nearest_factors(change: jax.Array, rank: int) -> Factors:
    """Returns the best factors of this rank for a matrix [batch…, in, out]."""
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    return split_roots(u, s, vt, rank)


def split_roots(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> Factors:
    """Returns U√S and √SVᵀ of the largest singular values."""
    root = jnp.sqrt(s[..., :rank, None])
    return root * u[..., :rank].mT, root * vt[..., :rank, :]


def replace_factors(node: LoraWeight, factors: Factors, ranks: tuple[int, ...]) -> LoraWeight:
    """Returns a weight with new factors and scale 1; scale 0 in layers of rank 0."""
    has_one_rank = len(set(ranks)) == 1
    node = node.replace(arrays={}, ranks=ranks[:1] if has_one_rank else ranks)
    a, b = factors
    scale = node.where_adapted(jnp.ones(node.shape_of("scale"), jnp.float32), 0)
    return node.replace(
        a=a.reshape(node.shape_of("a")), b=b.reshape(node.shape_of("b")), scale=scale
    )


def stack_layers(
    groups: Iterable[tuple[list[int], Factors | None]], depth: int
) -> tuple[Factors, tuple[int, ...]]:
    """Returns the stacked factors of layers, and the rank of each layer.

    Ranks below the largest are filled up with zeros.

    Args:
      groups: layers of one rank, and their factors [layers, batch…, r, …]; None: of rank 0. A depth
        of 1 has one group, whose factors have no axis of layers, or all of them.
      depth: the number of layers.
    """
    layers_and_factors = [(layers, factors) for layers, factors in groups if factors is not None]
    ranks = [0] * depth
    for layers, (a, _) in layers_and_factors:
        for layer in layers:
            ranks[layer] = a.shape[-2]
    largest_rank = max(ranks)
    if depth == 1:
        _, factors = layers_and_factors[0]
        return factors, (largest_rank,)
    present_layers = [layer for layers, _ in layers_and_factors for layer in layers]
    absent_layers = [layer for layer in range(depth) if layer not in present_layers]
    # The index of each layer among the joined factors, where absent layers come last.
    index_of_layer = np.argsort([*present_layers, *absent_layers])

    def stack(factor_groups: list[jax.Array]) -> jax.Array:
        """Stacks the layers of one factor, padded to the largest rank."""
        padded_groups = [pad_rank(factor, -2, largest_rank) for factor in factor_groups]
        if absent_layers:
            layer_shape = padded_groups[0].shape[1:]
            zeros = jnp.zeros((len(absent_layers), *layer_shape), padded_groups[0].dtype)
            padded_groups.append(zeros)
        return jnp.concatenate(padded_groups)[index_of_layer]

    stacked_a = stack([a for _, (a, _) in layers_and_factors])
    stacked_b = stack([b for _, (_, b) in layers_and_factors])
    has_one_rank = len(set(ranks)) == 1
    return (stacked_a, stacked_b), (largest_rank,) if has_one_rank else tuple(ranks)
