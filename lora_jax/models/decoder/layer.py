"""One decoder layer: norms, grouped-query attention, and an MLP or experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.causal import attended
from lora_jax.models.decoder.blocks import MLP, norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts
from lora_jax.models.decoder.moe import SparseMLP
from lora_jax.models.decoder.rope import Rotation, rotate
from lora_jax.models.layers.blocks import ModelPart, dense
from lora_jax.models.layers.cache import LayerCache
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import layer_input


class Step(NamedTuple):
    """The input that all layers share in one call.

    Attributes:
      rope: RoPE's rotations of this call's tokens.
      window_rope: rotations in layers with a sliding window; None if all layers use ``rope``.
      mask: the keys that each token may see in layers without a sliding window.
      filled: [] int32, the number of the cache's slots in use.
    """

    rope: Rotation
    window_rope: Rotation | None
    mask: Mask
    filled: jax.Array


class PerLayer(NamedTuple):
    """The input of one layer; stacked on axis 0 for the scan.

    Attributes:
      windowed: [] bool, True if this layer uses the sliding window.
      cache: this layer's keys and values so far; None without a cache.
    """

    windowed: jax.Array
    cache: LayerCache | None


class Attention(ModelPart):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and RoPE."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layer: PerLayer
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Mixes each token with those that it sees.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layer: this layer's own input.

        Returns:
          [batch, seq, d_model], and this call's keys and values, for the cache:
          each [batch, seq, kv_heads, head_dim].
        """
        cfg = self.config
        q, k, v = self._project(x)
        if cfg.qk_norm:
            q = norm(self, "q_norm")(q)
            k = norm(self, "k_norm")(k)
        rope = _chosen(layer.windowed, step.window_rope, step.rope)
        q, k = rotate(q, rope), rotate(k, rope)
        windowed, layers = len(cfg.windowed_layers), cfg.num_hidden_layers
        some = 0 < windowed < layers
        mask = step.mask.within(cfg.sliding_window, layer.windowed if some else None)
        scale = (cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5
        # All layers are one program; the name tells a plan how many of them have the window.
        with jax.named_scope(f"windowed_{windowed}_of_{layers}" if some else "attention"):
            cap = cfg.attn_logit_softcapping
            out = attended(self, q, k, v, mask, layer.cache, step.filled, scale, cap)
        return dense(self, cfg.hidden_size, use_bias=cfg.o_bias, name="o_proj")(out), (k, v)

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Returns queries, keys and values: [batch, seq, heads, head_dim] each."""
        cfg = self.config
        heads = {"q": cfg.num_attention_heads} | dict.fromkeys("kv", cfg.num_key_value_heads)
        sizes = [n * cfg.head_dim for n in heads.values()]
        if cfg.fused_projections:
            fused = dense(self, sum(sizes), use_bias=cfg.qkv_bias, name="qkv_proj")(x)
            flat = jnp.split(fused, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            flat = [
                dense(self, size, use_bias=cfg.qkv_bias, name=f"{name}_proj")(x)
                for name, size in zip(heads, sizes, strict=True)
            ]
        return [
            self.placement.constrain(part.reshape(*x.shape[:2], n, cfg.head_dim), "heads")
            for part, n in zip(flat, heads.values(), strict=True)
        ]


class DecoderLayer(ModelPart):
    """Attention and MLP, each after a norm (and before one, in Gemma), added to the stream."""

    config: DecoderConfig
    experts: str | Experts = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layer: PerLayer
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Runs a scan's body: x is the carry, [batch, seq, d_model]; see ``Attention``."""
        cfg, x = self.config, layer_input(x, self.remat)
        if cfg.num_experts:
            mlp: nn.Module = SparseMLP(
                *self.options, products=self.experts, name=cfg.family.mlp_name
            )
        else:
            mlp = MLP(*self.options, name=cfg.family.mlp_name)

        def inputs(norm_name: str, x: jax.Array) -> jax.Array:
            return self.placement.constrain(norm(self, norm_name)(x), "inputs")

        attention = Attention(*self.options, name="self_attn")
        hidden, cached = attention(inputs("input_layernorm", x), step, layer)
        if cfg.post_norms:
            x = x + norm(self, "post_attention_layernorm")(hidden)
            hidden = mlp(inputs("pre_feedforward_layernorm", x))
            x = x + norm(self, "post_feedforward_layernorm")(hidden)
        else:
            x = x + hidden
            x = x + mlp(inputs("post_attention_layernorm", x))
        x = self.placement.constrain(x, "residual")
        return x, None if layer.cache is None else cached


def _chosen(windowed: jax.Array, inside: Any, outside: Any) -> Any:
    """Chooses a layer's input, with a sliding window or without; None inside: no difference."""
    if inside is None:
        return outside
    return jax.tree.map(lambda a, b: jnp.where(windowed, a, b), inside, outside)
