"""Qwen3.5's image encoder in Flax Linen: patches of images of any size, concatenated in a row.

Each patch sees those of its image. Its position is interpolated in a learned table and, besides,
rotates its queries and keys: one half of each head's pairs by its row, the other by its column.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.decoder.rope import RopeAngles, rotate
from lora_jax.models.layers.attention import AttentionInputs, wide_dtype
from lora_jax.models.layers.blocks import (
    ModelPart,
    activate,
    attend_heads,
    dense,
    embed,
    layer_norm,
)
from lora_jax.models.layers.encoder import TwoLayerMLP
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from lora_jax.models.layers.trunk import name_layer_input, scan_layers
from lora_jax.models.qwen_vl.config import QwenVisionConfig
from lora_jax.models.qwen_vl.grids import PatchPlaces, patch_places


class _LayerInputs(NamedTuple):
    """The input that all layers share: the mask of patches, and their rotations."""

    mask: Mask
    angles: RopeAngles


class _QwenPart(ModelPart):
    config: QwenVisionConfig


class QwenVision(_QwenPart):
    """Returns a vector for each square of patches, as wide as the text model's."""

    @nn.compact
    def __call__(self, patches: jax.Array, grids: jax.Array) -> jax.Array:
        """Encodes each row's images.

        Args:
          patches: [batch, n, channels, height, width], square by square; see ``grids``.
          grids: [batch, images, 2] int32, rows and columns of patches.

        Returns:
          [batch, n / merge², d_model of the text].
        """
        cfg = self.config
        places = patch_places(grids, patches.shape[1], cfg.spatial_merge_size)
        x = _PatchEmbedding(*self.options, name="patch_embed")(patches)
        x = self.placement.constrain(x + self._interpolate_positions(places), "residual")
        inputs = _LayerInputs(
            mask=_same_image_mask(places.image),
            angles=_rotation_angles(places.coordinates, cfg, wide_dtype(self.dtype)),
        )
        layers = scan_layers(_QwenLayer, self.remat, cfg.num_hidden_layers, nn.broadcast)
        x, _ = layers(*self.options, name="blocks")(x, inputs)
        vectors: jax.Array = _Merger(*self.options, name="merger")(x)
        return vectors

    def _interpolate_positions(self, places: PatchPlaces) -> jax.Array:
        """Returns bilinear position vectors, [batch, n, d_model]."""
        cfg = self.config
        dtype = wide_dtype(self.dtype)
        table = embed(self, cfg.num_position_embeddings, name="pos_embed")
        max_index = cfg.side - 1
        # The corners of an image have the positions of the table's corners.
        image_steps = jnp.maximum(places.sizes - 1, 1).astype(dtype)
        coordinates = places.coordinates.astype(dtype) * max_index / image_steps
        # Each patch lies between two rows and two columns of the table, [batch, n, 2].
        low = jnp.clip(jnp.floor(coordinates).astype(jnp.int32), 0, max_index)
        high = jnp.minimum(low + 1, max_index)
        high_weight = coordinates - jnp.floor(coordinates)
        neighbours = ((low, 1 - high_weight), (high, high_weight))
        positions = jnp.zeros((*low.shape[:2], cfg.hidden_size), dtype)
        for row_index, row_weight in neighbours:
            for column_index, column_weight in neighbours:
                table_index = row_index[..., 0] * cfg.side + column_index[..., 1]
                vectors = table(table_index).astype(dtype)
                weight = row_weight[..., 0] * column_weight[..., 1]
                positions = positions + vectors * weight[..., None]
        return positions.astype(self.dtype)


class _PatchEmbedding(_QwenPart):
    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        x: jax.Array = _FrameProjection(*self.options, name="proj")(patches)
        return x


class _FrameProjection(_QwenPart):
    """A product with each patch's pixels; all frames of a still image are equal.

    Its kernel is [width, height, frames, channels, d_model].
    """

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        cfg = self.config
        kernel_shape = (
            cfg.patch_size,
            cfg.patch_size,
            cfg.temporal_patch_size,
            cfg.num_channels,
            cfg.hidden_size,
        )
        normal = nn.initializers.normal(cfg.initializer_range)
        kernel = self.param("kernel", normal, kernel_shape, self.param_dtype)
        bias_shape = (cfg.hidden_size,)
        bias = self.param("bias", nn.initializers.zeros, bias_shape, self.param_dtype)
        # All frames have the same pixels: one product with the sum of their kernels.
        image_kernel = jnp.sum(kernel, axis=2, dtype=wide_dtype(kernel.dtype))
        image_kernel = image_kernel.reshape(-1, cfg.hidden_size).astype(self.dtype)
        pixels = patches.astype(self.dtype).transpose(0, 1, 4, 3, 2)  # width, height, channels
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return pixels @ image_kernel + bias.astype(self.dtype)


class _QwenLayer(_QwenPart):
    """Attention and MLP, each after a norm and with a residual; the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, inputs: _LayerInputs) -> tuple[jax.Array, None]:
        x = name_layer_input(x, self.remat)
        normed = self.placement.constrain(layer_norm(self, name="norm1")(x), "inputs")
        x = x + _QwenAttention(*self.options, name="attn")(normed, inputs)
        normed = self.placement.constrain(layer_norm(self, name="norm2")(x), "inputs")
        mlp = TwoLayerMLP(*self.options, ("linear_fc1", "linear_fc2"), name="mlp")
        x = x + mlp(normed)
        return self.placement.constrain(x, "residual"), None


class _QwenAttention(_QwenPart):
    @nn.compact
    def __call__(self, x: jax.Array, inputs: _LayerInputs) -> jax.Array:
        d_model = x.shape[-1]
        heads_shape = (*x.shape[:2], self.config.num_attention_heads, -1)
        qkv = dense(self, 3 * d_model, name="qkv")(x)
        q, k, v = (
            self.placement.constrain(features.reshape(heads_shape), "heads")
            for features in jnp.split(qkv, 3, axis=-1)
        )
        q = rotate(q, inputs.angles)
        k = rotate(k, inputs.angles)
        out = attend_heads(self, AttentionInputs(q=q, k=k, v=v, mask=inputs.mask))
        return dense(self, d_model, name="proj")(out)


class _Merger(_QwenPart):
    """Merges a square of patches to one vector of the text model's width."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        x = layer_norm(self, name="norm")(x)
        square_size = cfg.hidden_size * cfg.spatial_merge_size**2
        squares = x.reshape(x.shape[0], -1, square_size)
        features = activate("gelu", dense(self, square_size, name="linear_fc1")(squares))
        return dense(self, cfg.out_hidden_size, name="linear_fc2")(features)


def _same_image_mask(image_of_patch: jax.Array) -> Mask:
    """Returns a mask within which only patches of the same image see each other."""
    mask = bidirectional_mask(jnp.ones(image_of_patch.shape, bool))
    return dataclasses.replace(
        mask,
        queries=mask.queries._replace(segments=image_of_patch),
        keys=mask.keys._replace(segments=image_of_patch),
    )


def _rotation_angles(
    coordinates: jax.Array, cfg: QwenVisionConfig, dtype: jax.typing.DTypeLike
) -> RopeAngles:
    """Returns the rotation angles of patches by rows and columns, [batch, n, 2]."""
    n_pairs = cfg.head_dim // 2
    exponents = np.arange(0, n_pairs, 2, dtype=np.float32) / np.float32(n_pairs)
    frequencies = np.float32(1.0) / np.float32(cfg.rope_theta) ** exponents
    angles = coordinates.astype(dtype)[..., None] * frequencies.astype(dtype)
    # [batch, n, 2, head_dim / 4]: one half of the pairs turns by the row, one by the column.
    angles = angles.reshape(*coordinates.shape[:2], 1, n_pairs)
    return RopeAngles(jnp.cos(angles), jnp.sin(angles))
