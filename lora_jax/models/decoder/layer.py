"""One decoder layer: norms, attention or a linear mixer, and an MLP or experts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.decoder.blocks import MLP, RMSNorm, multiply, rms_norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts
from lora_jax.models.decoder.gemma4 import (
    KeptKeys,
    add_input,
    normalise_values,
    pack,
    scale_output,
    unpack,
    unpack_cache,
)
from lora_jax.models.decoder.linear import GatedDeltaNet
from lora_jax.models.decoder.moe import SparseMLP
from lora_jax.models.decoder.rope import RopeAngles, rotate
from lora_jax.models.decoder.runs import LayerKind
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blocks import ModelPart, attend_heads, dense
from lora_jax.models.layers.cache import LayerCache, NewEntries, Recurrent
from lora_jax.models.layers.delta import RecurrentTokens
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import layer_input, projected

# Of the norms of latent vectors (MLA), whatever the configuration says of other norms.
_LATENT_EPS = 1e-6


class Step(NamedTuple):
    """The input that all layers share in one call.

    Attributes:
      rope: RoPE's rotations of this call's tokens.
      other_rope: rotations in layers that are rotated apart; None if all layers use ``rope``.
      mask: the keys that each token may see in layers without a sliding window.
      filled: [] int32, the number of the cache's slots in use.
      tokens: padding and segments, for linear layers.
      cache: keys and values so far of all layers, where these are several runs; otherwise None, and
        each layer has its own.
      kept: keys and values for layers that have none of their own: of a layer with a window, and of
        one without; None in other runs.
    """

    rope: RopeAngles
    other_rope: RopeAngles | None
    mask: Mask
    filled: jax.Array
    tokens: RecurrentTokens
    cache: LayerCache | None = None
    kept: tuple[KeptKeys, ...] | None = None


class PerLayer(NamedTuple):
    """The input of one layer; stacked on axis 0 for the scan.

    Attributes:
      windowed: [] bool, True if this layer uses the sliding window.
      apart: [] bool, True if this layer is rotated apart.
      cache: this layer's keys and values so far; None without a cache.
      recurrent: what this layer remembers, if it is linear and there is a cache.
      number: [] int32, the layer's index in ``Step.cache``.
      inputs: [batch, seq, size], the layer's input of its own; None without one.
      routing: [batch, seq, k] int, the experts of each token, -1 for the router's choice; None
        where nobody gives or asks for them.
    """

    windowed: jax.Array
    apart: jax.Array
    cache: LayerCache | None
    recurrent: Recurrent | None
    number: jax.Array | None = None
    inputs: jax.Array | None = None
    routing: jax.Array | None = None


class Attention(ModelPart):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and RoPE."""

    config: DecoderConfig
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(self, x: jax.Array, step: Step, layer: PerLayer) -> tuple[jax.Array, NewEntries]:
        """Mixes each token with those that it sees.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layer: this layer's own input.

        Returns:
          [batch, seq, d_model], and this call's keys and values, for the cache:
          each [batch, seq, kv_heads, head_dim]; None for a layer that takes those of another.
        """
        cfg, cache = self.config, layer.cache
        rope = self._angles(step, layer)
        gate: list[jax.Array] = []
        if cfg.kv_lora_rank:
            q, k, v = project_latent(self, x, rope)
        elif step.kept is not None:
            (q,), kept = self._project(x), step.kept[self.kind.whole]
            k, v = (unpack(part, cfg, self.kind) for part in kept.new)
            q, cache = rotate(q, rope), kept.cache
        else:
            q, k, v, *gate = self._project(x)
            q, k = rotate(q, rope), rotate(k, rope)
            if not self._has_work_between:
                q, k, v = (projected(part, self.remat) for part in (q, k, v))
        if rope.queries is not None:
            q = q * rope.queries.astype(q.dtype)
        new: NewEntries = None if self.kind.reuses else (k, v)
        windowed, layers = len(cfg.windowed_layers), cfg.num_hidden_layers
        some = 0 < windowed < layers
        if cfg.global_head_dim:  # known for each stack
            windowed, layers, some = int(not self.kind.whole), 1, False
            cache = unpack_cache(cache, cfg, self.kind)
            new = new and tuple(pack(part, cfg) for part in new)
        window = cfg.sliding_window if windowed else None
        mask = step.mask.within(window, layer.windowed if some else None)
        sinks = None
        if cfg.sinks:
            init = nn.initializers.normal(cfg.initializer_range)
            sinks = self.param("sinks", init, (cfg.num_attention_heads,), self.param_dtype)
        # All layers are one program; the name tells a plan how many of them have the window.
        named = some or (cfg.global_head_dim and windowed)
        with jax.named_scope(f"windowed_{windowed}_of_{layers}" if named else "attention"):
            options = (cfg.score_scale, cfg.attn_logit_softcapping, sinks)
            inputs = AttentionInputs(q, k, v, mask, *options)
            out = attend_heads(self, inputs, cache, step.filled)
        if cfg.kv_lora_rank:
            out = take_values(self, out)
        if gate:
            out = out * nn.sigmoid(gate[0].reshape(out.shape))
        return dense(self, cfg.hidden_size, use_bias=cfg.o_bias, name="o_proj")(out), new

    @property
    def _has_work_between(self) -> bool:
        """Returns True if derivatives of what stands between projections and RoPE need its input.

        RoPE's own do not: its result is then kept in the place of the projection's.
        """
        cfg = self.config
        return bool(cfg.qk_norm or cfg.value_norm or cfg.attn_output_gate or self.kind.reuses)

    def _angles(self, step: Step, layer: PerLayer) -> RopeAngles:
        if self.config.global_head_dim and step.other_rope is not None:
            return step.rope if self.kind.whole else step.other_rope
        return _choose_angles(layer.apart, step.other_rope, step.rope)

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Returns queries, keys and values, normalised: [batch, seq, heads, head_dim] each.

        Behind them stand the gates of the outputs, as queries, if there are any. A layer that takes
        keys and values of another has queries alone.
        """
        cfg = self.config
        kv_heads, head_dim = cfg.heads_of(self.kind)
        shares = cfg.attention_k_eq_v and self.kind.whole
        own = "" if self.kind.reuses else "k" if shares else "kv"
        heads = {"q": cfg.num_attention_heads} | dict.fromkeys(own, kv_heads)
        sizes = [n * head_dim for n in heads.values()]
        sizes[0] *= 1 + cfg.attn_output_gate
        if cfg.fused_projections:
            fused = dense(self, sum(sizes), use_bias=cfg.qkv_bias, name="qkv_proj")(x)
            flat = jnp.split(fused, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            flat = [
                dense(self, size, use_bias=cfg.qkv_bias, name=f"{name}_proj")(x)
                for name, size in zip(heads, sizes, strict=True)
            ]
        if self._has_work_between:
            flat = [projected(part, self.remat) for part in flat]
        names = ("q_norm", "k_norm")
        if cfg.qk_norm and cfg.qk_norm_joins_heads:
            flat[:2] = [rms_norm(self, name)(part) for name, part in zip(names, flat, strict=False)]
        parts = [
            self.placement.constrain(part.reshape(*x.shape[:2], n, -1), "heads")
            for part, n in zip(flat, heads.values(), strict=True)
        ]
        if cfg.attn_output_gate:
            parts[:1] = jnp.split(parts[0], 2, axis=-1)
            parts.append(parts.pop(1))
        if shares and own:
            parts.append(parts[1])
        if cfg.value_norm and own:
            parts[2] = normalise_values(parts[2], cfg.rms_norm_eps)
        if cfg.qk_norm and not cfg.qk_norm_joins_heads:
            parts[:2] = [
                rms_norm(self, name)(part) for name, part in zip(names, parts, strict=False)
            ]
        return parts


class DecoderLayer(ModelPart):
    """Attention and MLP, each after a norm, before one, or both, added to the stream."""

    config: DecoderConfig
    experts: str | Experts = "auto"
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layer: PerLayer
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs a scan's body: x is the carry, [batch, seq, d_model]; see ``Attention``.

        Returns:
          The carry; and the entries for the cache, with the experts of each token where
          ``layer.routing`` is given.
        """
        cfg, x = self.config, layer_input(x, self.remat)
        if step.cache is not None:
            take = functools.partial(
                jax.lax.dynamic_index_in_dim, index=layer.number, keepdims=False
            )
            layer = layer._replace(cache=jax.tree.map(take, step.cache))
        if self.kind.sparse:
            mlp: nn.Module = SparseMLP(
                *self.options, products=self.experts, name=cfg.family.mlp_name
            )
        else:
            wide = self.kind.reuses and cfg.use_double_wide_mlp
            inner = cfg.intermediate_size * (1 + wide)
            mlp = MLP(*self.options, inner=inner, name=cfg.family.mlp_name)

        before, after = ["input_layernorm", "post_attention_layernorm"], ["", ""]
        if cfg.post_norms:
            after = ["post_attention_layernorm", "post_feedforward_layernorm"]
            before[1] = "pre_feedforward_layernorm"

        def inputs(i: int, x: jax.Array) -> jax.Array:
            return self.placement.constrain(
                rms_norm(self, before[i])(x) if cfg.pre_norms else x, "inputs"
            )

        def added(i: int, x: jax.Array, part: jax.Array) -> jax.Array:
            part = rms_norm(self, after[i])(part) if cfg.post_norms else part
            return x + multiply(part, cfg.residual_multiplier)

        new: NewEntries
        if self.kind.linear:
            mixer = GatedDeltaNet(*self.options, name="linear_attn")
            hidden, new = mixer(inputs(0, x), step.tokens, layer.recurrent)
        else:
            attention = Attention(*self.options, kind=self.kind, name="self_attn")
            hidden, new = attention(inputs(0, x), step, layer)
            new = None if layer.cache is None and not cfg.num_kv_shared_layers else new
        x = added(0, x, projected(hidden, self.remat))
        routing = None if layer.routing is None else layer.routing.astype(jnp.int32)
        if self.kind.sparse:
            hidden, routing = mlp(inputs(1, x), layer.routing)
        else:
            hidden = mlp(inputs(1, x))
        x = added(1, x, hidden)
        if layer.inputs is not None:
            x = add_input(self, x, layer.inputs)
        if cfg.layer_scalars:
            x = scale_output(self, x)
        x = self.placement.constrain(x, "residual")
        return x, (new, None if layer.routing is None else routing)


def _choose_angles(apart: jax.Array, other: RopeAngles | None, usual: RopeAngles) -> RopeAngles:
    """Chooses a layer's rotation; no other: no difference."""
    if other is None:
        return usual
    chosen: RopeAngles = jax.tree.map(functools.partial(jnp.where, apart), other, usual)
    return chosen


def project_latent(
    module: ModelPart, x: jax.Array, rope: RopeAngles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, keys and values, [batch, seq, heads, head_dim] each, rotated.

    They come from vectors that all heads share: MLA of DeepSeek-V2 (2024, section 2.1) and later.
    Keys and values are expanded for every head, as in training: a cache holds them like any other
    model's, [heads, tokens, head_dim], and values filled up with zeros to the size of keys.

    Args:
      module: the attention that has the projections, in its compact method.
      x: [batch, seq, d_model].
      rope: the rotation of its tokens.
    """
    cfg: DecoderConfig = module.config
    plain, heads = cfg.qk_nope_head_dim, cfg.num_attention_heads

    def product(x: jax.Array, name: str, size: int, *, use_bias: bool = False) -> jax.Array:
        return projected(dense(module, size, use_bias=use_bias, name=name)(x), module.remat)

    def split_heads(x: jax.Array) -> jax.Array:
        return module.placement.constrain(x.reshape(*x.shape[:2], heads, -1), "heads")

    def norm(x: jax.Array, name: str) -> jax.Array:
        return RMSNorm(_LATENT_EPS, module.dtype, module.param_dtype, name=name)(x)

    def turn(x: jax.Array) -> jax.Array:
        return rotate(x, rope, neighbours=cfg.rope_interleave)

    if cfg.q_lora_rank is None:
        q = product(x, "q_proj", heads * cfg.head_dim)
    else:
        q = product(x, "q_a_proj", cfg.q_lora_rank, use_bias=cfg.qkv_bias)
        q = product(norm(q, "q_a_layernorm"), "q_b_proj", heads * cfg.head_dim)
    q_plain, q_turned = jnp.split(split_heads(q), [plain], axis=-1)
    size = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    joined = product(x, "kv_a_proj_with_mqa", size, use_bias=cfg.qkv_bias)
    shared, k_turned = jnp.split(joined, [cfg.kv_lora_rank], axis=-1)
    size = heads * (plain + cfg.v_head_dim)
    expanded = split_heads(product(norm(shared, "kv_a_layernorm"), "kv_b_proj", size))
    k_plain, v = jnp.split(expanded, [plain], axis=-1)
    k_turned = jnp.broadcast_to(
        turn(k_turned[:, :, None]), (*k_plain.shape[:-1], cfg.qk_rope_head_dim)
    )
    q = jnp.concatenate([q_plain, turn(q_turned)], axis=-1)
    k = jnp.concatenate([k_plain, k_turned], axis=-1)
    return q, k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, cfg.head_dim - cfg.v_head_dim)))


def take_values(module: ModelPart, out: jax.Array) -> jax.Array:
    """Returns attention's output without what fills values up: [batch, seq, heads * v_head_dim]."""
    cfg: DecoderConfig = module.config
    heads = out.reshape(*out.shape[:2], cfg.num_attention_heads, -1)[..., : cfg.v_head_dim]
    return module.placement.constrain(heads.reshape(*out.shape[:2], -1), "features")
