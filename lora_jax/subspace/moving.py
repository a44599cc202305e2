"""θ₀ + λP(θ_d) of each tensor: large ones one by one, small ones of one size together.

P is the tensor's Fastfood projection times √(n/D), where a tensor has n of the tree's D entries:
the change of the whole tree has about the norm of θ_d, and all entries move alike. (With that norm
in each tensor, entries of gains would move many times as far as those of kernels, and steps would
have to be small.)

A projection is drawn where it is used, and drawn again in the backward pass. Each program for one
size takes the compiler a second or so, and a model has hundreds of small tensors of few sizes.
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

from lora_jax.core.magnitude import wide
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Forward, Leaf, Tree
from lora_jax.subspace.fastfood import project
from lora_jax.subspace.layers import Tensor

_GENERATOR = "threefry2x32"  # of the draws, whatever JAX's default is
_SMALL = 2**18  # entries of a tensor, and of those that are projected at once


def keys_of(seed: int, tensors: Sequence[Tensor]) -> jax.Array:
    """Returns the data of each tensor's PRNG key, leaf by leaf: uint32 [n, 2].

    A layer of a stack is a tensor of its own.
    """
    with jax.ensure_compile_time_eval():
        key = jax.random.key(seed, impl=_GENERATOR)
        names = [name for tensor in tensors for name in tensor.names]
        return jnp.stack([jax.random.key_data(fold_in_path(key, name)) for name in names])


def moved(
    keys: jax.Array,
    tensors: Sequence[Tensor],
    leaves: Mapping[str, Leaf],
    theta: jax.Array,
    scale: jax.Array | None,
) -> dict[str, jax.Array]:
    """Returns θ₀ + λP(θ_d) of each leaf, by path.

    Args:
      keys: PRNG keys of the projections, as `keys_of` returns them.
      tensors: tensors that move.
      leaves: θ₀, by path.
      theta: θ_d.
      scale: λ of each layer; None for one everywhere.
    """
    total = sum(tensor.size for tensor in tensors)
    by_path, small = {}, defaultdict(list)
    # The compiler must not compute the draws itself, where it knows the keys.
    every = jax.random.wrap_key_data(jax.lax.optimization_barrier(keys), impl=_GENERATOR)
    ends = itertools.accumulate(len(tensor.names) for tensor in tensors)
    own = {t.path: every[end - len(t.names) : end] for t, end in zip(tensors, ends, strict=True)}
    for tensor in tensors:
        if tensor.size // len(tensor.names) <= _SMALL:
            small[tensor.size // len(tensor.names)].append(tensor)
            continue
        shape = leaves[tensor.path].shape[: int(tensor.is_stack)]
        scales = _scales(scale, [tensor], total, theta.dtype)
        move = _move_stack if tensor.is_stack else _move_tensor
        by_path[tensor.path] = move(
            leaves[tensor.path], theta, own[tensor.path].reshape(shape), scales.reshape(shape)
        )
    for size, group in small.items():
        group_keys = jnp.concatenate([own[tensor.path] for tensor in group])
        changes = _together(theta, group_keys, _scales(scale, group, total, theta.dtype), size)
        done = 0
        for tensor in group:
            leaf, n = leaves[tensor.path], len(tensor.names)
            by_path[tensor.path] = _sum(leaf, changes[done : done + n].reshape(tensor.shape))
            done += n
    return by_path


def placed(array: jax.Array, leaf: Leaf, sharding: Sharding | None = None) -> jax.Array:
    """Returns a moved leaf with a sharding; by default its own, where it is known."""
    if sharding is None and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        sharding = leaf.sharding if len(leaf.sharding.device_set) > 1 else None
    if sharding is None:
        return array
    traced = isinstance(array, jax.core.Tracer)
    put: Forward = jax.lax.with_sharding_constraint if traced else jax.device_put
    moved: jax.Array = put(array, sharding)
    return moved


def draws_of(seed: int) -> jax.Array:
    """Returns some random bits, to tell whether another JAX draws the same from a seed: uint32."""
    return jax.random.bits(jax.random.key(seed, impl=_GENERATOR), (8,), jnp.uint32)


def _scales(
    scale: jax.Array | None, tensors: Sequence[Tensor], total: int, dtype: DTypeLike
) -> jax.Array:
    """Returns λ·√(n/D) of each tensor of some leaves.

    Args:
      scale: λ of each layer; None for one everywhere.
      tensors: the leaves; a layer of a stack is a tensor of its own.
      total: D.
      dtype: dtype of the result without `scale`.
    """
    layers = [layer for tensor in tensors for layer in tensor.layers]
    sizes = [tensor.size // len(tensor.names) for tensor in tensors for _ in tensor.names]
    shares = np.sqrt(np.array(sizes) / total)
    if scale is None:
        return jnp.asarray(shares, dtype)
    return scale[np.asarray(layers)] * shares.astype(scale.dtype)


def _change(theta: jax.Array, key: jax.Array, scale: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns a tensor's change, λP(θ_d). Its scale comes first: in d numbers."""
    dtype = wide(theta.dtype)
    x = theta.astype(dtype) * scale.astype(dtype)
    return project(x, key, math.prod(shape)).reshape(shape)


def _sum(leaf: Leaf, change: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(change.dtype, wide(leaf.dtype))
    total: jax.Array = leaf.astype(dtype) + change.astype(dtype)
    return total.astype(leaf.dtype)


# Keeps θ_d and a key for the backward pass, rather than the draws.
_drawn_again = jax.checkpoint(_change, static_argnums=3)


@jax.jit  # tensors of one shape share one compiled function
def _move_tensor(leaf: Leaf, theta: jax.Array, key: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of one tensor."""
    return _sum(leaf, _drawn_again(theta, key, scale, leaf.shape))


@jax.custom_jvp
def _layer_by_layer(leaf: Leaf, theta: jax.Array, keys: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of a stack, each layer in its place.

    (`jax.lax.map` begins with a stack of zeros, of which two loops of one shape make a copy.)
    """

    def layer(i: jax.Array, total: jax.Array) -> jax.Array:
        change = _change(theta, keys[i], scales[i], leaf.shape[1:])
        return total.at[i].set(_sum(total[i], change))

    total: jax.Array = jax.lax.fori_loop(0, leaf.shape[0], layer, leaf)
    return total


@functools.partial(_layer_by_layer.defjvp, symbolic_zeros=True)
def _layer_by_layer_jvp(primals: Tree, tangents: Tree) -> tuple[jax.Array, jax.Array]:
    """Returns the sum and its tangent, dθ₀ + P(λ·dθ_d + dλ·θ_d)."""
    leaf, theta, keys, scales = primals
    fixed = isinstance(tangents[0], SymbolicZero)  # no array of zeros for a base that is constant
    d_leaf, d_theta, d_scales = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
        for x in (scales if fixed else tangents[0], tangents[1], tangents[3])
    )

    def layer(one: Tree) -> jax.Array:
        d_one, key, scale, d_scale = one
        x = d_theta * scale + d_scale * theta
        change = _drawn_again(x, key, jnp.ones_like(scale), leaf.shape[1:])
        return change.astype(leaf.dtype) if fixed else _sum(d_one, change)

    total = _layer_by_layer(leaf, theta, keys, scales)
    return total, jax.lax.map(layer, (d_leaf, keys, scales, d_scales))


_move_stack = jax.jit(_layer_by_layer)


@functools.partial(jax.jit, static_argnums=3)
def _together(theta: jax.Array, keys: jax.Array, scales: jax.Array, size: int) -> jax.Array:
    """Returns λP(θ_d) of n tensors of one size, [n, size], some at a time."""
    n = len(keys)
    at_once = max(k for k in range(1, n + 1) if n % k == 0 and k * size <= max(size, _SMALL))
    changes: jax.Array = jax.lax.map(
        lambda one: _drawn_again(theta, one[0], one[1], (size,)), (keys, scales), batch_size=at_once
    )
    return changes
