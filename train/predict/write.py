"""Predictions as JSON lines or CSV."""

import csv
import json
from collections.abc import Sequence
from typing import Literal, TextIO

import numpy as np

from train.predict.texts import Texts

Format = Literal["jsonl", "csv"]
_DIGITS = 7  # decimals of a probability: fp32 has no more


def output_format(asked: Format | None, out: str | None) -> Format:
    """Returns the format that is asked for; else that of the file's ending, or JSON lines."""
    return asked or ("csv" if out is not None and out.lower().endswith(".csv") else "jsonl")


def write(
    file: TextIO,
    format: Format,
    texts: Texts,
    probabilities: np.ndarray,
    labels: Sequence[str],
    what: str = "text",
) -> None:
    """Writes a line for each text or image, in their order.

    Args:
      file: the open output.
      format: JSON lines, or CSV with a header.
      texts: the texts, or the names of images.
      probabilities: [n, classes].
      labels: the names of the classes.
      what: the name of the field that has the text.
    """
    rows = csv.writer(file, lineterminator="\n")
    if format == "csv":
        pair = [] if texts.second is None else ["text_pair"]
        rows.writerow([what, *pair, "label", "probability", *(f"p({label})" for label in labels)])
    for i, of_text in enumerate(probabilities):
        best = int(of_text.argmax())
        shown = [round(float(p), _DIGITS) for p in of_text]
        fields: dict[str, object] = {what: texts.first[i]}
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
