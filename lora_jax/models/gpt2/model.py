"""GPT-2 in Flax Linen (Radford et al. 2019)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.causal import CausalLM, output_head
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blocks import (
    EmbeddingNoise,
    ModelPart,
    add_noise,
    attend_heads,
    dense,
    embed,
    layer_norm,
)
from lora_jax.models.layers.cache import Cache, LayerCache, NewEntries
from lora_jax.models.layers.encoder import TwoLayerMLP
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import TokenPlaces, name_layer_input, name_projection, scan_layers


class GPT2(CausalLM):
    """GPT-2, called as ``Decoder`` is; its layers are scanned as well.

    Parameters are a plain nested dict under Hugging Face's module names, less the layer number:
    ``transformer/h/attn/c_attn/kernel`` is [layers, d_model, 3 * d_model], for q, k and v.

    Attributes:
      config: the options of the forward pass.
      dtype: dtype of the computation. LayerNorm's statistics, softmax and logits are fp32 (or
        float64, where dtype is).
      param_dtype, remat, placement, attention: see ``Decoder``.
    """

    config: GPT2Config
    TRUNK = "transformer"

    def setup(self) -> None:
        self.transformer = _Trunk(*self.options)
        self.lm_head = output_head(self)


class _SharedInput(NamedTuple):
    """The input that all layers share: the mask, and the number of used cache slots."""

    mask: Mask
    filled: jax.Array


class _LayerInput(NamedTuple):
    """One layer's input: the scale of its scores, [], and its cache or None."""

    scale: jax.Array
    cache: LayerCache | None


class _Attention(ModelPart):
    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: _SharedInput, layer: _LayerInput
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        cfg = self.config
        qkv = name_projection(dense(self, 3 * cfg.hidden_size, name="c_attn")(x), self.remat)
        heads_shape = (*x.shape[:2], cfg.num_attention_heads, cfg.head_dim)
        q, k, v = (
            self.placement.constrain(features.reshape(heads_shape), "heads")
            for features in jnp.split(qkv, 3, axis=-1)
        )
        inputs = AttentionInputs(q=q, k=k, v=v, mask=shared.mask, scale=layer.scale)
        out = attend_heads(self, inputs, layer.cache, shared.filled)
        return dense(self, cfg.hidden_size, name="c_proj")(out), (k, v)


class _Block(ModelPart):
    """Attention and MLP, each after a norm and with a residual; the body of a scan."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: _SharedInput, layer: _LayerInput
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        def normalise(norm_name: str, x: jax.Array) -> jax.Array:
            return self.placement.constrain(layer_norm(self, name=norm_name)(x), "inputs")

        x = name_layer_input(x, self.remat)
        attention = _Attention(*self.options, name="attn")
        attention_out, keys_and_values = attention(normalise("ln_1", x), shared, layer)
        x = x + name_projection(attention_out, self.remat)
        mlp = TwoLayerMLP(*self.options, names=("c_fc", "c_proj"), name="mlp")
        x = x + mlp(normalise("ln_2", x))
        x = self.placement.constrain(x, "residual")
        return x, None if layer.cache is None else keys_and_values


class _Trunk(ModelPart):
    """Embeddings, scanned layers and the final norm, without the head."""

    config: GPT2Config

    def setup(self) -> None:
        cfg = self.config
        self.wte = embed(self, cfg.vocab_size)
        self.wpe = embed(self, cfg.max_position_embeddings)
        self.h = scan_layers(_Block, self.remat, cfg.num_hidden_layers)(*self.options)
        self.ln_f = layer_norm(self)

    @property
    def words(self) -> nn.Embed:
        return self.wte

    @property
    def n_positions(self) -> int:
        return self.config.max_position_embeddings

    def __call__(
        self,
        input_ids: jax.Array,
        placed: TokenPlaces,
        mask: Mask,
        cache: Cache | None,
        embedding_noise: EmbeddingNoise | None,
    ) -> tuple[jax.Array, NewEntries]:
        words = add_noise(self.wte(input_ids), embedding_noise)
        x = self.placement.constrain(words + self.wpe(placed.positions), "residual")
        layer_caches = None if cache is None else cache.layers
        layers = _LayerInput(_score_scales(self.config), layer_caches)
        x, entries = self.h(x, _SharedInput(mask, placed.first_slot), layers)
        return self.placement.constrain(self.ln_f(x), "inputs"), entries


def _score_scales(config: GPT2Config) -> jax.Array:
    """Returns the scale of each layer's scores: [layers] fp32."""
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    scales = [scale] * config.num_hidden_layers
    if config.scale_attn_by_inverse_layer_idx:
        scales = [scale / (index + 1) for index in range(config.num_hidden_layers)]
    return jnp.asarray(scales, jnp.float32)
