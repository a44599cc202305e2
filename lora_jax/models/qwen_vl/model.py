"""Qwen3.5 with images in Flax Linen: an image encoder, a decoder with linear layers, and M-RoPE."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.causal import CausalLM, output_head
from lora_jax.models.decoder.experts import Experts, check_experts
from lora_jax.models.decoder.model import Trunk
from lora_jax.models.layers.blocks import ModelPart
from lora_jax.models.layers.cache import Cache, NewEntries
from lora_jax.models.layers.trunk import TokenPlaces, place_tokens
from lora_jax.models.qwen_vl.config import QwenVLConfig
from lora_jax.models.qwen_vl.grids import token_places
from lora_jax.models.qwen_vl.vision import QwenVision


class QwenVL(CausalLM):
    """A causal language model that reads images of any size, with the interface of ``Decoder``.

    With ``pixel_values``, [batch, patches, channels, patch_size, patch_size], and ``image_grids``,
    [batch, images, 2] int, the rows and columns of patches of each image, each square of
    ``spatial_merge_size`` patches a side becomes a vector, which takes the place of the row's next
    token ``image_token_id``. Patches lie square by square, image by image; a row with fewer than
    others has any pixels at the end, and grids (0, 0). More such tokens than vectors give NaN. A
    row is one sequence, and its positions follow from its images.

    Parameters are a plain nested dict under Hugging Face's module names, less the layers' numbers:
    ``model/language_model/…`` as in ``Decoder``, and ``model/visual/…``.

    Attributes:
      config: the options of the forward pass.
      dtype, param_dtype, remat, placement, attention, experts: see ``Decoder``.
    """

    config: QwenVLConfig
    experts: str | Experts = "auto"
    TRUNK = "model"

    def setup(self) -> None:
        check_experts(self.config, self.experts)
        self.model = _QwenTrunk(*self.options, experts=self.experts)
        self.lm_head = output_head(self)

    @nn.nowrap
    def find_token_places(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        cache: Cache | None,
        segment_ids: jax.Array | None,
        **inputs: Any,
    ) -> TokenPlaces:
        """Returns the tokens' positions, with three RoPE axes if there are images.

        A token's position is the largest of the three, so that a cache goes on from its images.
        """
        cfg = self.config
        grids = inputs.get("image_grids")
        if grids is None:
            return place_tokens(input_ids, attention_mask, positions, cache, segment_ids)
        self._check_grids(input_ids.shape[0], grids)
        is_present = jnp.ones(input_ids.shape, bool)
        if attention_mask is not None:
            is_present = attention_mask.astype(bool)
        token_grids = grids.astype(jnp.int32) // cfg.vision.spatial_merge_size
        coordinates = token_places(input_ids == cfg.image_token_id, is_present, token_grids)
        if cache is not None:
            coordinates = coordinates + cache.length[:, None, None]
        positions = jnp.max(coordinates, axis=-1)
        places = place_tokens(input_ids, attention_mask, positions, cache, segment_ids)
        return places._replace(rope_positions=coordinates[..., cfg.rotated_by])

    @nn.nowrap
    def _check_grids(self, batch: int, grids: jax.Array) -> None:
        """Raises a ValueError for image grids that are not [batch, images, 2]."""
        has_grid_shape = grids.ndim == 3 and grids.shape[0] == batch and grids.shape[2] == 2
        if not has_grid_shape:
            raise ValueError(
                f"image_grids has the shape {grids.shape}. Pass the rows and columns of patches of "
                f"each image, an array of the shape [{batch}, images, 2]."
            )


class _QwenTrunk(ModelPart):
    """The module without the head."""

    config: QwenVLConfig
    experts: str | Experts = "auto"
    n_positions = None

    def setup(self) -> None:
        config = self.config
        options = self.options[1:]  # but for the configuration
        self.visual = QwenVision(config.vision, *options)
        self.language_model = Trunk(config.text, *options, experts=self.experts)

    @property
    def words(self) -> nn.Embed:
        words: nn.Embed = self.language_model.words
        return words

    def __call__(
        self,
        input_ids: jax.Array,
        *text_arguments: Any,
        pixel_values: jax.Array | None = None,
        image_grids: jax.Array | None = None,
        routing: jax.Array | None = None,
    ) -> tuple[jax.Array, NewEntries]:
        image_vectors = None
        has_images = pixel_values is not None or image_grids is not None
        if has_images or self.is_initializing():
            image_vectors = self._encode_images(input_ids.shape[0], pixel_values, image_grids)
        is_image_token = input_ids == self.config.image_token_id
        arguments = (*text_arguments, is_image_token, image_vectors, routing)
        return self.language_model(input_ids, *arguments)

    def _encode_images(
        self, batch: int, patches: jax.Array | None, grids: jax.Array | None
    ) -> jax.Array:
        """Returns the vectors of each row's images, [batch, n, d_model]."""
        vision = self.config.vision
        square_patches = vision.spatial_merge_size**2
        if self.is_initializing() and patches is None and grids is None:
            patches = jnp.zeros((batch, square_patches, *vision.patch_shape), self.dtype)
            grids = jnp.full((batch, 1, 2), vision.spatial_merge_size, jnp.int32)
        has_patch_shape = (
            patches is not None
            and patches.ndim == 5
            and patches.shape[0] == batch
            and patches.shape[1] % square_patches == 0
            and patches.shape[2:] == vision.patch_shape
        )
        if patches is None or not has_patch_shape:
            found_shape = None if patches is None else patches.shape
            raise ValueError(
                f"pixel_values has the shape {found_shape}. Pass an array of the shape [{batch}, "
                f"patches, {', '.join(map(str, vision.patch_shape))}], with whole squares of "
                f"{square_patches} patches."
            )
        if grids is None:
            raise ValueError(
                "pixel_values are given without image_grids. Pass image_grids, the rows and "
                "columns of patches of each image."
            )
        vectors: jax.Array = self.visual(patches, grids.astype(jnp.int32))
        return vectors
