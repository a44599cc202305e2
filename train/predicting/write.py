"""Predictions as JSON lines or CSV, to standard output or to a file that appears whole."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from train.predicting.texts import Texts
from train.run.errors import UserError

Format = Literal["jsonl", "csv"]
_DIGITS = 7  # decimals of a probability: fp32 has no more


def format_of(asked: Format | None, out: str | None) -> Format:
    """Returns the format that is asked for; else that of the file's ending, or JSON lines."""
    return asked or ("csv" if out is not None and out.lower().endswith(".csv") else "jsonl")


@contextmanager
def opened(out: str | None, overwrite: bool) -> Iterator[TextIO]:
    """Opens the output; a file is written beside its place, and put there in the end.

    Args:
      out: the file; None for standard output.
      overwrite: replace a file that is there.

    Raises:
      UserError: the file cannot be written, or is there.
    """
    if out is None:
        yield sys.stdout
        return
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    if path.exists() and not overwrite:
        raise UserError(f"--out {out} exists: name another file, or replace it with --overwrite")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(
    file: TextIO,
    format: Format,
    texts: Texts,
    probabilities: np.ndarray,
    labels: Sequence[str],
) -> None:
    """Writes a line for each text, in their order.

    Args:
      file: the open output.
      format: JSON lines, or CSV with a header.
      texts: the texts.
      probabilities: [n, classes].
      labels: the names of the classes.
    """
    rows = csv.writer(file, lineterminator="\n")
    if format == "csv":
        pair = [] if texts.second is None else ["text_pair"]
        rows.writerow(["text", *pair, "label", "probability", *(f"p({one})" for one in labels)])
    for i, of_text in enumerate(probabilities):
        best = int(of_text.argmax())
        shown = [round(float(p), _DIGITS) for p in of_text]
        fields: dict[str, Any] = {"text": texts.first[i]}
        if texts.second is not None:
            fields["text_pair"] = texts.second[i]
        fields |= {"label": labels[best], "probability": shown[best]}
        if format == "csv":
            rows.writerow([*fields.values(), *shown])
        else:
            named = dict(zip(labels, shown, strict=True))
            line = json.dumps(fields | {"probabilities": named}, ensure_ascii=False)
            file.write(f"{line}\n")
    file.flush()
