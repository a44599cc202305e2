"""A mixture of experts in the place of an MLP: Mixtral's and Qwen3-MoE's.

Each token goes through k experts only. The (token, expert) pairs are sorted by expert, so that the
tokens of each expert lie together, and ``jax.lax.ragged_dot`` multiplies each group by its own
kernel: k products a token, however many experts there are. (That holds where the compiler knows
products of groups, as on TPU. On CPU, JAX lowers ``ragged_dot`` to a masked product of all tokens
with every expert's kernel: right, but with the cost of them all.)

The experts' kernels are stacked, [experts, in, out], and the router is a kernel like any other
([d_model, experts]). So "all-linear" adapts both, each expert with an A and a B of its own: in
transformers 4, whose names these are, both are ``nn.Linear`` layers, and PEFT's "all-linear" takes
them. ``LoraRule(exclude=["gate"])`` leaves the router as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lora_jax.models.activations import ACTIVATION
from lora_jax.models.attention import dot_wide
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder_blocks import dense


class SparseMLP(nn.Module):
    """The weighted sum of each token's k most likely experts (Jiang et al. 2024, Mixtral).

    The router's logits and probabilities, and the sum over experts, are in fp32.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, seq, d_model] -> the same."""
        cfg = self.config
        k, width = cfg.num_experts_per_tok, x.shape[-1]
        tokens = x.reshape(-1, width)
        router = dense(self, "gate", cfg.num_experts, False, dot_general=dot_wide)
        weights, chosen = route(router(tokens), k, cfg.norm_topk_prob)
        chosen = chosen.reshape(-1)  # [tokens * k]
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=cfg.num_experts).astype(jnp.int32)
        # Repeated and then permuted: both have derivatives that add in a fixed order.
        rows = jnp.repeat(tokens, k, axis=0).at[order].get(unique_indices=True)
        args = (cfg, self.dtype, self.param_dtype)
        out = _Experts(*args, name="experts")(rows, sizes)
        out = out.at[jnp.argsort(order)].get(unique_indices=True)  # in the order of tokens again
        out = out.reshape(-1, k, width).astype(weights.dtype) * weights[..., None]
        return out.sum(axis=1).astype(x.dtype).reshape(x.shape)


def route(logits: jax.Array, k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Each token's k most likely experts, and their weights.

    Args:
      logits: [tokens, experts], fp32.
      k: how many experts a token has.
      normalise: make each token's weights add up to 1.

    Returns:
      The weights, [tokens, k] fp32, and the experts, [tokens, k] int32.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = lax.top_k(probs, k)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


class _Experts(nn.Module):
    """Gated MLPs, each applied to its own group of tokens."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """[tokens, d_model], sorted by expert, and how many tokens each expert has: [experts]."""
        cfg = self.config

        def grouped(name: str, features: int) -> _GroupedDense:
            return _GroupedDense(features, cfg, self.dtype, self.param_dtype, name=name)

        gate, up, down = cfg.expert_names
        hidden = ACTIVATION[cfg.hidden_act](grouped(gate, cfg.moe_intermediate_size)(x, sizes))
        hidden = hidden * grouped(up, cfg.moe_intermediate_size)(x, sizes)
        return grouped(down, cfg.hidden_size)(hidden, sizes)


class _GroupedDense(nn.Module):
    """x W_e for the tokens of each expert e."""

    features: int
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.num_experts, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        return lax.ragged_dot(x.astype(self.dtype), kernel.astype(self.dtype), sizes)
