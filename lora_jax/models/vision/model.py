"""Image encoders in Flax Linen: ViT (Dosovitskiy et al. 2021), DINOv2 (Oquab et al. 2024)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.blocks import ModelPart, PatchProjection, activate, dense, layer_norm
from lora_jax.models.layers.encoder import LayerStack, SelfAttention, TwoLayerMLP, WrappedDense
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from lora_jax.models.layers.trunk import name_layer_input
from lora_jax.models.vision.config import VisionConfig


class VisionEncoder(ModelPart):
    """An image encoder with its head. Layers are scanned.

    Parameters are a plain nested dict under the names in Hugging Face's files, less the layer
    number: ``vit/encoder/layer/attention/attention/query/kernel`` is [layers, d_model, d_model].
    The convolution over patches is a product with
    ``vit/embeddings/patch_embeddings/projection/kernel``, [width, height, channels, d_model].

    Attributes:
      config: the options of the forward pass, and the head.
      dtype, param_dtype, remat, placement, attention: see ``Encoder``.
    """

    config: VisionConfig

    def setup(self) -> None:
        setattr(self, self.config.family.prefix, _Trunk(*self.options))
        if self.config.head == "classification":
            self.classifier = dense(self, self.config.num_labels, dtype=wide_dtype(self.dtype))

    def __call__(self, pixel_values: jax.Array, return_hidden: bool = False) -> jax.Array:
        """Encodes each image.

        Args:
          pixel_values: [batch, channels, height, width], as a processor returns them. For another
            height or width than the configuration's ``image_size``, the table of positions is
            resampled (bicubic).
          return_hidden: return the final hidden states instead of the head's output.

        Returns:
          Logits of classes, [batch, num_labels]; without a head the final hidden states,
          [batch, 1 + patches, d_model].

        Raises:
          ValueError: for another number of channels, or an image smaller than a patch.
        """
        cfg = self.config
        _, n_channels, height, width = pixel_values.shape
        holds_patch = min(cfg.grid_of(height, width)) >= 1
        if n_channels != cfg.num_channels or not holds_patch:
            raise ValueError(
                f"pixel_values has the shape {pixel_values.shape}. Pass an array of the shape "
                f"[batch, {cfg.num_channels}, height, width] that is at least as large as a patch "
                f"of {cfg.patch_size} pixels."
            )
        hidden: jax.Array = getattr(self, cfg.family.prefix)(pixel_values)
        if return_hidden or cfg.head == "none":
            return hidden
        image_vector = hidden[:, 0]  # of the image's own token
        if cfg.family.mean_patch:
            patches = hidden[:, 1:].astype(wide_dtype(hidden.dtype))
            mean_patch = jnp.mean(patches, axis=1).astype(image_vector.dtype)
            image_vector = jnp.concatenate([image_vector, mean_patch], axis=-1)
        logits: jax.Array = self.classifier(image_vector)
        return logits


class _VisionPart(ModelPart):
    config: VisionConfig


class _Trunk(_VisionPart):
    """Embeddings, scanned layers and the final norm."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = _Embeddings(*self.options, name="embeddings")(pixels)
        x = self.placement.constrain(x, "residual")
        mask = bidirectional_mask(jnp.ones(x.shape[:2], bool))
        layers = LayerStack(*self.options, layer=_Layer, name="encoder")
        return layer_norm(self, name="layernorm")(layers(x, mask))


class _Embeddings(_VisionPart):
    """The class token and the patches of an image, each with its position."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        cfg = self.config
        normal = nn.initializers.normal(cfg.initializer_range)
        image_token = self.param("cls_token", normal, (1, 1, cfg.hidden_size), self.param_dtype)
        patches = _Patches(*self.options, name="patch_embeddings")(pixels)
        table_shape = (1, cfg.max_tokens, cfg.hidden_size)
        table = self.param("position_embeddings", normal, table_shape, self.param_dtype)
        image_grid = cfg.grid_of(*pixels.shape[2:])
        positions = resample(table, cfg.grid, image_grid).astype(self.dtype)
        batch = patches.shape[0]
        image_tokens = jnp.broadcast_to(image_token.astype(self.dtype), (batch, 1, cfg.hidden_size))
        return jnp.concatenate([image_tokens, patches], axis=1) + positions


class _Patches(_VisionPart):
    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        size = self.config.patch_size
        out: jax.Array = PatchProjection(*self.options, size, name="projection")(pixels)
        return out


class _Layer(_VisionPart):
    """Attention and MLP, each after a norm and with a residual; the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> tuple[jax.Array, None]:
        family = self.config.family
        x = name_layer_input(x, self.remat)
        normed = layer_norm(self, name=family.attention_norm)(x)
        attention_out = _Attention(*self.options, name="attention")(normed, mask)
        x = x + self._scaled(1, attention_out)
        x = self.placement.constrain(x, "residual")
        normed = layer_norm(self, name=family.mlp_norm)(x)
        normed = self.placement.constrain(normed, "inputs")
        x = x + self._scaled(2, self._mlp(normed))
        return self.placement.constrain(x, "residual"), None

    @nn.nowrap  # adds no scope of its own to the program
    def _mlp(self, x: jax.Array) -> jax.Array:
        """Applies the MLP: one module, or two wrapped modules as in Hugging Face's ViT."""
        cfg = self.config
        is_one_module = "mlp" in cfg.family.mlp[0]
        if is_one_module:
            out: jax.Array = TwoLayerMLP(*self.options, name="mlp")(x)
            return out
        up_projection = WrappedDense(
            *self.options, features=cfg.intermediate_size, name="intermediate"
        )
        features = activate(cfg.hidden_act, up_projection(x))
        features = self.placement.constrain(features, "features")
        down_projection = WrappedDense(*self.options, name="output")
        out = down_projection(features)
        return out

    def _scaled(self, number: int, x: jax.Array) -> jax.Array:
        if not self.config.family.layer_scale:
            return x
        return _LayerScale(*self.options, name=f"layer_scale{number}")(x)


class _Attention(_VisionPart):
    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        attention = SelfAttention(*self.options, use_bias=self.config.qkv_bias, name="attention")
        attention_out = attention(self.placement.constrain(x, "inputs"), mask)
        out: jax.Array = WrappedDense(*self.options, name="output")(attention_out)
        return out


class _LayerScale(_VisionPart):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.config.hidden_size,)
        scale: jax.Array = self.param("lambda1", nn.initializers.ones, shape, self.param_dtype)
        return x * scale.astype(x.dtype)


_A = -0.75  # torch's parameter of the cubic kernel (Keys 1981)


def resample(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Returns a position table resampled to another grid of patches.

    Args:
      table: [1, 1 + rows * columns, d_model]; the first position is that of the whole image.
      grid: rows and columns of patches in the table.
      new_grid: rows and columns to return.

    Returns:
      [1, 1 + rows * columns of `new_grid`, d_model], in the table's dtype. It is computed in fp32.
    """
    if grid == new_grid:
        return table
    patches = table[0, 1:].reshape(*grid, -1).astype(jnp.float32)  # [rows, columns, d_model]
    row_weights = cubic_weights(grid[0], new_grid[0])
    column_weights = cubic_weights(grid[1], new_grid[1])
    out = jnp.einsum("yr,xc,rcd->yxd", row_weights, column_weights, patches)
    out = out.reshape(1, -1, table.shape[-1]).astype(table.dtype)
    return jnp.concatenate([table[:, :1], out], axis=1)


def cubic_weights(old_size: int, new_size: int) -> np.ndarray:
    """Returns the cubic interpolation weights along an axis, [new_size, old_size] fp32.

    Source: torch's ``interpolate(mode="bicubic", align_corners=False)``, without antialiasing;
    indices beyond an edge repeat the edge.
    """
    weights = np.zeros((new_size, old_size))
    new_indices = np.arange(new_size)
    positions = (new_indices + 0.5) * old_size / new_size - 0.5
    for offset in range(-1, 3):
        neighbours = np.floor(positions).astype(int) + offset
        distance = np.abs(positions - neighbours)
        inner_kernel = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1  # up to a distance of 1
        outer_kernel = _A * (((distance - 5) * distance + 8) * distance - 4)
        kernel = np.where(distance <= 1, inner_kernel, outer_kernel)
        old_indices = np.clip(neighbours, 0, old_size - 1)
        np.add.at(weights, (new_indices, old_indices), kernel)
    return weights.astype(np.float32)
