"""One decoder layer: norms, attention or a linear token mixer, and an MLP or experts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.decoder.blocks import MLP, RMSNorm, multiply, rms_norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts
from lora_jax.models.decoder.gemma4 import (
    ReusedKeys,
    add_layer_input,
    normalise_values,
    pack_heads,
    scale_output,
    unpack_cache,
    unpack_heads,
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
from lora_jax.models.layers.trunk import name_layer_input, name_projection

# Epsilon of the norms of latent vectors (MLA), whatever the configuration says of other norms.
_LATENT_EPS = 1e-6


class SharedLayerInput(NamedTuple):
    """The input that all layers share in one call.

    Attributes:
      rope: RoPE's rotations of this call's tokens.
      other_rope: rotations in layers that are rotated apart; None if all layers use ``rope``.
      mask: the keys that each token may see in layers without a sliding window.
      filled: [] int32, the number of the cache's slots in use.
      tokens: padding and segments, for linear layers.
      cache: keys and values so far of all layers, where these are several runs; otherwise None, and
        each layer has its own.
      reused_keys: keys and values for layers that have none of their own: of a layer with a
        window, and of one without; None in other runs.
    """

    rope: RopeAngles
    other_rope: RopeAngles | None
    mask: Mask
    filled: jax.Array
    tokens: RecurrentTokens
    cache: LayerCache | None = None
    reused_keys: tuple[ReusedKeys, ...] | None = None


class SingleLayerInput(NamedTuple):
    """The input of one layer, stacked on axis 0 for the scan.

    Attributes:
      windowed: [] bool, True if this layer uses the sliding window.
      is_rotated_apart: [] bool, True if this layer is rotated apart.
      cache: this layer's keys and values so far; None without a cache.
      recurrent: what this layer remembers, if it is linear and there is a cache.
      layer_index: [] int32, the layer's index in ``SharedLayerInput.cache``.
      inputs: [batch, seq, size], the layer's input of its own; None without one.
      routing: [batch, seq, k] int, the experts of each token, -1 for the router's choice; None
        where nobody gives or asks for them.
    """

    windowed: jax.Array
    is_rotated_apart: jax.Array
    cache: LayerCache | None
    recurrent: Recurrent | None
    layer_index: jax.Array | None = None
    inputs: jax.Array | None = None
    routing: jax.Array | None = None


class Attention(ModelPart):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and RoPE."""

    config: DecoderConfig
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self, x: jax.Array, step: SharedLayerInput, layer: SingleLayerInput
    ) -> tuple[jax.Array, NewEntries]:
        """Applies attention to the tokens.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layer: this layer's own input.

        Returns:
          [batch, seq, d_model], and this call's keys and values, for the cache:
          each [batch, seq, kv_heads, head_dim]; None for a layer that takes those of another.
        """
        cfg = self.config
        cache = layer.cache
        rope = self._angles(step, layer)
        gate = None
        if cfg.kv_lora_rank:
            q, k, v = project_latent(self, x, rope)
        elif (
            step.reused_keys is not None
        ):  # keys and values of an earlier layer, in a cache's layout
            reused_keys = step.reused_keys[self.kind.has_global_heads]
            cache = reused_keys.cache
            q = rotate(self._project(x)["q"], rope)
            k, v = (unpack_heads(heads, cfg, self.kind) for heads in reused_keys.new)
        else:  # the layer's own queries, keys and values
            projections = self._project(x)
            gate = projections.get("gate")
            q = rotate(projections["q"], rope)
            k = rotate(projections["k"], rope)
            v = projections["v"]
            if not self._keeps_projections:
                q, k, v = (name_projection(heads, self.remat) for heads in (q, k, v))
        if rope.queries is not None:
            q = q * rope.queries.astype(q.dtype)
        # A cache stores the layer's keys and values; Gemma 4's are packed into heads of one size.
        entries: NewEntries = None if self.kind.reuses_keys else (k, v)
        if cfg.global_head_dim:
            cache = unpack_cache(cache, cfg, self.kind)
            entries = entries and tuple(pack_heads(heads, cfg) for heads in entries)
        mask, scope = self._mask_and_scope(step.mask, layer.windowed)
        sinks = None
        if cfg.sinks:
            init = nn.initializers.normal(cfg.initializer_range)
            sinks = self.param("sinks", init, (cfg.num_attention_heads,), self.param_dtype)
        inputs = AttentionInputs(
            q=q,
            k=k,
            v=v,
            mask=mask,
            scale=cfg.score_scale,
            cap=cfg.attn_logit_softcapping,
            sinks=sinks,
        )
        with jax.named_scope(scope):
            out = attend_heads(self, inputs, cache, step.filled)  # [batch, seq, heads * head_dim]
        if cfg.kv_lora_rank:
            out = remove_value_padding(self, out)
        if gate is not None:
            out = out * nn.sigmoid(gate.reshape(out.shape))
        return dense(self, cfg.hidden_size, use_bias=cfg.o_bias, name="o_proj")(out), entries

    @nn.nowrap  # adds no scope of its own to the program
    def _mask_and_scope(self, mask: Mask, windowed: jax.Array) -> tuple[Mask, str]:
        """Returns the layer's mask, and a scope name by which plans count windows.

        Layers of a stack are one program, which is given whether the layer is ``windowed``, unless
        all of its layers have the window, or none.
        """
        cfg = self.config
        if cfg.global_head_dim:  # a stack has only layers with the window, or only layers without
            if self.kind.has_global_heads:
                return mask.within(None), "attention"
            return mask.within(cfg.sliding_window), "windowed_1_of_1"
        n_windowed = len(cfg.windowed_layers)
        if n_windowed in (0, cfg.num_hidden_layers):
            return mask.within(cfg.sliding_window), "attention"
        scope = f"windowed_{n_windowed}_of_{cfg.num_hidden_layers}"
        return mask.within(cfg.sliding_window, windowed), scope

    @property
    def _keeps_projections(self) -> bool:
        """Returns True if the backward pass needs the projections' outputs.

        It does where a norm or a gate follows. RoPE's derivative needs no input: its result is then
        kept in the place of the projection's.
        """
        cfg = self.config
        return bool(cfg.qk_norm or cfg.value_norm or cfg.attn_output_gate or self.kind.reuses_keys)

    def _angles(self, step: SharedLayerInput, layer: SingleLayerInput) -> RopeAngles:
        """Returns the layer's RoPE angles."""
        if step.other_rope is None:
            return step.rope
        if self.config.global_head_dim:
            return step.rope if self.kind.has_global_heads else step.other_rope
        choose = functools.partial(jnp.where, layer.is_rotated_apart)
        angles: RopeAngles = jax.tree.map(choose, step.other_rope, step.rope)
        return angles

    def _project(self, x: jax.Array) -> dict[str, jax.Array]:
        """Returns normalised queries "q", keys "k", values "v", and output gates.

        Each is [batch, seq, heads, head_dim]. Gates ("gate") are there if the model has them. A
        layer that takes keys and values of another has queries alone.
        """
        cfg = self.config
        kv_heads, head_dim = cfg.heads_of(self.kind)
        keys_are_values = cfg.attention_k_eq_v and self.kind.has_global_heads
        heads = {"q": cfg.num_attention_heads}
        if not self.kind.reuses_keys:
            heads["k"] = kv_heads
            if not keys_are_values:
                heads["v"] = kv_heads
        sizes = {name: n_heads * head_dim for name, n_heads in heads.items()}
        if cfg.attn_output_gate:  # each head of queries has a gate beside it
            sizes["q"] *= 2
        if cfg.fused_projections:
            fused = dense(self, sum(sizes.values()), use_bias=cfg.qkv_bias, name="qkv_proj")(x)
            ends = [sizes["q"], sizes["q"] + sizes["k"]]
            flat = dict(zip("qkv", jnp.split(fused, ends, axis=-1), strict=True))
        else:
            flat = {
                name: dense(self, size, use_bias=cfg.qkv_bias, name=f"{name}_proj")(x)
                for name, size in sizes.items()
            }
        if self._keeps_projections:
            flat = {name: name_projection(features, self.remat) for name, features in flat.items()}
        # Norms of queries and keys run over all heads together (OLMo), or over each head.
        normalised_names = []
        if cfg.qk_norm:
            normalised_names = [name for name in ("q", "k") if name in heads]
        if cfg.qk_norm_joins_heads:
            flat |= {name: rms_norm(self, f"{name}_norm")(flat[name]) for name in normalised_names}
        results = {
            name: self.placement.constrain(features.reshape(*x.shape[:2], heads[name], -1), "heads")
            for name, features in flat.items()
        }
        if cfg.attn_output_gate:
            results["q"], results["gate"] = jnp.split(results["q"], 2, axis=-1)
        if keys_are_values and "k" in results:  # keys before their norm
            results["v"] = results["k"]
        if cfg.value_norm and "v" in results:
            results["v"] = normalise_values(results["v"], cfg.rms_norm_eps)
        if not cfg.qk_norm_joins_heads:
            for name in normalised_names:
                results[name] = rms_norm(self, f"{name}_norm")(results[name])
        return results


class DecoderLayer(ModelPart):
    """Attention and an MLP with norms before or after each, added to the residual stream."""

    config: DecoderConfig
    experts: str | Experts = "auto"
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self, x: jax.Array, step: SharedLayerInput, layer: SingleLayerInput
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs the body of a scan: x is the carry, [batch, seq, d_model].

        Returns:
          The carry; and the entries for the cache, with the experts of each token where
          ``layer.routing`` is given.
        """
        cfg = self.config
        x = name_layer_input(x, self.remat)
        if step.cache is not None:
            take = functools.partial(
                jax.lax.dynamic_index_in_dim, index=layer.layer_index, keepdims=False
            )
            layer = layer._replace(cache=jax.tree.map(take, step.cache))

        hidden, entries = self._mix_tokens(self._normalise_input(0, x), step, layer)
        x = self._add_output(0, x, name_projection(hidden, self.remat))
        hidden, experts = self._apply_mlp(self._normalise_input(1, x), layer.routing)
        x = self._add_output(1, x, hidden)
        if layer.inputs is not None:
            x = add_layer_input(self, x, layer.inputs)
        if cfg.layer_scalars:
            x = scale_output(self, x)
        return self.placement.constrain(x, "residual"), (entries, experts)

    @nn.nowrap  # adds no scope of its own to the program
    def _normalise_input(self, block: int, x: jax.Array) -> jax.Array:
        """Returns the normalised input of the token mixer (0) or the MLP (1)."""
        cfg = self.config
        if cfg.pre_norms:
            mlp_norm = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
            x = rms_norm(self, ("input_layernorm", mlp_norm)[block])(x)
        return self.placement.constrain(x, "inputs")

    @nn.nowrap
    def _add_output(self, block: int, x: jax.Array, output: jax.Array) -> jax.Array:
        """Adds a block's output to the residual stream x; see ``_normalise_input``."""
        cfg = self.config
        if cfg.post_norms:
            names = ("post_attention_layernorm", "post_feedforward_layernorm")
            output = rms_norm(self, names[block])(output)
        return x + multiply(output, cfg.residual_multiplier)

    @nn.nowrap
    def _mix_tokens(
        self, x: jax.Array, step: SharedLayerInput, layer: SingleLayerInput
    ) -> tuple[jax.Array, NewEntries]:
        """Applies attention or the linear mixer; see ``__call__`` for the entries."""
        if self.kind.linear:
            mixer = GatedDeltaNet(*self.options, name="linear_attn")
            return mixer(x, step.tokens, layer.recurrent)
        attention = Attention(*self.options, kind=self.kind, name="self_attn")
        hidden, entries = attention(x, step, layer)
        if layer.cache is None and not self.config.num_kv_shared_layers:
            return hidden, None  # nobody reads them
        return hidden, entries

    @nn.nowrap
    def _apply_mlp(
        self, x: jax.Array, routing: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Applies the MLP or the experts; also returns the chosen experts.

        In a layer without experts they are ``routing`` itself.
        """
        cfg = self.config
        if self.kind.sparse:
            mixture = SparseMLP(*self.options, products=self.experts, name=cfg.family.mlp_name)
            hidden, experts = mixture(x, routing)
            return hidden, None if routing is None else experts
        # A layer without experts.
        d_mlp = cfg.intermediate_size
        if self.kind.reuses_keys and cfg.use_double_wide_mlp:
            d_mlp *= 2
        hidden = MLP(*self.options, inner=d_mlp, name=cfg.family.mlp_name)(x)
        return hidden, None if routing is None else routing.astype(jnp.int32)


def project_latent(
    module: ModelPart, x: jax.Array, rope: RopeAngles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes rotated queries, keys and values, [batch, seq, heads, head_dim] each.

    They come from vectors that all heads share: MLA of DeepSeek-V2 (2024, section 2.1) and later.
    Keys and values are expanded for every head, as in training: a cache holds them like any other
    model's, [heads, tokens, head_dim], and values filled up with zeros to the size of keys.

    Args:
      module: the attention that has the projections, in its compact method.
      x: [batch, seq, d_model].
      rope: the rotation of its tokens.
    """
    cfg: DecoderConfig = module.config
    nope_dim, rope_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim  # without RoPE, and with it
    n_heads = cfg.num_attention_heads

    def project(x: jax.Array, name: str, size: int, *, use_bias: bool = False) -> jax.Array:
        return name_projection(dense(module, size, use_bias=use_bias, name=name)(x), module.remat)

    def split_heads(x: jax.Array) -> jax.Array:
        return module.placement.constrain(x.reshape(*x.shape[:2], n_heads, -1), "heads")

    def normalise(x: jax.Array, name: str) -> jax.Array:
        return RMSNorm(_LATENT_EPS, module.dtype, module.param_dtype, name=name)(x)

    def rotate_pairs(x: jax.Array) -> jax.Array:
        return rotate(x, rope, neighbours=cfg.rope_interleave)

    if cfg.q_lora_rank is None:
        q = project(x, "q_proj", n_heads * cfg.head_dim)
    else:
        q_latent = project(x, "q_a_proj", cfg.q_lora_rank, use_bias=cfg.qkv_bias)
        q_latent = normalise(q_latent, "q_a_layernorm")
        q = project(q_latent, "q_b_proj", n_heads * cfg.head_dim)
    q_nope, q_rope = jnp.split(split_heads(q), [nope_dim], axis=-1)
    latent_and_rope = project(
        x, "kv_a_proj_with_mqa", cfg.kv_lora_rank + rope_dim, use_bias=cfg.qkv_bias
    )
    # The latent vector gives each head's keys without RoPE, and its values.
    kv_latent, k_rope = jnp.split(latent_and_rope, [cfg.kv_lora_rank], axis=-1)
    kv = project(
        normalise(kv_latent, "kv_a_layernorm"), "kv_b_proj", n_heads * (nope_dim + cfg.v_head_dim)
    )
    k_nope, v = jnp.split(split_heads(kv), [nope_dim], axis=-1)
    k_rope = rotate_pairs(k_rope[:, :, None])  # one head, which all heads share
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], rope_dim))
    q = jnp.concatenate([q_nope, rotate_pairs(q_rope)], axis=-1)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    return q, k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, cfg.head_dim - cfg.v_head_dim)))


def remove_value_padding(module: ModelPart, out: jax.Array) -> jax.Array:
    """Removes value padding from attention's output: [batch, seq, heads * v_head_dim]."""
    cfg: DecoderConfig = module.config
    heads = out.reshape(*out.shape[:2], cfg.num_attention_heads, -1)[..., : cfg.v_head_dim]
    return module.placement.constrain(heads.reshape(*out.shape[:2], -1), "features")
