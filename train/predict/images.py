"""The images to classify: from arguments, a folder, a file of rows, or standard input."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.training.data.rows import Row
from lora_jax.training.data.vision.images import Images, check_rows, names_of, read_pixels
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.data.files import IMAGE_FIELD, images_of, locate_images, read_file
from train.predict.texts import Texts, holds_rows, read_standard_input, read_text_file
from train.run.pretrained import ModelInfo


def read_images(
    paths: Sequence[str], given: str | None, field: str | None, outline: ModelInfo
) -> tuple[Texts, Images]:
    """Returns the names of images, and the images.

    Args:
      paths: the images of the command line.
      given: the option --input: a folder, a file of rows, or a file with a path a line; without
        it and `paths`, standard input has a path a line.
      field: the option --field.
      outline: the model's, with its processor.

    Raises:
      UserError: there are none, or some cannot be read; names them.
    """
    rows, field = _rows(paths, given, field), field or IMAGE_FIELD
    with as_user_errors(TrainingError):
        check_rows(rows, given or "the images", field, None)
        names = names_of(rows, field, given or "the images")
        pixels = read_pixels([row[field] for row in rows], names, outline.tokenizer)
    unused = np.zeros(len(rows), np.int32)
    return Texts(names, None, names), Images(pixels, unused, unused, outline.tokenizer)


def _rows(paths: Sequence[str], given: str | None, field: str | None) -> list[Row]:
    if given is not None and holds_rows(given) and Path(given).expanduser().is_file():
        rows: list[Row] = [*read_file(Path(given).expanduser())]
        if not rows:
            raise UserError(f"--input {given} has no rows")
        return locate_images(rows, field or IMAGE_FIELD, given)
    files = [*paths]
    if given is not None and Path(given).expanduser().is_dir():
        files = images_of(given)
        if not files:
            raise UserError(f"--input {given}: there is no image in this folder")
    elif given is not None:
        files = read_text_file(given, "", None).first
    elif not paths:
        files = read_standard_input().first
    return [{field or IMAGE_FIELD: path} for path in files]
