"""Labelled images as arrays: decoded, resized and cropped once, and normalised per batch."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lora_jax.hf.images import ImageError, ImageProcessor
from lora_jax.training.data.batches import HostBatch, Padded
from lora_jax.training.data.labelled import (
    check_label,
    label_indices,
    label_names,
    missing_field_error,
)
from lora_jax.training.data.rows import Row, name_of
from lora_jax.training.data.vision.pictures import check_read

_BLOCK = 256  # images that are hashed at once


@dataclasses.dataclass(frozen=True, eq=False)
class Images(Padded):
    """Labelled images to be batched; a batch has ``pixel_values`` for the model.

    Attributes:
      pixels: [n, channels, height, width] uint8, resized and cut.
      labels: [n] int32, indices of classes.
      weights: [n] int32, the factor of each image in the loss; 0 for one that does not count.
      processor: makes pixel values of pixels.
      length: the number of tokens that the model makes of an image.
    """

    pixels: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    processor: ImageProcessor
    length: int = 1

    def by_name(self) -> HostBatch:
        """Returns the stored arrays, before normalisation."""
        return {"pixels": self.pixels, "labels": self.labels, "weights": self.weights}

    def _padding(self) -> tuple[tuple[int, ...], np.ndarray]:
        return (self.length,), np.full(len(self), self.length)

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the images with these indices, of any shape."""
        batch = super().take(rows)
        return {"pixel_values": self.processor.values(batch.pop("pixels")), **batch}

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of model tokens in a batch."""
        return self.length * batch["labels"].size

    def digest(self) -> str:
        """Returns a fingerprint of all images and of the normalisation."""
        sha = hashlib.sha256(f"{self.pixels.shape}{self.processor}".encode())
        for start in range(0, len(self), _BLOCK):
            sha.update(self.pixels[start : start + _BLOCK].tobytes())
        sha.update(self.labels.tobytes() + self.weights.tobytes())
        return sha.hexdigest()


def images(
    rows: Sequence[Row],
    processor: ImageProcessor,
    *,
    names: Sequence[str] | None = None,
    image: str = "image",
    label: str = "label",
    length: int = 1,
    source: str = "the rows",
) -> Images:
    """Returns rows with images and labels as examples for a classifier.

    Each image is decoded once, in all threads of this process. Its pixels, a byte each, lie in a
    temporary file that is mapped into memory: images of 224 x 224 take 147 KiB, and the system
    keeps as many of them in memory as fit.

    Args:
      rows: dicts, each with an image (see ``ImageProcessor.pixels``) and a label.
      processor: the model's.
      names: the classes in the order of their indices; by default `label_names` of these rows.
      image, label: the names of the fields.
      length: the number of tokens that the model makes of an image, for reports.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row lacks a field, or has a label that is not among `names`; or images cannot
        be read, of which one error names the first.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from lora_jax import models, training
    >>> of = {name: Image.new("RGB", (9, 9), name) for name in ("red", "blue")}
    >>> rows = [{"image": image, "label": name} for name, image in of.items()]
    >>> processor = models.ImageProcessor(size=(4, 4))
    >>> examples = training.images(rows, processor)
    >>> examples.take(np.arange(2))["pixel_values"].shape
    (2, 3, 4, 4)
    """
    check_rows(rows, source, image, label)
    labels = label_indices(rows, names or label_names(rows, label), label, source)
    pixels = read_pixels([row[image] for row in rows], names_of(rows, image, source), processor)
    return Images(
        pixels=pixels,
        labels=labels,
        weights=np.ones(len(rows), np.int32),
        processor=processor,
        length=length,
    )


def check_rows(rows: Sequence[Row], source: str, image: str, label: str | None) -> None:
    """Raises TrainingError if a row lacks an image or a label; names the row and the field."""
    for number, row in enumerate(rows, start=1):
        row_name = name_of(row, source, number)
        if row.get(image) in (None, ""):
            description = "an image, by its path or as its file's bytes,"
            raise missing_field_error(row, row_name, "image", image, description)
        if label is not None:
            check_label(row, row_name, label)


def names_of(rows: Sequence[Row], image: str, source: str) -> list[str]:
    """Returns the names of images for messages: their paths, or their rows."""
    names = []
    for number, row in enumerate(rows, start=1):
        is_path = isinstance(row[image], str | os.PathLike)
        names.append(str(row[image]) if is_path else name_of(row, source, number))
    return names


def read_pixels(
    sources: Sequence[object], names: Sequence[str], processor: ImageProcessor
) -> np.ndarray:
    """Reads images into a temporary file: [n, channels, height, width] uint8; see `images`.

    Args:
      sources: the images; see ``ImageProcessor.pixels``.
      names: their names in errors.
      processor: resizes and cuts them.

    Raises:
      TrainingError: some cannot be read; names the first of them.
    """
    with tempfile.TemporaryFile() as file:  # lives as long as the map
        pixels = np.memmap(file, np.uint8, "w+", shape=(len(sources), *processor.shape))

    def read(index: int) -> str | None:
        """Reads an image; returns the problem if it is damaged."""
        try:
            pixels[index] = processor.pixels(sources[index])
            return None
        except ImageError as error:
            return f"{names[index]}: {error}"

    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(read, range(len(sources))) if problem]
    check_read(problems, len(sources))
    return pixels
