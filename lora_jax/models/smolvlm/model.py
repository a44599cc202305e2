"""SmolVLM in Flax Linen (Marafioti et al. 2025): SigLIP, pixel shuffle, a linear layer, a Llama."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.causal import CausalLM, output_head
from lora_jax.models.decoder.model import Trunk
from lora_jax.models.layers.blocks import (
    ModelPart,
    PatchProjection,
    dense,
    embed,
    layer_norm,
)
from lora_jax.models.layers.cache import NewEntries
from lora_jax.models.layers.encoder import LayerStack, SelfAttention, TwoLayerMLP
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from lora_jax.models.layers.trunk import name_layer_input
from lora_jax.models.smolvlm.config import SiglipConfig, SmolVLMConfig

_QKV = ("q_proj", "k_proj", "v_proj")


class SmolVLM(CausalLM):
    """A causal language model that reads images, with the interface of ``Decoder``.

    With ``pixel_values``, [batch, images, channels, image_size, image_size], each image becomes
    ``tokens_per_image`` vectors, which take the places of the row's tokens ``image_token_id``, in
    their order. A row with fewer images than others has any pixels at the end. More such tokens
    than vectors give NaN.

    Parameters are a plain nested dict under Hugging Face's module names, less the layers' numbers:
    ``model/text_model/…`` as in ``Decoder``, ``model/vision_model/…`` and ``model/connector/…``.

    Attributes:
      config: the options of the forward pass.
      dtype, param_dtype, remat, placement, attention: see ``Decoder``.
    """

    config: SmolVLMConfig
    TRUNK = "model"

    def setup(self) -> None:
        self.model = _Trunk(*self.options)
        self.lm_head = output_head(self)


class _Trunk(ModelPart):
    """The module without the head."""

    config: SmolVLMConfig
    n_positions = None

    def setup(self) -> None:
        config = self.config
        options = self.options[1:]  # but for the configuration
        self.vision_model = _Vision(config.vision, *options)
        self.connector = _Connector(*self.options)
        self.text_model = Trunk(config.text, *options)

    @property
    def words(self) -> nn.Embed:
        words: nn.Embed = self.text_model.words
        return words

    def __call__(
        self,
        input_ids: jax.Array,
        *text_arguments: Any,
        pixel_values: jax.Array | None = None,
    ) -> tuple[jax.Array, NewEntries]:
        image_vectors = None
        if pixel_values is not None or self.is_initializing():
            image_vectors = self._encode_images(input_ids.shape[0], pixel_values)
        is_image_token = input_ids == self.config.image_token_id
        arguments = (*text_arguments, is_image_token, image_vectors)
        return self.text_model(input_ids, *arguments)

    def _encode_images(self, batch: int, pixels: jax.Array | None) -> jax.Array:
        """Returns the vectors of each row's images, [batch, n, d_model]."""
        vision = self.config.vision
        image_shape = (vision.num_channels, vision.image_size, vision.image_size)
        if pixels is None:
            pixels = jnp.zeros((batch, 1, *image_shape), self.dtype)
        if pixels.ndim != 5 or pixels.shape[2:] != image_shape or pixels.shape[0] != batch:
            raise ValueError(
                f"pixel_values has the shape {pixels.shape}. Pass an array of the shape [{batch}, "
                f"images, {', '.join(map(str, image_shape))}]."
            )
        images = pixels.reshape(-1, *image_shape)
        vectors = self.connector(self.vision_model(images))
        return vectors.reshape(batch, -1, vectors.shape[-1])


class _Connector(ModelPart):
    """Merges a square of patches to one vector of the decoder's width."""

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        batch = patches.shape[0]
        square_side = self.config.scale_factor
        squares_a_side = self.config.vision.side // square_side
        grid = patches.reshape(batch, squares_a_side, square_side, squares_a_side, square_side, -1)
        squares = grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, squares_a_side**2, -1)
        out: jax.Array = _Projection(*self.options, name="modality_projection")(squares)
        return out


class _Projection(ModelPart):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(self, self.config.text.hidden_size, use_bias=False, name="proj")(x)


class _SiglipPart(ModelPart):
    config: SiglipConfig


class _Vision(_SiglipPart):
    """SigLIP's encoder: patches with positions, scanned layers and the final norm."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = _Embeddings(*self.options, name="embeddings")(pixels)
        x = self.placement.constrain(x, "residual")
        mask = bidirectional_mask(jnp.ones(x.shape[:2], bool))
        layers = LayerStack(*self.options, layer=_Layer, stack="layers", name="encoder")
        return layer_norm(self, name="post_layernorm")(layers(x, mask))


class _Embeddings(_SiglipPart):
    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        cfg = self.config
        patch_sides = (cfg.patch_size, cfg.patch_size)
        patches = PatchProjection(*self.options, patch_sides, name="patch_embedding")(pixels)
        n_patches = cfg.side**2
        position_table = embed(self, n_patches, name="position_embedding")
        embeddings: jax.Array = patches + position_table(jnp.arange(n_patches))
        return embeddings


class _Layer(_SiglipPart):
    """Attention and MLP, each after a norm and with a residual; the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> tuple[jax.Array, None]:
        x = name_layer_input(x, self.remat)
        normed = self.placement.constrain(layer_norm(self, name="layer_norm1")(x), "inputs")
        attention = SelfAttention(*self.options, _QKV, "out_proj", name="self_attn")
        x = x + attention(normed, mask)
        normed = self.placement.constrain(layer_norm(self, name="layer_norm2")(x), "inputs")
        x = x + TwoLayerMLP(*self.options, name="mlp")(normed)
        return self.placement.constrain(x, "residual"), None
