"""A mixture of experts in the place of an MLP: Mixtral's and Qwen3-MoE's.

Each token goes through k experts only. The (token, expert) pairs are laid out in blocks of equal
size, each of one expert, filled up with zeros; a scan takes the blocks one by one through their
expert's kernels. So a token costs k products, however many experts there are, and at most a block
more for each expert. (``jax.lax.ragged_dot`` would be the instruction for it; late in 2026 it
becomes a masked product of all tokens with every expert's kernel, on CPU and, by the TPU compiler,
for v5e.)

The experts' kernels are stacked, [experts, in, out], and the router is a kernel like any other
([d_model, experts]). So "all-linear" adapts both, each expert with an A and a B of its own: in
transformers 4, whose names these are, both are ``nn.Linear`` layers, and PEFT's "all-linear" takes
them. ``LoraRule(exclude=["gate"])`` leaves the router as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lora_jax.models.decoder.blocks import dense
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.layers.activations import ACTIVATION
from lora_jax.models.layers.attention import dot_wide
from lora_jax.models.layers.placement import UNPLACED, Placement


class SparseMLP(nn.Module):
    """The weighted sum of each token's k most likely experts (Jiang et al. 2024, Mixtral).

    The router's logits and probabilities, and the sum over experts, are in fp32.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    placement: Placement = UNPLACED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Sends tokens, [batch, seq, d_model], through their experts; returns the same shape."""
        cfg = self.config
        router = dense(self, "gate", cfg.num_experts, False, dot_general=dot_wide)
        weights, chosen = route(router(x), cfg.num_experts_per_tok, cfg.norm_topk_prob)
        kernels = _Experts(cfg, self.dtype, self.param_dtype, name="experts")()
        mixed = self.placement.mixture(functools.partial(_mixed, ACTIVATION[cfg.hidden_act]))
        return mixed(x, weights, chosen, *kernels)


def route(logits: jax.Array, k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's k most likely experts, and weighs them.

    Args:
      logits: […, experts], fp32.
      k: the number of experts for a token.
      normalise: make each token's weights add up to 1.

    Returns:
      The weights, […, k] fp32, and the experts, […, k] int32.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = lax.top_k(probs, k)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def _mixed(
    act: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """Applies gated MLPs, each to its own tokens; see ``placement.Mixture`` for the shapes."""
    width, k = x.shape[-1], weights.shape[-1]
    blocks = _blocks(chosen.reshape(-1), gate.shape[0])
    rows = jnp.repeat(x.reshape(-1, width), k, axis=0).astype(gate.dtype)  # [tokens * k, d_model]

    def through(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        rows, expert = block
        of_gate, of_up, of_down = (
            lax.dynamic_index_in_dim(kernel, expert, keepdims=False) for kernel in (gate, up, down)
        )
        return None, (act(rows @ of_gate) * (rows @ of_up)) @ of_down

    # No slot is written or read twice: both have derivatives that add in a fixed order.
    filled = jnp.zeros((blocks.experts.size * blocks.rows, width), rows.dtype)
    filled = filled.at[blocks.slots].set(rows, unique_indices=True)
    filled = filled.reshape(-1, blocks.rows, width)
    # The kernels of each block are taken again in the backward pass, not kept for all blocks.
    kept = jax.checkpoint_policies.dots_saveable
    body = jax.checkpoint(through, policy=kept, prevent_cse=False)
    _, out = lax.scan(body, None, (filled, blocks.experts))
    out = out.reshape(-1, out.shape[-1]).at[blocks.slots].get(unique_indices=True)
    out = out.reshape(*x.shape[:2], k, -1).astype(weights.dtype) * weights[..., None]
    return out.sum(axis=2).astype(x.dtype)


class _Blocks(NamedTuple):
    """The places of the (token, expert) pairs.

    Attributes:
      rows: the number of rows of a block.
      experts: [blocks] int32, each block's expert.
      slots: [pairs] int32, the row of each pair, counted over all blocks.
    """

    rows: int
    experts: jax.Array
    slots: jax.Array


def _blocks(chosen: jax.Array, n_experts: int) -> _Blocks:
    """Lays out blocks for pairs with these experts, [pairs] int32.

    About two for each expert's share, and no more rows than keep a matrix unit busy.
    """
    n = chosen.size
    rows = min(256, max(8, n // (2 * n_experts) // 8 * 8))
    n_blocks = n // rows + min(n_experts, n)  # as many as any choice needs: the shape is fixed
    sizes = jnp.bincount(chosen, length=n_experts)
    blocks_until = jnp.cumsum(-(-sizes // rows))  # of this expert and those before it
    places = jnp.argsort(jnp.argsort(chosen))  # of each pair, in the order of experts
    within = places - (jnp.cumsum(sizes) - sizes)[chosen]  # its expert's pairs
    before = (blocks_until - -(-sizes // rows))[chosen]
    experts = jnp.searchsorted(blocks_until, jnp.arange(n_blocks), side="right")
    experts = jnp.minimum(experts, n_experts - 1)  # of blocks that are left over
    return _Blocks(rows, experts.astype(jnp.int32), (before * rows + within).astype(jnp.int32))


class _Experts(nn.Module):
    """The kernels of all experts: [experts, d_model, d_ff] twice, and [experts, d_ff, d_model]."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self) -> list[jax.Array]:
        cfg = self.config
        inner, outer = cfg.moe_intermediate_size, cfg.hidden_size
        return [
            _Kernel((cfg.num_experts, *shape), cfg, self.dtype, self.param_dtype, name=name)()
            for name, shape in zip(
                cfg.expert_names, [(outer, inner), (outer, inner), (inner, outer)], strict=True
            )
        ]


class _Kernel(nn.Module):
    """The parameter ``kernel``."""

    shape: tuple[int, ...]
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return self.param("kernel", init, self.shape, self.param_dtype).astype(self.dtype)
