"""The images of chats: read once, written as tokens, and given to batches as pixel values."""

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

_NAMED = 5  # broken images that a message names
_BLOCK = 64  # tiles that are hashed at once


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Holds the images of rows.

    Attributes:
      reader: the model's.
      grids: the grid of each image, by row.
      pixels: [tiles, channels, height, width] uint8, in the order of rows and images.
    """

    reader: AnyReader
    grids: Sequence[Sequence[Grid]]
    pixels: np.ndarray

    @functools.cached_property
    def firsts(self) -> np.ndarray:
        """Returns the first tile of each row, and after the last: [n + 1]."""
        counts = [sum(map(self.reader.count, row)) for row in self.grids]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def expand(self, tokens: TokenSequence, name: str, *, whole: bool = True) -> TokenSequence:
        """Returns a row's tokens with those of its images; the loss counts none of these.

        Args:
          tokens: with one token for each image.
          name: the row's name in errors.
          whole: whether all images of the row have to be there.

        Raises:
          TrainingError: there are more such tokens than images, or less.
        """
        (at,) = np.nonzero(tokens.ids == self.reader.token)
        grids = self.grids[tokens.row - 1]
        if len(at) > len(grids) or whole and len(at) < len(grids):
            raise TrainingError(
                f"{name} has {len(grids)} images, and the chat that the model learns or answers "
                f"has {len(at)} places for them: the model's chat template leaves some out, a text "
                "has the token for an image, or images follow the last answer"
            )
        parts = [self.reader.written(grid) for grid in grids[: len(at)]]
        sizes = np.ones(len(tokens), np.int64)
        sizes[at] = [len(part) for part in parts]
        ids = np.repeat(tokens.ids, sizes)
        counts = np.repeat(tokens.counts, sizes)
        for part, end in zip(parts, np.cumsum(sizes)[at].tolist(), strict=True):
            here = slice(end - len(part), end)
            ids[here], counts[here] = part, False
        return dataclasses.replace(tokens, ids=ids, counts=counts)

    def tiles_of(self, row: int) -> np.ndarray:
        """Returns the tiles of a row, counted from 1: [n, channels, height, width] uint8."""
        return self.pixels[self.firsts[row - 1] : self.firsts[row]]


@dataclasses.dataclass(frozen=True, eq=False)
class PixelValues:
    """Gives images of the rows of data sets to batches; see ``Packs.further``.

    Attributes:
      parts: the images of each data set.
      rows: [n] int arrays, one a data set: the numbers, from 1, of the rows that train.
    """

    parts: Sequence[Pictures]
    rows: Sequence[np.ndarray]

    @functools.cached_property
    def most(self) -> int:
        """Returns the tiles that each row gets: as many as the row with most of them."""
        each = zip(self.parts, self.rows, strict=True)
        n = max(int(np.diff(part.firsts)[rows - 1].max(initial=1)) for part, rows in each)
        return self.parts[0].reader.room(n)

    @functools.cached_property
    def most_images(self) -> int:
        """Returns the number of images of the row with most of them, 1 at least."""
        each = zip(self.parts, self.rows, strict=True)
        found = (len(part.grids[row - 1]) for part, rows in each for row in rows.tolist())
        return max(1, max(found, default=1))

    def arrays(self, origin: int, row: int) -> HostBatch:
        """Returns the model's inputs of a row's images, with room for as many as any row has."""
        part = self.parts[origin]
        most = (self.most, self.most_images)
        return part.reader.inputs(part.tiles_of(row), part.grids[row - 1], most)

    def digest(self) -> str:
        """Returns a fingerprint of all images and of what makes values of them."""
        sha = hashlib.sha256()
        for part in self.parts:
            sha.update(f"{part.reader.processor}{part.grids}".encode())
            for first in range(0, len(part.pixels), _BLOCK):
                sha.update(part.pixels[first : first + _BLOCK].tobytes())
        return sha.hexdigest()


class RowImages(NamedTuple):
    """The images of one row: [n, channels, height, width] uint8 tiles, and each image's grid."""

    tiles: np.ndarray
    grids: Sequence[Grid]


def image_inputs(rows: Sequence[RowImages], reader: AnyReader) -> dict[str, np.ndarray]:
    """Returns a model's inputs of the images of rows, all with room for as many as any has."""
    most = (reader.room(max(len(row.tiles) for row in rows)), max(len(row.grids) for row in rows))
    made = [reader.inputs(row.tiles, row.grids, most) for row in rows]
    return {name: np.stack([each[name] for each in made]) for name in made[0]}


def read_pictures(
    rows: Sequence[Sequence[Any]],
    names: Sequence[str],
    reader: AnyReader,
) -> Pictures:
    """Reads the images of rows, in all threads, into a temporary file that is mapped into memory.

    Args:
      rows: the images of each row; see ``ImageProcessor.pixels``.
      names: the rows' names in errors.
      reader: the model's.

    Raises:
      TrainingError: some cannot be read; names the first of them.
    """
    grids: list[list[Grid]] = [[] for _ in rows]
    broken = []

    def read(place: tuple[int, Any]) -> Any:
        row, image = place
        try:
            return reader.processor.tiles(image)
        except ImageError as error:
            path = f", {image}" if isinstance(image, str | os.PathLike) else ""
            return f"{names[row]}{path}: {error}"

    places = [(row, image) for row, images in enumerate(rows) for image in images]
    # The file lives as long as the map.
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor() as pool:
        for (row, _), made in zip(places, pool.map(read, places), strict=True):
            if isinstance(made, str):
                broken.append(made)
                continue
            file.write(made[0].tobytes())
            grids[row].append(made[1])
        check_read(broken, len(places))
        file.flush()
        shape = reader.processor.tile.shape
        n = file.tell() // int(np.prod(shape))
        pixels: np.ndarray = np.empty((0, *shape), np.uint8)
        if n:
            pixels = np.memmap(file, np.uint8, "r", shape=(n, *shape))
    return Pictures(reader, grids, pixels)


def check_read(broken: Sequence[str], n: int) -> None:
    """Raises TrainingError where some of n images are broken; names the first of them."""
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise TrainingError(
            f"{len(broken)} of {n} images cannot be used: {'; '.join(broken[:_NAMED])}{more}. "
            "Replace them, or take them out"
        )
