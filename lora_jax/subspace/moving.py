"""Computes θ₀ + λP(θ_d): large tensors one by one, and small tensors of equal size together.

P is the tensor's Fastfood projection times √(n/D), where a tensor has n of the tree's D entries:
the change of the whole tree has about the norm of θ_d, and all entries move alike. (With that norm
in each tensor, entries of gains would move many times as far as those of kernels, and steps would
have to be small.)

A tensor **moves** by its **change**, λP(θ_d). Its projection is drawn where it is used, and drawn
again in the backward pass. The compiler takes about a second for the program of one size, and a
model has hundreds of small tensors of few sizes.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Sharding
from jax.typing import DTypeLike

from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Forward, Leaf, Tree
from lora_jax.subspace.fastfood import project
from lora_jax.subspace.layers import Tensor

_GENERATOR = "threefry2x32"  # of the draws, independently of JAX's default
_MAX_SMALL_ENTRIES = 2**18  # of a small tensor, and of small tensors that move together


def projection_keys(seed: int, tensors: Sequence[Tensor]) -> jax.Array:
    """Returns the raw PRNG key of each tensor, leaf by leaf: uint32 [n, 2].

    A layer of a stack is a tensor of its own.
    """
    with jax.ensure_compile_time_eval():
        key = jax.random.key(seed, impl=_GENERATOR)
        names = [name for tensor in tensors for name in tensor.names]
        return jnp.stack([jax.random.key_data(fold_in_path(key, name)) for name in names])


def move_leaves(
    keys: jax.Array,
    tensors: Sequence[Tensor],
    leaves: Mapping[str, Leaf],
    theta: jax.Array,
    scale: jax.Array | None,
) -> dict[str, jax.Array]:
    """Returns θ₀ + λP(θ_d) of each leaf, by path.

    Args:
      keys: PRNG keys of the projections, as `projection_keys` returns them.
      tensors: tensors that move.
      leaves: θ₀, by path.
      theta: θ_d.
      scale: λ of each layer; None for one everywhere.
    """
    total_size = sum(tensor.size for tensor in tensors)
    # The barrier keeps the compiler from computing the draws itself, where it knows the keys.
    all_keys = jax.random.wrap_key_data(jax.lax.optimization_barrier(keys), impl=_GENERATOR)
    key_stops = [*itertools.accumulate(len(tensor.names) for tensor in tensors)]
    keys_of_leaf = {
        tensor.path: all_keys[stop - len(tensor.names) : stop]
        for tensor, stop in zip(tensors, key_stops, strict=True)
    }
    # Large tensors move one by one.
    moved_leaves: dict[str, jax.Array] = {}
    small_tensors: dict[int, list[Tensor]] = defaultdict(list)  # leaves by size of their tensors
    for tensor in tensors:
        size = tensor.size // len(tensor.names)
        if size <= _MAX_SMALL_ENTRIES:
            small_tensors[size].append(tensor)
            continue
        leaf = leaves[tensor.path]
        stack_shape = leaf.shape[: int(tensor.is_stack)]
        scales = _scale_of_each_tensor(scale, [tensor], total_size, theta.dtype)
        leaf_keys = keys_of_leaf[tensor.path].reshape(stack_shape)
        move = _move_stack if tensor.is_stack else _move_tensor
        moved_leaves[tensor.path] = move(leaf, theta, leaf_keys, scales.reshape(stack_shape))
    # Small tensors of one size move together.
    for size, group in small_tensors.items():
        group_keys = jnp.concatenate([keys_of_leaf[tensor.path] for tensor in group])
        group_scales = _scale_of_each_tensor(scale, group, total_size, theta.dtype)
        changes = _changes_of_small_tensors(theta, group_keys, group_scales, size)
        start = 0
        for tensor in group:
            stop = start + len(tensor.names)
            change = changes[start:stop].reshape(tensor.shape)
            moved_leaves[tensor.path] = _add_change(leaves[tensor.path], change)
            start = stop
    return moved_leaves


def place_leaf(array: jax.Array, leaf: Leaf, sharding: Sharding | None = None) -> jax.Array:
    """Places a moved leaf on devices.

    Args:
      array: θ₀ + λP(θ_d) of the leaf.
      leaf: θ₀ of the leaf.
      sharding: the sharding of the result; by default that of `leaf`, where it is known.
    """
    has_known_sharding = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if sharding is None and has_known_sharding and len(leaf.sharding.device_set) > 1:
        sharding = leaf.sharding
    if sharding is None:
        return array
    is_traced = isinstance(array, jax.core.Tracer)
    put: Forward = jax.lax.with_sharding_constraint if is_traced else jax.device_put
    placed_array: jax.Array = put(array, sharding)
    return placed_array


def sample_of_draws(seed: int) -> jax.Array:
    """Returns random bits of a seed, uint32, by which two JAX versions can be compared."""
    return jax.random.bits(jax.random.key(seed, impl=_GENERATOR), (8,), jnp.uint32)


def _scale_of_each_tensor(
    scale: jax.Array | None, tensors: Sequence[Tensor], total_size: int, dtype: DTypeLike
) -> jax.Array:
    """Returns λ·√(n/D) of each tensor of some leaves.

    Args:
      scale: λ of each layer; None for one everywhere.
      tensors: the leaves; a layer of a stack is a tensor of its own.
      total_size: D.
      dtype: dtype of the result without `scale`.
    """
    layers = [layer for tensor in tensors for layer in tensor.layers]
    sizes = [tensor.size // len(tensor.names) for tensor in tensors for _ in tensor.names]
    share_roots = np.sqrt(np.array(sizes) / total_size)
    if scale is None:
        return jnp.asarray(share_roots, dtype)
    return scale[np.asarray(layers)] * share_roots.astype(scale.dtype)


def _change_of_tensor(
    theta: jax.Array, key: jax.Array, scale: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """Returns a tensor's change P(λθ_d), with λ applied to the d numbers."""
    dtype = accumulation_dtype(theta.dtype)
    x = theta.astype(dtype) * scale.astype(dtype)
    return project(x, key, math.prod(shape)).reshape(shape)


def _add_change(leaf: Leaf, change: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of a tensor, added in fp32 or wider and rounded once."""
    dtype = jnp.promote_types(change.dtype, accumulation_dtype(leaf.dtype))
    total: jax.Array = leaf.astype(dtype) + change.astype(dtype)
    return total.astype(leaf.dtype)


# Keeps θ_d and a key for the backward pass instead of the draws.
_checkpointed_change = jax.checkpoint(_change_of_tensor, static_argnums=3)


@jax.jit  # tensors of one shape share one compiled function
def _move_tensor(leaf: Leaf, theta: jax.Array, key: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of one tensor."""
    return _add_change(leaf, _checkpointed_change(theta, key, scale, leaf.shape))


@jax.custom_jvp
def _move_stack_in_place(
    leaf: Leaf, theta: jax.Array, keys: jax.Array, scales: jax.Array
) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of a stack, computed layer by layer in place.

    (`jax.lax.map` begins with a stack of zeros, of which two loops of one shape make a copy.)
    """

    def layer(i: jax.Array, total: jax.Array) -> jax.Array:
        change = _change_of_tensor(theta, keys[i], scales[i], leaf.shape[1:])
        return total.at[i].set(_add_change(total[i], change))

    total: jax.Array = jax.lax.fori_loop(0, leaf.shape[0], layer, leaf)
    return total


def _instantiate(tangent: jax.Array | SymbolicZero) -> jax.Array:
    """Returns a tangent as an array, zeros if it is symbolic."""
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent


@functools.partial(_move_stack_in_place.defjvp, symbolic_zeros=True)
def _move_stack_jvp(primals: Tree, tangents: Tree) -> tuple[jax.Array, jax.Array]:
    """Returns the sum and its tangent, dθ₀ + P(λ·dθ_d + dλ·θ_d)."""
    leaf, theta, keys, scales = primals
    d_leaf, d_theta, _, d_scales = tangents
    is_base_constant = isinstance(d_leaf, SymbolicZero)  # it gets no array of zeros
    d_leaf_or_unused = scales if is_base_constant else _instantiate(d_leaf)
    d_theta = _instantiate(d_theta)
    d_scales = _instantiate(d_scales)

    def layer_tangent(layer: tuple[jax.Array, ...]) -> jax.Array:
        d_layer, key, scale, d_scale = layer
        x = d_theta * scale + d_scale * theta
        change = _checkpointed_change(x, key, jnp.ones_like(scale), leaf.shape[1:])
        return change.astype(leaf.dtype) if is_base_constant else _add_change(d_layer, change)

    total = _move_stack_in_place(leaf, theta, keys, scales)
    return total, jax.lax.map(layer_tangent, (d_leaf_or_unused, keys, scales, d_scales))


_move_stack = jax.jit(_move_stack_in_place)


@functools.partial(jax.jit, static_argnums=3)
def _changes_of_small_tensors(
    theta: jax.Array, keys: jax.Array, scales: jax.Array, size: int
) -> jax.Array:
    """Returns λP(θ_d) of n tensors of one size, [n, size].

    At most `_MAX_SMALL_ENTRIES` entries are computed at once.
    """
    n = len(keys)
    max_entries = max(size, _MAX_SMALL_ENTRIES)
    batch_sizes = [k for k in range(1, n + 1) if n % k == 0 and k * size <= max_entries]

    def change(tensor: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, scale = tensor
        result: jax.Array = _checkpointed_change(theta, key, scale, (size,))
        return result

    changes: jax.Array = jax.lax.map(change, (keys, scales), batch_size=max(batch_sizes))
    return changes
