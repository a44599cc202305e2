"""One decoder layer: RMSNorm, grouped-query attention, gated MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lora_jax.models.activations import ACTIVATION
from lora_jax.models.attention import attend
from lora_jax.models.config import DecoderConfig
from lora_jax.models.rope import rotate


class Step(NamedTuple):
    """What all layers share in one call.

    Attributes:
      cos, sin: [batch, seq, 1, head_dim / 2] fp32, RoPE's rotations.
      mask: [batch, 1, seq, keys] bool, True where a query may look.
      window_mask: the same within the sliding window; None where all layers use ``mask``.
      filled: [] int32, how many of the cache's slots are in use; None without a cache.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array
    window_mask: jax.Array | None
    filled: jax.Array | None


class PerLayer(NamedTuple):
    """What differs from layer to layer; stacked on axis 0 for the scan.

    Attributes:
      windowed: [] bool, whether this layer uses the sliding window.
      key, value: [batch, max_len, kv_heads, head_dim], the layer's cache; None without one.
    """

    windowed: jax.Array
    key: jax.Array | None
    value: jax.Array | None


class RMSNorm(nn.Module):
    """x / rms(x) * scale, normalised in fp32 (Zhang and Sennrich 2019)."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and RoPE."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layer: PerLayer
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends.

        Args:
          x: [batch, seq, d_model].
          step: what all layers share.
          layer: what is this layer's own.

        Returns:
          [batch, seq, d_model], and this call's keys and values, for the cache:
          each [batch, seq, kv_heads, head_dim].
        """
        cfg = self.config
        dense = functools.partial(_dense, self)
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        q = self._heads(dense("q_proj", heads * cfg.head_dim, cfg.qkv_bias)(x), heads)
        k = self._heads(dense("k_proj", kv_heads * cfg.head_dim, cfg.qkv_bias)(x), kv_heads)
        v = self._heads(dense("v_proj", kv_heads * cfg.head_dim, cfg.qkv_bias)(x), kv_heads)
        if cfg.qk_norm:
            q = _norm(self, "q_norm")(q)
            k = _norm(self, "k_norm")(k)
        q = rotate(q, step.cos, step.sin)
        k = rotate(k, step.cos, step.sin)

        keys, values = k, v
        if layer.key is not None and layer.value is not None and step.filled is not None:
            start = (0, step.filled, 0, 0)
            keys = lax.dynamic_update_slice(layer.key, k.astype(layer.key.dtype), start)
            values = lax.dynamic_update_slice(layer.value, v.astype(layer.value.dtype), start)
        mask = step.mask
        if step.window_mask is not None:
            mask = jnp.where(layer.windowed, step.window_mask, mask)
        out = attend(q, keys.astype(q.dtype), values.astype(q.dtype), mask)
        out = out.reshape(*x.shape[:2], heads * cfg.head_dim)
        return dense("o_proj", cfg.hidden_size, cfg.o_bias)(out), (k, v)

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.config.head_dim)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        gate = _dense(self, "gate_proj", cfg.intermediate_size, cfg.mlp_bias)(x)
        up = _dense(self, "up_proj", cfg.intermediate_size, cfg.mlp_bias)(x)
        hidden = ACTIVATION[cfg.hidden_act](gate) * up
        return _dense(self, "down_proj", cfg.hidden_size, cfg.mlp_bias)(hidden)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    constrain: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layer: PerLayer
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """A scan's body: x is the carry, [batch, seq, d_model]; see ``Attention`` for the rest."""
        args = (self.config, self.dtype, self.param_dtype)
        hidden, cached = Attention(*args, name="self_attn")(
            _norm(self, "input_layernorm")(x), step, layer
        )
        x = x + hidden
        x = x + MLP(*args, name="mlp")(_norm(self, "post_attention_layernorm")(x))
        if self.constrain is not None:
            x = self.constrain(x)
        return x, None if layer.key is None else cached


def _dense(module: Any, name: str, features: int, use_bias: bool) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        name=name,
    )


def _norm(module: Any, name: str) -> RMSNorm:
    return RMSNorm(module.config.rms_norm_eps, module.dtype, module.param_dtype, name=name)
