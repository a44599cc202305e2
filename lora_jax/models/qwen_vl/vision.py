"""Qwen3.5's encoder of images in Flax Linen: patches of images of any size, side by side in a row.

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
from lora_jax.models.layers.trunk import layer_input, scan_layers
from lora_jax.models.qwen_vl.config import QwenVisionConfig
from lora_jax.models.qwen_vl.grids import PatchPlaces, patch_places


class _Step(NamedTuple):
    """The input that all layers share: the patches that each may see, and their rotations."""

    mask: Mask
    angles: RopeAngles


class _QwenPart(ModelPart):
    config: QwenVisionConfig


class QwenVision(_QwenPart):
    """Returns a vector for each square of patches, as wide as the text's."""

    @nn.compact
    def __call__(self, patches: jax.Array, grids: jax.Array) -> jax.Array:
        """Encodes each row's images.

        Args:
          patches: [batch, n, channels, height, width], square by square; see ``grids``.
          grids: [batch, images, 2] int32, rows and columns of patches.

        Returns:
          [batch, n / merge², d_model of the text].
        """
        cfg, args = self.config, self.options
        places = patch_places(grids, patches.shape[1], cfg.spatial_merge_size)
        x = _PatchEmbedding(*args, name="patch_embed")(patches)
        x = self.placement.constrain(x + self._positions(places), "residual")
        step = _Step(_mask(places.image), _angles(places.at, cfg, wide_dtype(self.dtype)))
        layers = scan_layers(_QwenLayer, self.remat, cfg.num_hidden_layers, nn.broadcast)
        x, _ = layers(*args, name="blocks")(x, step)
        vectors: jax.Array = _Merger(*args, name="merger")(x)
        return vectors

    def _positions(self, places: PatchPlaces) -> jax.Array:
        """Returns the vectors of positions, [batch, n, d_model], bilinear between four of them."""
        cfg = self.config
        dtype = wide_dtype(self.dtype)
        table = embed(self, cfg.num_position_embeddings, name="pos_embed")
        max_index = cfg.side - 1
        # The corners of an image have the positions of the table's corners.
        image_steps = jnp.maximum(places.sizes - 1, 1).astype(dtype)
        table_places = places.at.astype(dtype) * max_index / image_steps
        low = jnp.clip(jnp.floor(table_places).astype(jnp.int32), 0, max_index)
        high = jnp.minimum(low + 1, max_index)
        high_weight = table_places - jnp.floor(table_places)
        neighbours = ((low, 1 - high_weight), (high, high_weight))
        out = jnp.zeros((*low.shape[:2], cfg.hidden_size), dtype)
        for row_index, row_weight in neighbours:
            for column_index, column_weight in neighbours:
                vectors = table(row_index[..., 0] * cfg.side + column_index[..., 1]).astype(dtype)
                weight = row_weight[..., 0] * column_weight[..., 1]
                out = out + vectors * weight[..., None]
        return out.astype(self.dtype)


class _PatchEmbedding(_QwenPart):
    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        x: jax.Array = _FrameProjection(*self.options, name="proj")(patches)
        return x


class _FrameProjection(_QwenPart):
    """A product with each patch's pixels; of an image, all frames are equal.

    Its kernel is [width, height, frames, channels, d_model].
    """

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        cfg = self.config
        side, frames = cfg.patch_size, cfg.temporal_patch_size
        shape = (side, side, frames, cfg.num_channels, cfg.hidden_size)
        normal = nn.initializers.normal(cfg.initializer_range)
        kernel = self.param("kernel", normal, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype)
        image_kernel = jnp.sum(kernel, axis=2, dtype=wide_dtype(kernel.dtype))
        image_kernel = image_kernel.reshape(-1, cfg.hidden_size).astype(self.dtype)
        x = patches.astype(self.dtype).transpose(0, 1, 4, 3, 2)
        return x.reshape(*x.shape[:2], -1) @ image_kernel + bias.astype(self.dtype)


class _QwenLayer(_QwenPart):
    """Attention and MLP of the normalised input, each added to it: a scan's body."""

    @nn.compact
    def __call__(self, x: jax.Array, step: _Step) -> tuple[jax.Array, None]:
        args, x = self.options, layer_input(x, self.remat)
        normed = self.placement.constrain(layer_norm(self, name="norm1")(x), "inputs")
        x = x + _QwenAttention(*args, name="attn")(normed, step)
        normed = self.placement.constrain(layer_norm(self, name="norm2")(x), "inputs")
        x = x + TwoLayerMLP(*args, ("linear_fc1", "linear_fc2"), name="mlp")(normed)
        return self.placement.constrain(x, "residual"), None


class _QwenAttention(_QwenPart):
    @nn.compact
    def __call__(self, x: jax.Array, step: _Step) -> jax.Array:
        width = x.shape[-1]
        n_heads = self.config.num_attention_heads
        fused = dense(self, 3 * width, name="qkv")(x)
        q, k, v = (
            self.placement.constrain(features.reshape(*x.shape[:2], n_heads, -1), "heads")
            for features in jnp.split(fused, 3, axis=-1)
        )
        q = rotate(q, step.angles)
        k = rotate(k, step.angles)
        out = attend_heads(self, AttentionInputs(q, k, v, step.mask))
        return dense(self, width, name="proj")(out)


class _Merger(_QwenPart):
    """Joins a square of patches to one vector, and maps it to the text's width."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        x = layer_norm(self, name="norm")(x)
        joined = cfg.hidden_size * cfg.spatial_merge_size**2
        x = x.reshape(x.shape[0], -1, joined)
        x = activate("gelu", dense(self, joined, name="linear_fc1")(x))
        return dense(self, cfg.out_hidden_size, name="linear_fc2")(x)


def _mask(image: jax.Array) -> Mask:
    """Returns the mask of patches of the same image; patches of no image see each other."""
    mask = bidirectional_mask(jnp.ones(image.shape, bool))
    return dataclasses.replace(
        mask,
        queries=mask.queries._replace(segments=image),
        keys=mask.keys._replace(segments=image),
    )


def _angles(at: jax.Array, cfg: QwenVisionConfig, dtype: jax.typing.DTypeLike) -> RopeAngles:
    """Returns the rotations of patches by their rows and columns, [batch, n, 2]."""
    half = cfg.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    freqs = np.float32(1.0) / np.float32(cfg.rope_theta) ** exponents
    angles = at.astype(dtype)[..., None] * freqs.astype(dtype)  # [batch, n, 2, head_dim / 4]
    angles = angles.reshape(*at.shape[:2], 1, half)
    return RopeAngles(jnp.cos(angles), jnp.sin(angles))
