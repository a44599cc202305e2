"""Variants of LoRA that add a part to A and B: DoRA's magnitude, a bias on B; LoRA-XS and VeRA.

To add one, write a `lora_jax.Part` and give it to a rule, ``LoraRule(extras=[part], …)``.
This one trains a factor for each column of rank, s·A·diag(d)·B:

    def with_core(weight, node, d):                       # d [batch…, r]
        return weight.replace(a=weight.a * jnp.expand_dims(d, range(d.ndim, weight.a.ndim)))

    CORE = Part("core", ("batch", "rank"), lambda node: jnp.ones(node.shape_of("core")), with_core)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import along, as_array, is_base
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import column_norms
from lora_jax.core.parts import Axes
from lora_jax.core.weight import LoraWeight, Part


def _norms(node: LoraWeight, a: Any, b: Any) -> jax.Array:
    """Returns ‖W + s·AB‖ of each column, [batch…, out…].

    Of a stack that is no array, one layer's W is formed at a time.
    """
    if not is_base(node.base) or not node.n_batch:
        return column_norms(as_array(node.base), a, b, node.scale, node.labels)
    axis = node.labels.index("batch")
    labels = (*node.labels[:axis], *node.labels[axis + 1 :])

    def of_layer(layer: Any) -> jax.Array:
        index, a, b, scale = layer

        def picked(array: Any, axes: Axes) -> Any:
            if axis not in axes:
                return array
            return lax.dynamic_index_in_dim(array, index, axes.index(axis), keepdims=False)

        w = as_array(along(node.base, picked, [axis]))
        return column_norms(w, a, b, scale, labels)

    return lax.map(of_layer, (jnp.arange(node.shape[axis]), a, b, node.scale))


def _first_magnitude(node: LoraWeight) -> jax.Array:
    """Returns ‖W‖, or ‖W + s·AB‖ where AB starts elsewhere than at 0 and is not taken out of W."""
    a = node.a if node.start is None else jnp.zeros_like(node.a)
    return _norms(node, a, node.b)


def _rescaled(weight: Factored, node: LoraWeight, magnitude: Any) -> Factored:
    norms = jax.lax.stop_gradient(_norms(node, weight.a, weight.b))
    return weight.replace(gain=node.where_adapted(magnitude / norms, 1))


def _shifted(weight: Factored, node: LoraWeight, bias: Any) -> Factored:
    scale = jnp.expand_dims(weight.scale, range(node.n_batch, bias.ndim)).astype(bias.dtype)
    return weight.replace(shift=scale * bias)


# DoRA (Liu et al., arXiv 2402.09353): (W + s·AB)·diag(m / ‖W + s·AB‖), the norms held constant.
MAGNITUDE = Part("magnitude", ("batch", "out"), _first_magnitude, _rescaled)
# A bias on B (PEFT's ``lora_bias``): xW + s·((xA)B + c).
BIAS = Part(
    "bias", ("batch", "out"), lambda node: jnp.zeros(node.shape_of("bias"), node.b.dtype), _shifted
)


def _first_latent(node: LoraWeight, key: jax.Array) -> jax.Array:
    """Returns R ~ N(0, 1e-5²), zeros where a layer's rank is smaller than the largest."""
    r = 1e-5 * jax.random.normal(key, node.shape_of("latent"), node.b.dtype)
    return _unpadded(node, _unpadded(node, r, r.ndim - 1), r.ndim - 2)


def _unpadded(node: LoraWeight, array: jax.Array, axis: int) -> jax.Array:
    """Returns an array with zeros where an index of the rank is above a layer's own rank."""
    if len(set(node.ranks)) == 1:
        return array
    ranks = jnp.asarray(node.ranks, jnp.int32).reshape(-1, *[1] * (array.ndim - 1))
    columns = lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(columns < ranks, array, jnp.zeros_like(array))


def _first_d(node: LoraWeight) -> jax.Array:
    d = jnp.full(node.shape_of("lambda_d"), 0.1, node.arrays["shared_a"].dtype)
    return _unpadded(node, d, d.ndim - 1)


# LoRA-XS (Bałazy et al., arXiv 2405.17604): W + s·ARB, A = UΣ and B = Vᵀ of W's SVD, R trained.
LATENT = Part(
    "latent",
    ("batch", "rank", "rank"),
    _first_latent,
    lambda weight, _, r: weight.replace(latent=r),
    is_drawn=True,
)
# VeRA (Kopiczko et al., arXiv 2310.11454): W + s·A·diag(d)·B·diag(b), A and B one random pair.
LAMBDA_D = Part(
    "lambda_d", ("batch", "rank"), _first_d, lambda weight, _, d: weight.replace(pick=d)
)
LAMBDA_B = Part(
    "lambda_b",
    ("batch", "out"),
    lambda node: jnp.zeros(node.shape_of("lambda_b"), node.arrays["shared_b"].dtype),
    lambda weight, _, b: weight.replace(columns=b),
)
PARTS = {part.name: part for part in (MAGNITUDE, BIAS, LATENT, LAMBDA_D, LAMBDA_B)}
