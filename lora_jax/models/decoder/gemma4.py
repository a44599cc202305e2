"""Layers of Gemma 4: heads of two sizes, keys and values of other layers, inputs of their own.

Layers with a window and those without have heads of other sizes and numbers. In a cache, whose
layers are alike, a wide head lies as several of the smaller size, side by side, and heads that a
layer does not have are zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.decoder.blocks import multiply, rms_norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.runs import LayerKind
from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.blocks import ACTIVATION, ModelPart, dense
from lora_jax.models.layers.cache import LayerCache, NewEntries, Shared


class KeptKeys(NamedTuple):
    """A layer's keys and values, for layers behind it that have none of their own.

    Attributes:
      new: keys and values of this call, laid out as in a cache: [batch, seq, heads, size] each.
      cache: keys and values of earlier calls; None without a cache.
    """

    new: NewEntries
    cache: LayerCache | None


def keep_last(
    config: DecoderConfig, numbers: range, new: NewEntries, cache: LayerCache | None
) -> tuple[KeptKeys, ...]:
    """Returns the keys and values of the last layer with a window, and of the last one without.

    Args:
      config: the decoder's.
      numbers: the layers of a run from the first on.
      new: keys and values of this call, stacked on axis 0 by layers.
      cache: keys and values of earlier calls, stacked so.
    """

    def kept(whole: bool) -> KeptKeys:
        i = max((i for i in numbers if config.kind_of(i).whole == whole), default=numbers[-1])
        mine, before = jax.tree.map(lambda x: x[i], (new, cache))
        return KeptKeys(mine, before)

    return kept(False), kept(True)


def pack(x: jax.Array, config: DecoderConfig) -> jax.Array:
    """Returns keys or values, [batch, seq, kv_heads, size], as a cache has them."""
    heads, size = config.cache_heads
    packed = x.reshape(*x.shape[:2], -1, size)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, heads - packed.shape[2]), (0, 0)))


def unpack(x: jax.Array, config: DecoderConfig, kind: LayerKind) -> jax.Array:
    """Returns a layer's keys or values from a cache's, [batch, seq, heads, size]."""
    heads, size = config.heads_of(kind)
    return x[:, :, : heads * size // config.head_dim].reshape(*x.shape[:2], heads, size)


def unpack_cache(
    cache: LayerCache | None, config: DecoderConfig, kind: LayerKind
) -> LayerCache | None:
    """Returns a layer's part of a cache, with heads of its own size."""
    if cache is None:
        return None

    def slots(x: jax.Array) -> jax.Array:  # [batch, heads, slots, size]
        return unpack(x.swapaxes(1, 2), config, kind).swapaxes(1, 2)

    shared = cache.shared
    if shared is not None:  # without a batch
        shared = Shared(slots(shared.key[None])[0], slots(shared.value[None])[0])
    return LayerCache(slots(cache.key), slots(cache.value), shared)


def normalise_values(x: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x), in fp32 at least, in x's dtype."""
    y = x.astype(wide_dtype(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def layer_inputs(trunk: ModelPart, table: jax.Array, words: jax.Array) -> jax.Array:
    """Returns each layer's input of its own, [layers, batch, seq, size].

    Args:
      trunk: the module that has the projection and its norm.
      table: vectors of the tokens for all layers, [batch, seq, layers * size].
      words: embedded tokens, [batch, seq, d_model].
    """
    cfg: DecoderConfig = trunk.config
    size = cfg.hidden_size_per_layer_input
    shape = (*words.shape[:2], cfg.num_hidden_layers, size)
    projected = multiply(trunk.per_layer_model_projection(words), cfg.hidden_size**-0.5)
    projected = trunk.per_layer_projection_norm(projected.reshape(shape))
    both = projected + (table * size**0.5).reshape(shape)
    return jnp.moveaxis(multiply(both, 2**-0.5), 2, 0)


def add_input(layer: ModelPart, x: jax.Array, own: jax.Array) -> jax.Array:
    """Adds a layer's own input, gated by the stream and projected, to the stream.

    Args:
      layer: the module that has the projections, in its compact method.
      x: the stream, [batch, seq, d_model].
      own: the layer's input, [batch, seq, size].
    """
    cfg: DecoderConfig = layer.config
    gate = dense(layer, own.shape[-1], use_bias=False, name="per_layer_input_gate")(x)
    part = ACTIVATION[cfg.hidden_act](gate) * own
    part = dense(layer, cfg.hidden_size, use_bias=False, name="per_layer_projection")(part)
    return x + rms_norm(layer, "post_per_layer_input_norm")(part)


def scale_output(layer: ModelPart, x: jax.Array) -> jax.Array:
    """Multiplies a layer's output by its number."""
    factor = layer.param("layer_scalar", nn.initializers.ones, (1,), layer.param_dtype)
    return x * factor.astype(x.dtype)
