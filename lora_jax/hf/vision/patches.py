"""Cuts images of any size into patches as Qwen2-VL's processor does, which Qwen3.5 uses, too."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.images import (
    ImageError,
    ImageLike,
    ImageProcessor,
    make_pixel_processor,
    open_image,
)

PatchGrid = tuple[int, int]  # rows and columns of patches

_PATCH_FIELDS = frozenset(
    "size min_pixels max_pixels patch_size temporal_patch_size merge_size".split()
)
_DEFAULTS = {
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Pixels of an image, where the file does not say.
_MIN_PIXELS = 56 * 56
_MAX_PIXELS = 28 * 28 * 1280
_MAX_ASPECT_RATIO = 200  # of the longer edge to the shorter one


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchProcessor:
    """Converts an image to patches.

    Attributes:
      tile: makes pixel values of patches.
      least, most: the pixels that an image has after resizing.
      merge: the patches along a side of a square that becomes one token.
      frames: the equal frames that a patch's kernel takes.
    """

    tile: ImageProcessor
    min_pixels: int
    most: int
    merge: int
    frames: int

    @classmethod
    def from_hf(cls, fields: Fields) -> "PatchProcessor":
        """Reads the fields of a preprocessor_config.json like Qwen2-VL's.

        Args:
          fields: the parsed file.

        Raises:
          ConfigError: names the fields that are not supported, or not known.
        """
        if not fields.get("do_resize", True):
            raise ConfigError(
                "do_resize=False is not supported, because edges must be whole patches."
            )
        size = fields.get("size") or {}
        if not isinstance(size, dict) or set(size) - {"shortest_edge", "longest_edge"}:
            raise ConfigError(f"size is {size!r}. Set shortest_edge and longest_edge in it.")
        min_pixels = fields.get("min_pixels") or size.get("shortest_edge", _MIN_PIXELS)
        max_pixels = fields.get("max_pixels") or size.get("longest_edge", _MAX_PIXELS)
        pixels = (min_pixels, max_pixels)
        patch_side = fields.get("patch_size", 14)
        merge = fields.get("merge_size", 2)
        frames = fields.get("temporal_patch_size", 2)
        sides = [patch_side, merge, frames]
        if not all(isinstance(number, int) and number > 0 for number in (*pixels, *sides)):
            raise ConfigError(
                f"min_pixels and max_pixels are {pixels}, and patch_size, merge_size and "
                f"temporal_patch_size are {sides}. Set each to a positive integer."
            )
        tile_fields = {name: value for name, value in fields.items() if name not in _PATCH_FIELDS}
        return cls(
            tile=ImageProcessor.from_hf({**_DEFAULTS, **tile_fields, "size": patch_side}),
            min_pixels=min_pixels,
            most=max_pixels,
            merge=merge,
            frames=frames,
        )

    def tiles(self, image: ImageLike) -> tuple[np.ndarray, PatchGrid]:
        """Returns an image's patches, [n, channels, side, side] uint8, and their grid.

        Patches lie a square of ``merge`` patches a side after the other.

        Args:
          image: see ``ImageProcessor.pixels``.

        Raises:
          ImageError: the image cannot be read, or is too long; says why.
        """
        image = open_image(image)
        width, height = image.size
        is_too_long = max(height, width) > _MAX_ASPECT_RATIO * min(height, width)
        if is_too_long:
            raise ImageError(
                f"it has {width} x {height} pixels, but an edge may be at most "
                f"{_MAX_ASPECT_RATIO} times as long as the other. Crop it"
            )
        features = self._processor(image)
        _, rows, columns = features["image_grid_thw"][0].tolist()
        patches = features["pixel_values"].astype(np.uint8)
        return patches.reshape(-1, *self.tile.shape), (rows, columns)

    @functools.cached_property
    def _processor(self) -> Any:
        """The transformers image processor that resizes images and cuts patches."""
        return make_pixel_processor(
            "qwen2_vl",
            "Qwen2VL",
            size={"shortest_edge": self.min_pixels, "longest_edge": self.most},
            resample=self.tile.resample,
            patch_size=self.tile.shape[1],
            merge_size=self.merge,
            temporal_patch_size=1,  # the frames are equal: one of them is enough
        )


@dataclasses.dataclass(frozen=True)
class PatchReader:
    """Reads images of any size for a language model; see ``ImageReader``.

    Attributes:
      processor: makes the patches.
      tokenizer: the model's.
      token: the token of each square of patches, and of an image in a rendered chat.
    """

    processor: PatchProcessor
    tokenizer: Any
    token: int

    def written(self, grid: PatchGrid) -> np.ndarray:
        """Returns the tokens that stand for an image with this patch grid: [n] int32."""
        n_tokens = self.count(grid) // self.processor.merge**2
        return np.full(n_tokens, self.token, np.int32)

    def count(self, grid: PatchGrid) -> int:
        """Returns the number of patches of an image with this grid."""
        return grid[0] * grid[1]

    def room(self, n: int) -> int:
        """Returns the padded number of patches of a row: few different sizes, whole squares."""
        square = self.processor.merge**2
        power_of_two = 1 << max(0, (n - 1).bit_length() - 3)  # n / 8 to n / 4
        step = math.lcm(max(square, power_of_two), square)
        n_steps = max(1, -(-n // step))
        return n_steps * step

    def inputs(
        self, tiles: np.ndarray, grids: Sequence[PatchGrid], most: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Returns the model inputs for the images of a row.

        Args:
          tiles: the images' patches, [n, channels, side, side] uint8.
          grids: the grid of each image.
          most: the patches and the images that the row has room for.

        Returns:
          pixel_values, [patches, channels, side, side] fp32, and image_grids, [images, 2] int32;
          0 behind the last.
        """
        max_patches, max_images = most
        pixel_values = np.zeros((max_patches, *self.processor.tile.shape), np.float32)
        pixel_values[: len(tiles)] = self.processor.tile.values(tiles)
        image_grids = np.zeros((max_images, 2), np.int32)
        image_grids[: len(grids)] = np.reshape(grids, (-1, 2))
        return {"pixel_values": pixel_values, "image_grids": image_grids}

    def describe(self, images: int, tiles: int, most: int) -> str:
        """Returns the number of images and patches as text."""
        size = " x ".join(map(str, self.processor.tile.shape[1:]))
        return (
            f"{images:,} images, in {tiles:,} patches of {size} pixels, "
            f"{self.processor.merge**2} a token; each row has room for {most} patches"
        )
