"""DoRA's algebra: the norm of each column of W + s·AB, and a product rescaled column by column.

DoRA (Liu et al., arXiv 2402.09353) runs x·(W + s·AB)·diag(m / ‖W + s·AB‖). The norms come from

    ‖W + s·AB‖² = ‖W‖² + 2s·Σ_r (AᵀW ⊙ B) + s²·Σ_r ((AᵀA)B ⊙ B)        (sums over rows of W)

so that nothing of W's shape is formed, and they count as constants of the derivative (its section
4.3, and PEFT's ``use_dora``).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.core.axes import Label
from lora_jax.core.parts import layout


def wide(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype to accumulate in: fp32, or the operands' own where they are wider."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    widest: DTypeLike = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return widest


def column_norms(
    base: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, labels: Sequence[Label]
) -> jax.Array:
    """Returns ‖W + s·AB‖ over the in axes, fp32 (or wider), [batch…, out…].

    Args:
      base: W, its axes in any order.
      a: [batch…, r, in…].
      b: [batch…, r, out…].
      scale: [batch…].
      labels: the role of each axis of W.
    """
    stack, rows, columns = (layout((role,), labels) for role in ("batch", "in", "out"))
    dtype, n = wide(base.dtype), len(stack)
    kept = sorted((*stack, *columns))
    order = [kept.index(axis) for axis in (*stack, *columns)]
    squares = lax.transpose(jnp.sum(jnp.square(base.astype(dtype)), axis=rows), order)

    dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    a, b = a.astype(dtype), b.astype(dtype)
    in_of_a, batch = tuple(range(n + 1, a.ndim)), tuple(range(n))
    cross = sum(
        dot(part, base, ((in_of_a, rows), (batch, stack)), preferred_element_type=dtype)
        for part in _parts(a, base.dtype)
    )  # AᵀW, [batch…, r, out…]
    gram = dot(a, a, ((in_of_a, in_of_a), (batch, batch)))  # AᵀA, [batch…, r, r]
    gram_b = dot(gram, b, (((n + 1,), (n,)), (batch, batch)))
    s = lax.expand_dims(scale.astype(dtype), range(n, b.ndim))
    change = jnp.sum((2 * cross + s * gram_b) * s * b, axis=n)
    return jnp.sqrt(jnp.maximum(squares + change, jnp.finfo(dtype).tiny))


def _parts(a: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """Returns arrays of W's dtype whose sum is A, so that W need not be cast for the product."""
    if jnp.dtype(dtype).itemsize >= a.dtype.itemsize:
        return [a]
    high = a.astype(dtype)
    return [high, (a - high.astype(a.dtype)).astype(dtype)]


@jax.custom_jvp
def rescaled(u: jax.Array, gain: jax.Array) -> jax.Array:
    """Returns u·gain, multiplied in the wider of their dtypes and rounded to u's; they broadcast.

    Its derivative with respect to the gain is written with the result instead of u. The next
    operation mostly keeps the result anyway, so that nothing more is kept for the gain.
    """
    dtype = jnp.promote_types(u.dtype, gain.dtype)
    return (u.astype(dtype) * gain.astype(dtype)).astype(u.dtype)


@rescaled.defjvp
def _rescaled_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (u, gain), (u_dot, gain_dot) = primals, tangents
    y = rescaled(u, gain)
    inverse = jnp.where(gain == 0, 0, 1 / gain).astype(gain.dtype)
    of_gain = y * (gain_dot * inverse).astype(y.dtype)
    dtype = jnp.promote_types(u.dtype, gain.dtype)
    return y, (u_dot.astype(dtype) * gain.astype(dtype)).astype(y.dtype) + of_gain
