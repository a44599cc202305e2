"""Images of chats: read once, expanded to tokens, and passed to batches as pixel values."""

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lora_jax.hf.images import ImageError
from lora_jax.hf.vision.readers import AnyReader
from lora_jax.hf.vision.tiles import Grid
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.errors import TrainingError

_MAX_NAMED = 5  # broken images that a message names
_BLOCK = 64  # tiles that are hashed at once


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """The images of rows.

    Attributes:
      reader: the model's.
      grids: the grid of each image, by row.
      pixels: [tiles, channels, height, width] uint8, in the order of rows and images.
    """

    reader: AnyReader
    grids: Sequence[Sequence[Grid]]
    pixels: np.ndarray

    @functools.cached_property
    def tile_starts(self) -> np.ndarray:
        """Returns the index of each row's first tile, and the total: [n + 1]."""
        tile_counts = [sum(map(self.reader.count, row_grids)) for row_grids in self.grids]
        return np.concatenate([[0], np.cumsum(tile_counts, dtype=np.int64)])

    def expand(self, tokens: TokenSequence, name: str, *, whole: bool = True) -> TokenSequence:
        """Returns a row's tokens with image tokens inserted, which the loss does not count.

        Args:
          tokens: with one token for each image.
          name: the row's name in errors.
          whole: whether all images of the row have to be there.

        Raises:
          TrainingError: there are more such tokens than images, or less.
        """
        (image_indices,) = np.nonzero(tokens.ids == self.reader.token)
        grids = self.grids[tokens.row - 1]
        n_places = len(image_indices)
        is_image_missing = n_places > len(grids)
        is_image_unused = whole and n_places < len(grids)
        if is_image_missing or is_image_unused:
            raise TrainingError(
                f"{name} has {len(grids)} images, but its rendered chat has {n_places} places for "
                "them. Either the chat template omits some images, or a text has the token for an "
                "image, or images follow the last answer. Correct the row."
            )
        ids_of_images = [self.reader.written(grid) for grid in grids[:n_places]]
        # Each token is repeated as often as it has tokens; those of images are then written over.
        repeats = np.ones(len(tokens), np.int64)
        repeats[image_indices] = [len(image_ids) for image_ids in ids_of_images]
        ids = np.repeat(tokens.ids, repeats)
        counts = np.repeat(tokens.counts, repeats)
        image_ends = np.cumsum(repeats)[image_indices].tolist()
        for image_ids, end in zip(ids_of_images, image_ends, strict=True):
            start = end - len(image_ids)
            ids[start:end] = image_ids
            counts[start:end] = False
        return dataclasses.replace(tokens, ids=ids, counts=counts)

    def tiles_of(self, row: int) -> np.ndarray:
        """Returns the tiles of a row, by its number from 1: [n, channels, height, width] uint8."""
        return self.pixels[self.tile_starts[row - 1] : self.tile_starts[row]]


@dataclasses.dataclass(frozen=True, eq=False)
class PixelValues:
    """Passes the images of rows to batches; see ``Packs.further``.

    Attributes:
      parts: the images of each data set.
      rows: [n] int arrays, one a data set: the numbers, from 1, of the rows that train.
    """

    parts: Sequence[Pictures]
    rows: Sequence[np.ndarray]

    @functools.cached_property
    def max_tiles(self) -> int:
        """Returns the padded number of tiles of each row."""
        max_tiles = 1
        for pictures, rows in zip(self.parts, self.rows, strict=True):
            tile_counts = np.diff(pictures.tile_starts)[rows - 1]
            max_tiles = max(max_tiles, int(tile_counts.max(initial=1)))
        return self.parts[0].reader.room(max_tiles)

    @functools.cached_property
    def max_images(self) -> int:
        """Returns the largest number of images in a row, at least 1."""
        max_images = 1
        for pictures, rows in zip(self.parts, self.rows, strict=True):
            for row in rows.tolist():
                max_images = max(max_images, len(pictures.grids[row - 1]))
        return max_images

    def arrays(self, origin: int, row: int) -> HostBatch:
        """Returns the image inputs of a row, padded to the largest row."""
        pictures = self.parts[origin]
        room = (self.max_tiles, self.max_images)
        return pictures.reader.inputs(pictures.tiles_of(row), pictures.grids[row - 1], room)

    def digest(self) -> str:
        """Returns a fingerprint of all images and of their processing."""
        sha = hashlib.sha256()
        for pictures in self.parts:
            sha.update(f"{pictures.reader.processor}{pictures.grids}".encode())
            for start in range(0, len(pictures.pixels), _BLOCK):
                sha.update(pictures.pixels[start : start + _BLOCK].tobytes())
        return sha.hexdigest()


class RowImages(NamedTuple):
    """The images of one row: [n, channels, height, width] uint8 tiles, and each image's grid."""

    tiles: np.ndarray
    grids: Sequence[Grid]


def image_inputs(rows: Sequence[RowImages], reader: AnyReader) -> dict[str, np.ndarray]:
    """Returns the image inputs of rows, padded to the row with most images."""
    max_tiles = reader.room(max(len(row.tiles) for row in rows))
    max_images = max(len(row.grids) for row in rows)
    row_inputs = [reader.inputs(row.tiles, row.grids, (max_tiles, max_images)) for row in rows]
    stacked: dict[str, np.ndarray] = {}
    for name in row_inputs[0]:
        stacked[name] = np.stack([inputs[name] for inputs in row_inputs])
    return stacked


def read_pictures(
    rows: Sequence[Sequence[Any]],
    names: Sequence[str],
    reader: AnyReader,
) -> Pictures:
    """Reads the images of rows, in threads, into a memory-mapped temporary file.

    Args:
      rows: the images of each row; see ``ImageProcessor.pixels``.
      names: the rows' names in errors.
      reader: the model's.

    Raises:
      TrainingError: some cannot be read; names the first of them.
    """
    grids: list[list[Grid]] = [[] for _ in rows]
    problems = []

    def read(row: int, image: Any) -> Any:
        """Returns an image's tiles and grid, or the problem if it is damaged."""
        try:
            return reader.processor.tiles(image)
        except ImageError as error:
            path = f", {image}" if isinstance(image, str | os.PathLike) else ""
            return f"{names[row]}{path}: {error}"

    images = [image for row_images in rows for image in row_images]
    row_of_image = [row for row, row_images in enumerate(rows) for _ in row_images]
    # The file lives as long as the map.
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor() as pool:
        results = pool.map(read, row_of_image, images)
        for row, result in zip(row_of_image, results, strict=True):
            if isinstance(result, str):
                problems.append(result)
                continue
            tiles, grid = result
            file.write(tiles.tobytes())
            grids[row].append(grid)
        check_read(problems, len(images))
        file.flush()
        tile_shape = reader.processor.tile.shape
        n_tiles = file.tell() // int(np.prod(tile_shape))
        pixels: np.ndarray = np.empty((0, *tile_shape), np.uint8)
        if n_tiles:
            pixels = np.memmap(file, np.uint8, "r", shape=(n_tiles, *tile_shape))
    return Pictures(reader, grids, pixels)


def check_read(problems: Sequence[str], n_images: int) -> None:
    """Raises TrainingError if some images could not be read; names the first ones."""
    if not problems:
        return
    problem_list = "; ".join(problems[:_MAX_NAMED])
    if len(problems) > _MAX_NAMED:
        problem_list += f" and {len(problems) - _MAX_NAMED} more"
    raise TrainingError(
        f"{len(problems)} of {n_images} images cannot be used: {problem_list}. "
        "Replace or remove them."
    )
