"""The parts of models, and their dense layers, LayerNorms and embeddings.

Each function makes a layer for ``module``, with its dtypes and its configuration's options.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from lora_jax.models.layers.attend import Attend
from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.placement import UNPLACED, Placement


class ModelPart(nn.Module):
    """A model or a part of one.

    Attributes: see ``Decoder``.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool | str = False
    placement: Placement = UNPLACED
    attention: str | Attend = "auto"

    @property
    def options(self) -> tuple[Any, Any, Any, bool | str, Placement, str | Attend]:
        """The attributes above, for a part of this one."""
        dtypes = (self.dtype, self.param_dtype)
        return (self.config, *dtypes, self.remat, self.placement, self.attention)


def dense(module: Any, features: int, *, dtype: DTypeLike | None = None, **kwargs: Any) -> nn.Dense:
    """Makes xW + b, W drawn with the configuration's initializer_range."""
    return nn.Dense(
        features,
        dtype=module.dtype if dtype is None else dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        **kwargs,
    )


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, in fp32 (Ba et al. 2016)."""

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        dtype = wide_dtype(self.dtype)
        x = x.astype(dtype)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(dtype) + bias.astype(dtype)).astype(self.dtype)


def layer_norm(module: Any, **kwargs: Any) -> LayerNorm:
    """Makes a LayerNorm with the configuration's epsilon."""
    return LayerNorm(module.config.layer_norm_eps, module.dtype, module.param_dtype, **kwargs)


def embed(module: Any, rows: int, **kwargs: Any) -> nn.Embed:
    """Makes a table of ``rows`` vectors as wide as the model."""
    return nn.Embed(
        rows,
        module.config.hidden_size,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        embedding_init=nn.initializers.normal(module.config.initializer_range),
        **kwargs,
    )
