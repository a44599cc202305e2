"""Parts of models: activations, dense layers, norms, embeddings, patches, noise, and caches.

``dense``, ``layer_norm`` and ``embed`` make a layer for ``module``, with its dtypes and its
configuration's options.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from lora_jax.models.layers.attend import Attend, attend
from lora_jax.models.layers.attention import AttentionInputs, wide_dtype
from lora_jax.models.layers.cache import LayerCache, write_slots
from lora_jax.models.layers.placement import UNPLACED, Placement

_EXACT_GELU = functools.partial(nn.gelu, approximate=False)
_TANH_GELU = functools.partial(nn.gelu, approximate=True)

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _EXACT_GELU,
    "gelu_python": _EXACT_GELU,
    "gelu_10": lambda x: jnp.clip(_EXACT_GELU(x), -10, 10),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "tanh": nn.tanh,
}


def activate(name: str, x: jax.Array, up: jax.Array | None = None) -> jax.Array:
    """Returns act(x), or act(x) * up: the element-wise part of an MLP.

    Only x and up are kept for the backward pass, which computes the rest again. Otherwise a layer
    with SiLU keeps six arrays of this size instead of three, and on CPU filling and reading them
    costs more than the arithmetic (tests/models/test_copies.py counts the arrays).

    Args:
      name: a key of ``ACTIVATION``.
      x: any shape, the gate where there is ``up``.
      up: as x.
    """

    def act(x: jax.Array, up: jax.Array | None) -> jax.Array:
        y = ACTIVATION[name](x)
        return y if up is None else y * up

    # Layers are scanned: nothing can be merged with the forward pass, and a barrier would cost.
    y: jax.Array = jax.checkpoint(act, prevent_cse=False)(x, up)
    return y


class ModelPart(nn.Module):
    """A model or a part of one.

    Attributes: see ``Decoder``.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool | str = False
    placement: Placement = UNPLACED
    attention: str | Attend = "auto"

    @property
    def options(self) -> tuple[Any, DTypeLike, DTypeLike, bool | str, Placement, str | Attend]:
        """The attributes above, to pass to a submodule."""
        dtypes = (self.dtype, self.param_dtype)
        return (self.config, *dtypes, self.remat, self.placement, self.attention)


def attend_heads(
    module: ModelPart,
    inputs: AttentionInputs,
    cache: LayerCache | None = None,
    filled: jax.Array | None = None,
) -> jax.Array:
    """Computes attention over the cache and new tokens: [batch, seq, heads * head_dim].

    Args:
      module: the layer's attention.
      inputs: queries, keys and values of the call, the mask, and the options.
      cache: the layer's keys and values so far; None without a cache.
      filled: [] int32, the number of the cache's slots in use.
    """
    if cache is not None:
        assert filled is not None, "a cache comes with the number of its slots in use"
        k = write_slots(cache.key, inputs.k, filled)
        inputs = inputs._replace(k=k, v=write_slots(cache.value, inputs.v, filled))
    shared = cache and cache.shared
    out = attend(inputs, attention=module.attention, placement=module.placement, shared=shared)
    return module.placement.constrain(out.reshape(*out.shape[:2], -1), "features")


def dense(
    module: ModelPart,
    features: int,
    *,
    name: str | None = None,
    use_bias: bool = True,
    dtype: DTypeLike | None = None,
    dot_general: Callable[..., jax.Array] | None = None,
) -> nn.Dense:
    """Creates xW + b, with W drawn by the configuration's initializer_range."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dot_general=dot_general,
        dtype=module.dtype if dtype is None else dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        name=name,
    )


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, in fp32 (Ba et al. 2016)."""

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d_model = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d_model,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (d_model,), self.param_dtype)
        dtype = wide_dtype(self.dtype)
        wide_x = x.astype(dtype)
        centered = wide_x - jnp.mean(wide_x, axis=-1, keepdims=True)
        variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
        normalised = centered * lax.rsqrt(variance + self.eps)
        return (normalised * scale.astype(dtype) + bias.astype(dtype)).astype(self.dtype)


def layer_norm(module: ModelPart, name: str | None = None) -> LayerNorm:
    """Creates a LayerNorm with the configuration's epsilon."""
    return LayerNorm(module.config.layer_norm_eps, module.dtype, module.param_dtype, name=name)


def embed(
    module: ModelPart, rows: int, name: str | None = None, *, width: int | None = None
) -> nn.Embed:
    """Creates an embedding table of ``rows`` vectors, d_model wide by default."""
    return nn.Embed(
        rows,
        module.config.hidden_size if width is None else width,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        embedding_init=nn.initializers.normal(module.config.initializer_range),
        name=name,
    )


class EmbeddingNoise(NamedTuple):
    """Uniform noise that is added to token embeddings.

    Attributes:
      key: the PRNG key to draw it with.
      bound: [batch, seq] fp32. A token's noise lies between ± bound / sqrt(d_model).
    """

    key: jax.Array
    bound: jax.Array


def add_noise(x: jax.Array, noise: EmbeddingNoise | None) -> jax.Array:
    """Returns embedded tokens, [batch, seq, d_model], plus the noise if there is any."""
    if noise is None:
        return x
    uniform = jax.random.uniform(noise.key, x.shape, jnp.float32, -1.0, 1.0)
    bound = noise.bound[..., None] / math.sqrt(x.shape[-1])
    return x + (bound * uniform).astype(x.dtype)


class PatchProjection(ModelPart):
    """A convolution with stride equal to its size: a product with each patch's pixels.

    Its kernel is [width, height, channels, d_model].

    Attributes:
      size: (height, width) of a patch in pixels.
    """

    size: tuple[int, int] = (16, 16)

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        cfg = self.config
        d_model = cfg.hidden_size
        height, width = self.size
        kernel_shape = (width, height, cfg.num_channels, d_model)
        normal = nn.initializers.normal(cfg.initializer_range)
        kernel = self.param("kernel", normal, kernel_shape, self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (d_model,), self.param_dtype)
        batch, n_channels, image_height, image_width = pixels.shape
        n_rows = image_height // height
        n_columns = image_width // width
        # A rest of pixels at the right and at the bottom belongs to no patch.
        pixels = pixels[:, :, : n_rows * height, : n_columns * width].astype(self.dtype)
        grid = pixels.reshape(batch, n_channels, n_rows, height, n_columns, width)
        patches = grid.transpose(0, 2, 4, 5, 3, 1)  # [..., width, height, channels]
        patches = patches.reshape(batch, n_rows * n_columns, -1)
        return patches @ kernel.reshape(-1, d_model) + bias.astype(self.dtype)


def insert_vectors(
    x: jax.Array, is_vector: jax.Array | None, vectors: jax.Array | None
) -> jax.Array:
    """Returns embedded tokens with some of them replaced by vectors.

    Args:
      x: the embedded tokens, [batch, seq, d_model].
      is_vector: [batch, seq] bool, True where a row's next vector replaces a token.
      vectors: the vectors of each row in their order, [batch, n, d_model]; None for none.
    """
    if is_vector is None or vectors is None:
        return x
    vector_of_token = jnp.maximum(jnp.cumsum(is_vector, axis=1) - 1, 0)[..., None]
    token_vectors = jnp.take_along_axis(
        vectors.astype(x.dtype), vector_of_token, axis=1, mode="fill"
    )
    return jnp.where(is_vector[..., None], token_vectors, x)
