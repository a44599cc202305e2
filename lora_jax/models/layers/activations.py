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
