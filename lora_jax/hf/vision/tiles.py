"""Cuts images into square tiles as the processors of SmolVLM and Idefics 3 do.

"Writing" an image is the tokens that stand for it: one for each vector that the model makes of it,
and those around them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.images import ImageLike, ImageProcessor, make_pixel_processor, open_image

Grid = tuple[int, int]  # rows and columns of tiles; (0, 0) for an image that is not cut

_MAX_EDGE = 4096  # pixels of the longest edge: transformers makes longer ones smaller
_SPLIT_FIELDS = frozenset(  # read here, or without an effect
    """
    size do_resize do_image_splitting max_image_size do_pad video_sampling return_row_col_info
    """.split()
)
_DEFAULTS = {"resample": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileProcessor:
    """Converts an image to tiles.

    Attributes:
      tile: resizes to a tile, and makes pixel values.
      longest_edge: pixels that the longer edge is resized to first; None to keep the image's size.
      split: whether an image that is larger than a tile becomes several, and the whole one last.
    """

    tile: ImageProcessor
    longest_edge: int | None
    split: bool

    @classmethod
    def from_hf(cls, fields: Fields) -> "TileProcessor":
        """Reads the fields of a preprocessor_config.json of SmolVLM or Idefics 3.

        Args:
          fields: the parsed file.

        Raises:
          ConfigError: names the fields that are not supported, or not known.
        """
        tile_side = _read_longest_edge(fields, "max_image_size", 364)
        tile_fields = {name: value for name, value in fields.items() if name not in _SPLIT_FIELDS}
        is_resized = fields.get("do_resize", True)
        return cls(
            tile=ImageProcessor.from_hf({**_DEFAULTS, **tile_fields, "size": tile_side}),
            longest_edge=_read_longest_edge(fields, "size", 4 * 364) if is_resized else None,
            split=bool(fields.get("do_image_splitting", True)),
        )

    def tiles(self, image: ImageLike) -> tuple[np.ndarray, Grid]:
        """Returns an image's tiles, [n, channels, side, side] uint8, and their grid.

        Args:
          image: see ``ImageProcessor.pixels``.

        Raises:
          ImageError: the image cannot be read; says why.
        """
        features = self._processor(open_image(image))
        grid = (features["rows"][0][0], features["cols"][0][0])
        return np.stack(features["pixel_values"][0]), grid

    @functools.cached_property
    def _processor(self) -> Any:
        """The transformers image processor that resizes images and cuts tiles."""
        side = self.tile.shape[1]
        return make_pixel_processor(
            "idefics3",
            "Idefics3",
            do_resize=self.longest_edge is not None,
            size={"longest_edge": self.longest_edge or side},
            resample=self.tile.resample,
            do_image_splitting=self.split,
            max_image_size={"longest_edge": side},
            do_pad=False,
            return_row_col_info=True,
        )


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads images for a language model: their tiles, and the tokens that stand for them.

    Attributes:
      processor: makes the tiles.
      tokenizer: the model's.
      token: the token of each vector of a tile, and of an image in a rendered chat.
      per_tile: the number of vectors of a tile.
    """

    processor: TileProcessor
    tokenizer: Tokenizer
    token: int
    per_tile: int

    @functools.lru_cache(maxsize=64)  # noqa: B019  (readers live as long as the process)
    def written(self, grid: Grid) -> np.ndarray:
        """Returns the tokens that stand for an image with this tile grid: [n] int32."""
        image = getattr(self.tokenizer, "image_token", "<image>")
        border = getattr(self.tokenizer, "fake_image_token", "<fake_token_around_image>")
        global_image = getattr(self.tokenizer, "global_image_token", "<global-img>")
        tile = image * self.per_tile
        n_rows, n_columns = grid
        lines = []
        for row in range(1, n_rows + 1):
            tiles = [f"{border}<row_{row}_col_{col}>{tile}" for col in range(1, n_columns + 1)]
            lines.append("".join(tiles) + "\n")
        if lines:
            lines.append("\n")
        text = "".join(lines) + f"{border}{global_image}{tile}{border}"
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def count(self, grid: Grid) -> int:
        """Returns the number of tiles of an image with this grid."""
        return grid[0] * grid[1] + 1

    def room(self, n: int) -> int:
        """Returns the padded number of tiles of a row."""
        return n

    def inputs(
        self, tiles: np.ndarray, grids: Sequence[Grid], most: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Returns the model inputs for the images of a row.

        Args:
          tiles: the images' tiles, [n, channels, side, side] uint8.
          grids: the grid of each image.
          most: the tiles and the images that the row has room for.

        Returns:
          pixel_values, [tiles, channels, side, side] fp32; 0 behind the last.
        """
        max_tiles, _ = most
        pixel_values = np.zeros((max_tiles, *self.processor.tile.shape), np.float32)
        pixel_values[: len(tiles)] = self.processor.tile.values(tiles)
        return {"pixel_values": pixel_values}

    def describe(self, images: int, tiles: int, most: int) -> str:
        """Returns the number of images and tiles as text."""
        size = " x ".join(map(str, self.processor.tile.shape[1:]))
        return (
            f"{images:,} images, in {tiles:,} tiles of {size} pixels and {self.per_tile} tokens "
            f"each; each row has room for {most} tiles"
        )


def _read_longest_edge(fields: Fields, name: str, default: int) -> int:
    """Returns the longest edge in a field, in pixels."""
    size: Any = fields.get(name) or {"longest_edge": default}
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if not isinstance(edge, int) or not 0 < edge <= _MAX_EDGE:
        raise ConfigError(f"{name} is {size!r}. Set its longest_edge, from 1 to {_MAX_EDGE}.")
    return edge
