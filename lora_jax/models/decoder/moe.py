"""Mixtures of experts in place of an MLP: those of Mixtral, Qwen, and gpt-oss.

Each token goes through k experts only, so it costs k products, however many experts there are. The
module ``experts`` has the implementations that multiply the (token, expert) pairs.

The experts' kernels are stacked, [experts, in, out], and the router is a kernel like any other
([d_model, experts]). So "all-linear" adapts both, each expert with an A and a B of its own: in
transformers 4, whose names these are, both are ``nn.Linear`` layers, and PEFT's "all-linear" takes
them. ``LoraRule(exclude=["gate"])`` leaves the router as it is (``"router"`` in gpt-oss, whose
experts have one kernel for gate and up, whose outputs take turns, as in its files).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core.names import SAME_TOKENS, TOKENS
from lora_jax.models.decoder.blocks import MLP
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.dispatch import apply_part_of_experts
from lora_jax.models.decoder.experts import Experts, GatedActivation, implementation
from lora_jax.models.decoder.families.family import CORRECTION
from lora_jax.models.layers.attention import dot_wide, wide_dtype
from lora_jax.models.layers.blocks import ACTIVATION, ModelPart, dense
from lora_jax.models.layers.placement import Mixture


class SparseMLP(ModelPart):
    """The weighted sum of each token's k most likely experts (Jiang et al. 2024, Mixtral).

    The router's logits and probabilities, and the sum over experts, are in fp32. An MLP that all
    tokens share may stand beside the experts, and be weighed by a gate of its own.
    """

    config: DecoderConfig
    products: str | Experts = "auto"  # see ``experts.implementation``; "experts" are its parameters

    @nn.compact
    def __call__(
        self, x: jax.Array, routing: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Applies each token's experts.

        Args:
          x: [batch, seq, d_model].
          routing: [batch, seq, k] int, the experts of each token; -1 for the router's choice, and
            None for that of all tokens.

        Returns:
          [batch, seq, d_model], and the experts of each token, [batch, seq, k] int32.
        """
        cfg = self.config
        x = _round_to(x, x.dtype)
        logits = self._router_logits(x)
        if cfg.sigmoid_router:
            correction = self.param(
                CORRECTION,
                nn.initializers.zeros,
                (cfg.num_experts,),
                wide_dtype(self.param_dtype),
            )
            weights, chosen = route_by_sigmoids(logits, correction, cfg, routing)
        else:
            weights, chosen = route(logits, cfg.num_experts_per_tok, cfg.norm_topk_prob, routing)
        kernels, biases = _Experts(*self.options, name="experts")()
        products = implementation(self.products, self.placement)
        mixture = self.placement.mixture(make_mixture(make_gated_activation(cfg), products))
        out = mixture(checkpoint_name(x, TOKENS), weights, chosen, kernels, biases)
        out = checkpoint_name(out, SAME_TOKENS)
        if not cfg.shared_expert_intermediate_size:
            return out, chosen
        # An MLP that all tokens go through is added.
        shared_mlp = MLP(
            *self.options, inner=cfg.shared_expert_intermediate_size, name=cfg.family.shared_name
        )
        shared_out = shared_mlp(x)
        if not cfg.family.shared_is_gated:
            return out + shared_out, chosen
        gate = dense(self, 1, use_bias=False, name="shared_expert_gate")(x)
        return out + nn.sigmoid(gate) * shared_out, chosen

    @nn.nowrap
    def _router_logits(self, x: jax.Array) -> jax.Array:
        """Returns the router's logits, [batch, seq, experts] fp32."""
        cfg = self.config
        has_bias = cfg.expert_biases
        router = dense(
            self,
            cfg.num_experts,
            use_bias=has_bias,
            name=cfg.family.router_name,
            dot_general=dot_wide,
            dtype=wide_dtype(self.dtype) if has_bias else None,  # of product plus bias
        )
        logits: jax.Array = router(x)
        return logits


def make_gated_activation(config: DecoderConfig) -> GatedActivation:
    """Returns the gated activation of a model's experts."""
    limit = config.swiglu_limit
    activation = ACTIVATION[config.hidden_act]
    if limit is None:
        return lambda gate, up: activation(gate) * up

    def clamped_swiglu(gate_up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate_up[..., ::2], limit)
        up = jnp.clip(gate_up[..., 1::2], -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)

    return clamped_swiglu


def route(
    logits: jax.Array, k: int, normalise: bool, routing: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's k most likely experts, or given ones, with their weights.

    The weights of given experts are the router's probabilities, too, whose gradient flows through
    them (routing replay, Ma et al., arXiv 2510.11370).

    Args:
      logits: […, experts], fp32.
      k: the number of experts for a token.
      normalise: make each token's weights add up to 1.
      routing: […, k] int, given experts; -1 where there are none. None for none at all.

    Returns:
      The weights, […, k] fp32, and the experts, […, k] int32.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = lax.top_k(probs, k)
    if routing is not None:
        chosen = jnp.where(routing < 0, chosen, routing.astype(chosen.dtype))
        weights = jnp.take_along_axis(probs, chosen, axis=-1)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def route_by_sigmoids(
    logits: jax.Array,
    bias: jax.Array,
    config: DecoderConfig,
    routing: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses experts by sigmoids, biases and groups (DeepSeek-V3, section 2.1.2).

    Args:
      logits: […, experts], fp32.
      bias: [experts], fp32: it decides on the choice alone.
      config: the decoder's.
      routing: see ``route``.

    Returns:
      See ``route``.
    """
    scores = nn.sigmoid(logits)
    ranked = scores + bias.astype(scores.dtype)
    if config.topk_group < config.n_group:
        # A group's score is the sum of its two best; experts of other groups are ruled out.
        groups = ranked.reshape(*ranked.shape[:-1], config.n_group, -1)
        group_scores = jnp.sum(lax.top_k(groups, 2)[0], axis=-1)
        _, top_groups = lax.top_k(group_scores, config.topk_group)
        group_indices = jnp.arange(config.n_group, dtype=top_groups.dtype)
        is_top_group = jnp.any(top_groups[..., None] == group_indices, axis=-2)
        ranked = jnp.where(is_top_group[..., None], groups, -jnp.inf).reshape(ranked.shape)
    _, chosen = lax.top_k(ranked, config.num_experts_per_tok)
    if routing is not None:
        chosen = jnp.where(routing < 0, chosen, routing.astype(chosen.dtype))
    # The weights are the sigmoids without the biases.
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * config.routed_scaling_factor, chosen


def make_mixture(gated: GatedActivation, experts: Experts) -> Mixture:
    """Returns a mixture of experts with this activation and implementation."""
    return functools.partial(_apply_mixture, gated, experts)


def _apply_mixture(
    gated: GatedActivation,
    experts: Experts,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array],
    shares: int = 1,
) -> jax.Array:
    """Applies experts to their tokens; see ``placement.Mixture`` for the arguments."""
    d_model = x.shape[-1]
    k = weights.shape[-1]
    tokens = x.reshape(-1, d_model).astype(kernels[0].dtype)
    # The pairs lie [k, tokens]: a TPU pads the last two axes, and k is short.
    weights = weights.reshape(-1, k).T
    chosen = chosen.reshape(-1, k).T
    # A caller's own function of experts may have no parameter for biases.
    bias_option = {"biases": biases} if biases else {}
    if shares > 1:  # the kernels are one of several equal parts of all experts
        sums = apply_part_of_experts(
            experts, shares, gated, tokens, weights, chosen, *kernels, **bias_option
        )
    else:
        # Each token is a row for each of its k experts.
        rows = jnp.broadcast_to(tokens, (k, *tokens.shape)).reshape(-1, d_model)
        outs = experts(gated, rows, chosen.reshape(-1), *kernels, **bias_option)
        outs = outs.reshape(k, -1, outs.shape[-1]).astype(weights.dtype)  # [k, tokens, d_model]
        sums = (outs * weights[..., None]).sum(axis=0)
    return _round_to(sums.reshape(x.shape), x.dtype)


def _round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns x rounded to a dtype, also where the compiler would skip the rounding.

    XLA may leave out a rounding to bf16 between operations in fp32, in one program and not in
    another; the router of a sampler and that of a step would then see other numbers.
    """
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return x.astype(dtype)
    return lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant).astype(dtype)


class _Experts(ModelPart):
    """The kernels and biases of all experts; see ``experts.Experts``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        cfg = self.config
        kernels = []
        biases = []
        for name, shape in cfg.expert_shapes.items():
            stack_shape = (cfg.num_experts, *shape)
            kernel, bias = _Kernel(*self.options, shape=stack_shape, name=name)()
            kernels.append(kernel)
            if bias is not None:
                biases.append(bias)
        return tuple(kernels), tuple(biases)


class _Kernel(ModelPart):
    """The parameter ``kernel``, with a ``bias`` if experts have biases."""

    config: DecoderConfig
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, self.shape, self.param_dtype).astype(self.dtype)
        if not self.config.expert_biases:
            return kernel, None
        bias_shape = (self.shape[0], self.shape[-1])  # [experts, out]
        bias = self.param("bias", nn.initializers.zeros, bias_shape, self.param_dtype)
        return kernel, bias.astype(self.dtype)
