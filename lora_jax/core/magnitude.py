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
from lora_jax.core.parts import layout_of_axes


def accumulation_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns the accumulation dtype: fp32, or the operands' own dtype if it is wider."""
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
    batch_axes = layout_of_axes(("batch",), labels)
    in_axes = layout_of_axes(("in",), labels)
    out_axes = layout_of_axes(("out",), labels)
    n_batch = len(batch_axes)
    dtype = accumulation_dtype(base.dtype)

    # ‖W‖², in the order of the result.
    base_squares = jnp.sum(jnp.square(base.astype(dtype)), axis=in_axes)
    sum_axes = sorted((*batch_axes, *out_axes))
    order = [sum_axes.index(axis) for axis in (*batch_axes, *out_axes)]
    base_squares = lax.transpose(base_squares, order)  # [batch…, out…]

    # The two products with A, which contract its in axes.
    dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    a = a.astype(dtype)
    b = b.astype(dtype)
    a_in_axes = tuple(range(n_batch + 1, a.ndim))
    a_batch = tuple(range(n_batch))
    dims = ((a_in_axes, in_axes), (a_batch, batch_axes))
    cross = sum(
        dot(term, base, dims, preferred_element_type=dtype)
        for term in _split_into_terms(a, base.dtype)
    )  # AᵀW, [batch…, r, out…]
    gram = dot(a, a, ((a_in_axes, a_in_axes), (a_batch, a_batch)))  # AᵀA, [batch…, r, r]
    gram_b = dot(gram, b, (((n_batch + 1,), (n_batch,)), (a_batch, a_batch)))  # (AᵀA)B
    # 2s·Σ_r (AᵀW ⊙ B) + s²·Σ_r ((AᵀA)B ⊙ B)
    s = lax.expand_dims(scale.astype(dtype), range(n_batch, b.ndim))
    change = jnp.sum((2 * cross + s * gram_b) * s * b, axis=n_batch)
    return jnp.sqrt(jnp.maximum(base_squares + change, jnp.finfo(dtype).tiny))


def _split_into_terms(a: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """Returns arrays of W's dtype whose sum is A, so that W need not be cast for the product."""
    is_exact = jnp.dtype(dtype).itemsize >= a.dtype.itemsize
    if is_exact:
        return [a]
    rounded_a = a.astype(dtype)
    remainder = a - rounded_a.astype(a.dtype)
    return [rounded_a, remainder.astype(dtype)]


def _wider_dtype(u: jax.Array, gain: jax.Array) -> jnp.dtype:
    """Returns the dtype of a product of both, also where JAX does not promote dtypes by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(u.dtype, gain.dtype)


@jax.custom_jvp
def rescale_columns(u: jax.Array, gain: jax.Array) -> jax.Array:
    """Multiplies u by a gain, with broadcasting, in the wider dtype, and rounds to u's dtype.

    The derivative with respect to the gain is written with the result instead of u. The next
    operation usually keeps the result anyway, so that no other array is kept for the gain.
    """
    dtype = _wider_dtype(u, gain)
    return (u.astype(dtype) * gain.astype(dtype)).astype(u.dtype)


@rescale_columns.defjvp
def _rescaled_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the result y and its tangent, u̇·gain + y·(gain˙ / gain)."""
    u, gain = primals
    u_dot, gain_dot = tangents
    y = rescale_columns(u, gain)
    # y / gain is u, without a residual for u.
    inverse_gain = jnp.where(gain == 0, 0, 1 / gain).astype(gain.dtype)
    gain_term = y * (gain_dot * inverse_gain).astype(y.dtype)
    dtype = _wider_dtype(u, gain)
    u_term = (u_dot.astype(dtype) * gain.astype(dtype)).astype(y.dtype)
    return y, u_term + gain_term
