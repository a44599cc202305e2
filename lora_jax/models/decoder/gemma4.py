"""Layers of Gemma 4: heads of two sizes, reused keys and values, and per-layer inputs.

Layers with a window and those without have heads of other sizes and numbers. In a cache, whose
layers are alike, a wide head lies as several of the smaller size, side by side, and heads that a
layer does not have are zeros: keys and values are packed, and unpacked when a layer reads them.
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


class ReusedKeys(NamedTuple):
    """A layer's keys and values, which later layers without their own keys reuse.

    Attributes:
      new: keys and values of this call, laid out as in a cache: [batch, seq, heads, size] each.
      cache: keys and values of earlier calls; None without a cache.
    """

    new: NewEntries
    cache: LayerCache | None


def select_reused_keys(
    config: DecoderConfig, layer_indices: range, new: NewEntries, cache: LayerCache | None
) -> tuple[ReusedKeys, ...]:
    """Returns the keys and values of the last windowed and the last global layer.

    Args:
      config: the decoder's.
      layer_indices: the layers of the first run.
      new: keys and values of this call, stacked on axis 0 by layers.
      cache: keys and values of earlier calls, stacked in the same way.
    """

    def last_of_kind(*, has_global_heads: bool) -> ReusedKeys:
        """Returns the keys and values of the last layer of a kind."""
        layers = [
            layer
            for layer in layer_indices
            if config.kind_of(layer).has_global_heads == has_global_heads
        ]
        last_layer = layers[-1] if layers else layer_indices[-1]
        layer_new, layer_cache = jax.tree.map(lambda stack: stack[last_layer], (new, cache))
        return ReusedKeys(new=layer_new, cache=layer_cache)

    return last_of_kind(has_global_heads=False), last_of_kind(has_global_heads=True)


def pack_heads(x: jax.Array, config: DecoderConfig) -> jax.Array:
    """Reshapes keys or values, [batch, seq, kv_heads, size], to the layout of the cache."""
    n_heads, size = config.cache_heads
    packed = x.reshape(*x.shape[:2], -1, size)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, n_heads - packed.shape[2]), (0, 0)))


def unpack_heads(x: jax.Array, config: DecoderConfig, kind: LayerKind) -> jax.Array:
    """Undoes ``pack_heads`` for a kind of layer: returns [batch, seq, kv_heads, size]."""
    n_heads, size = config.heads_of(kind)
    n_cache_heads = n_heads * size // config.head_dim
    return x[:, :, :n_cache_heads].reshape(*x.shape[:2], n_heads, size)


def unpack_cache(
    cache: LayerCache | None, config: DecoderConfig, kind: LayerKind
) -> LayerCache | None:
    """Returns a layer's cache, with heads of the layer's size."""
    if cache is None:
        return None

    def unpack_slots(x: jax.Array) -> jax.Array:  # [batch, heads, slots, size]
        return unpack_heads(x.swapaxes(1, 2), config, kind).swapaxes(1, 2)

    shared = cache.shared
    if shared is not None:  # without a batch
        shared = Shared(unpack_slots(shared.key[None])[0], unpack_slots(shared.value[None])[0])
    return LayerCache(unpack_slots(cache.key), unpack_slots(cache.value), shared)


def normalise_values(x: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) in x's dtype, computed in fp32 or wider."""
    y = x.astype(wide_dtype(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def compute_layer_inputs(
    trunk: ModelPart, token_vectors: jax.Array, embedded: jax.Array
) -> jax.Array:
    """Computes the per-layer inputs, [layers, batch, seq, size].

    Args:
      trunk: the module that has the projection and its norm.
      token_vectors: the tokens' vectors for all layers, [batch, seq, layers * size].
      embedded: embedded tokens, [batch, seq, d_model].
    """
    cfg: DecoderConfig = trunk.config
    size = cfg.hidden_size_per_layer_input
    shape = (*embedded.shape[:2], cfg.num_hidden_layers, size)
    projected = multiply(trunk.per_layer_model_projection(embedded), cfg.hidden_size**-0.5)
    projected = trunk.per_layer_projection_norm(projected.reshape(shape))
    inputs = projected + (token_vectors * size**0.5).reshape(shape)
    return jnp.moveaxis(multiply(inputs, 2**-0.5), 2, 0)


def add_layer_input(layer: ModelPart, x: jax.Array, layer_input: jax.Array) -> jax.Array:
    """Adds the gated and projected per-layer input to the residual stream.

    Args:
      layer: the module that has the projections, in its compact method.
      x: the stream, [batch, seq, d_model].
      layer_input: the layer's entry of ``compute_layer_inputs``, [batch, seq, size].
    """
    cfg: DecoderConfig = layer.config
    gate = dense(layer, layer_input.shape[-1], use_bias=False, name="per_layer_input_gate")(x)
    gated = ACTIVATION[cfg.hidden_act](gate) * layer_input
    out = dense(layer, cfg.hidden_size, use_bias=False, name="per_layer_projection")(gated)
    return x + rms_norm(layer, "post_per_layer_input_norm")(out)


def scale_output(layer: ModelPart, x: jax.Array) -> jax.Array:
    """Multiplies a layer's output by the layer's trained scalar."""
    factor = layer.param("layer_scalar", nn.initializers.ones, (1,), layer.param_dtype)
    return x * factor.astype(x.dtype)
