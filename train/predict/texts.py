"""Reads the texts or images to classify, from arguments, files or standard input."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.training.data.rows import Row, check_text, field_names
from lora_jax.training.data.turns import shown
from lora_jax.training.data.vision.images import Images, check_rows, names_of, read_pixels
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.data.entries import Entry, name_lines, read_entries, read_typed_lines
from train.data.files import IMAGE_FIELD, list_images, locate_images
from train.options.paths import kind_of
from train.run.pretrained import ModelInfo

_TEXTS_PER_TOKENIZER_CALL = 256  # that are tokenised at once


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts.

    Attributes:
      first: the texts.
      second: the second text of each; None where there are no pairs.
      names: a name of each for messages: "rows.csv, line 3".
    """

    first: list[str]
    second: list[str] | None
    names: list[str]

    def __len__(self) -> int:
        return len(self.first)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Tokenised texts.

    Attributes:
      ids, types: [n] arrays of [length] int32 each.
      most: the most tokens that a text may have.
      pad: the token of padding.
    """

    ids: list[np.ndarray]
    types: list[np.ndarray]
    most: int
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, [n]."""
        return np.array([len(ids) for ids in self.ids])


def is_row_file(path: str) -> bool:
    """Returns True if a file's ending is that of a file of rows, and not of a file of lines."""
    return kind_of(path) is not None


def read_arguments(texts: Sequence[str]) -> Texts:
    """Returns the texts of a command line.

    Raises:
      UserError: one of them is empty.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"text {number} of the command line is empty. Remove it.")
    return Texts(list(texts), None, [f"text {n}" for n in range(1, len(texts) + 1)])


def _texts_of_lines(lines: Sequence[Entry], source: str) -> Texts:
    """Returns one text per line; skips empty lines, and prints their number to stderr."""
    text_of_name = {name: line for name, line in lines if line}
    n_empty = len(lines) - len(text_of_name)
    if n_empty > 0:
        print(f"{source}: {n_empty} empty lines were skipped.", file=sys.stderr)
    if not text_of_name:
        raise UserError(f"{source} has no text. Write one text per line.")
    return Texts([*text_of_name.values()], None, [*text_of_name])


def read_text_file(path: str, field: str, field_pair: str | None) -> Texts:
    """Reads the texts of a file: the fields of its rows, or its lines.

    Raises:
      UserError: there is no such file, it cannot be read, or a row has no text.
    """
    entries = read_entries(path, "--input")
    if not is_row_file(path):
        return _texts_of_lines(entries, path)

    def texts(option: str, field: str) -> list[str]:
        return [_text_of_row(row, name, option, field) for name, row in entries]

    second = None if field_pair is None else texts("--field-pair", field_pair)
    return Texts(texts("--field", field), second, [name for name, _ in entries])


def read_standard_input() -> Texts:
    """Reads one text per line until the end of standard input."""
    source = "standard input"
    return _texts_of_lines(name_lines(read_typed_lines("text"), source), source)


def _text_of_row(row: Row, name: str, option: str, field: str) -> str:
    """Returns the text in a field of a row; raises a UserError if there is none."""
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    if field in row:
        raise UserError(
            f"{name}: `{field}` is {shown(value)}. Write a text that is not empty into this field."
        )
    raise UserError(
        f"{name} has {field_names(row)}, and no `{field}`. Name the field of the text with "
        f"{option}."
    )


def tokenize(
    texts: Texts, outline: ModelInfo, seq_len: int | None, truncate: bool
) -> TokenizedTexts:
    """Returns texts as tokens.

    Args:
      texts: the texts.
      outline: the model's, with its tokenizer.
      seq_len: the most tokens of a text; None for the model's.
      truncate: cuts longer texts off, which are an error otherwise.

    Raises:
      UserError: a text is too long, or has half of a character.
    """
    with as_user_errors(TrainingError):
        for side in (texts.first, texts.second or ()):
            for text, name in zip(side, texts.names, strict=False):
                check_text(text, name)
    most = outline.max_tokens
    if seq_len is not None:
        outline.check_length(seq_len, f"--seq-len {seq_len}")
        most = seq_len
    limit: dict[str, Any] = {"truncation": True, "max_length": most} if truncate else {}
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(texts), _TEXTS_PER_TOKENIZER_CALL):
        block = slice(start, start + _TEXTS_PER_TOKENIZER_CALL)
        second = texts.second[block] if texts.second else None
        encoded = outline.tokenizer(
            texts.first[block], second, return_token_type_ids=True, verbose=False, **limit
        )
        ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
        types += [np.array(row, np.int32) for row in encoded["token_type_ids"]]
    tokens = TokenizedTexts(
        ids=ids, types=types, most=most, pad=outline.tokenizer.pad_token_id or 0
    )
    too_long = np.flatnonzero(tokens.lengths > most)
    if len(too_long):
        limit_name = "--seq-len" if seq_len is not None else "the model"
        raise UserError(
            f"{len(too_long)} of {len(texts)} texts have more tokens than the {most} that "
            f"{limit_name} allows. "
            f"The first is {texts.names[too_long[0]]}, with {tokens.lengths[too_long[0]]} tokens. "
            "Cut them off at the end with --truncate, or remove them."
        )
    return tokens


def read_images(
    paths: Sequence[str], source: str | None, field: str | None, outline: ModelInfo
) -> tuple[Texts, Images]:
    """Returns the names of images, and the images.

    Args:
      paths: the images of the command line.
      source: the option --input: a folder, a file of rows, or a file with a path a line; without
        it and `paths`, standard input has a path a line.
      field: the option --field.
      outline: the model's, with its processor.

    Raises:
      UserError: there are none, or some cannot be read; names them.
    """
    field = field or IMAGE_FIELD
    rows = _image_rows(paths, source, field)
    source_name = source or "the images"
    with as_user_errors(TrainingError):
        check_rows(rows, source_name, field, None)
        names = names_of(rows, field, source_name)
        pixels = read_pixels([row[field] for row in rows], names, outline.tokenizer)
    unused = np.zeros(len(rows), np.int32)  # labels and numbers of rows
    return Texts(names, None, names), Images(pixels, unused, unused, outline.tokenizer)


def _image_rows(paths: Sequence[str], source: str | None, field: str) -> list[Row]:
    """Returns a row for each image of the command line, of --input, or of standard input."""
    if source is None:
        files = [*paths] or read_standard_input().first
    elif is_row_file(source) and Path(source).expanduser().is_file():
        rows: list[Row] = [row for _, row in read_entries(source, "--input")]
        return locate_images(rows, field, source)
    elif Path(source).expanduser().is_dir():
        files = list_images(source)
        if not files:
            raise UserError(
                f"--input {source}: This folder contains no image. Pass a folder of images."
            )
    else:
        files = read_text_file(source, "", None).first
    return [{field: path} for path in files]
