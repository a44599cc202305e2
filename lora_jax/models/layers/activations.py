"""Activation functions, under Hugging Face's names."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

_EXACT_GELU = functools.partial(nn.gelu, approximate=False)
_TANH_GELU = functools.partial(nn.gelu, approximate=True)

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _EXACT_GELU,
    "gelu_python": _EXACT_GELU,
    "gelu_10": lambda x: jnp.clip(_EXACT_GELU(x), -10, 10),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "tanh": nn.tanh,
}


def activate(name: str, x: jax.Array, up: jax.Array | None = None) -> jax.Array:
    """Returns act(x), or act(x) * up: the element-wise part of an MLP.

    Only x and up are kept for the backward pass, which computes the rest again. Otherwise a layer
    with SiLU keeps six arrays of this size instead of three, and on CPU filling and reading them
    costs more than the arithmetic (tests/models/test_copies.py counts the arrays).

    Args:
      name: a key of ``ACTIVATION``.
      x: any shape, the gate where there is ``up``.
      up: as x.
    """

    def act(x: jax.Array, up: jax.Array | None) -> jax.Array:
        y = ACTIVATION[name](x)
        return y if up is None else y * up

    # Layers are scanned: nothing can be merged with the forward pass, and a barrier would cost.
    y: jax.Array = jax.checkpoint(act, prevent_cse=False)(x, up)
    return y
