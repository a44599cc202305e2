"""Functions for preparing the inputs of findings: labelled words, files, and cached figures."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.training.processes import write_json
from train.predict.batches import probabilities
from train.predict.classifier import find_classifier
from train.predict.texts import read_arguments, tokenize
from train.reporters.files import read_json, write_csv
from train.tasks import vader


class FindingInputs(NamedTuple):
    """The prepared data or base of a finding.

    Attributes:
      options: options that name it, as train.compare takes them: {"dataset": "rows.csv"}.
      notes: sentences about it, with what was measured of it.
    """

    options: Mapping[str, str | Path]
    notes: tuple[str, ...] = ()


Labelled = tuple[str, str]  # a text and its label


def ratings() -> dict[str, float]:
    """Returns the mean rating of each word of VADER's lexicon, from -4 to 4.

    Raises:
      UserError: the lexicon cannot be fetched.
    """
    return dict(vader.ratings_of(vader.read_lexicon()))


def label_of(rating: float) -> str:
    """Returns the label of a rating: "negative" or "positive"."""
    return vader.LABELS[rating > 0]


def write_rows(path: Path, rows: Iterable[Labelled]) -> None:
    """Writes rows as CSV with the columns text and label, atomically."""
    write_csv(path, [("text", "label"), *rows])


_ROWS = 128  # texts in memory at once, to measure a classifier


def accuracy(model: Path, rows: Sequence[Labelled]) -> float:
    """Returns the share of rows that a classifier labels correctly.

    Args:
      model: the classifier's folder.
      rows: texts and labels.

    Raises:
      UserError: the folder holds no classifier.
    """
    classifier = find_classifier(None, str(model))
    texts = read_arguments([text for text, _ in rows])
    tokens = tokenize(texts, classifier.outline, None, False)
    class_probabilities = probabilities(*classifier.load(), tokens, batch_size=_ROWS)
    n_right = 0
    for class_index, (_, label) in zip(class_probabilities.argmax(-1), rows, strict=True):
        n_right += classifier.labels[class_index] == label
    return n_right / len(rows)


def keep_figure(path: Path, key: Any, measure: Callable[[], float]) -> float:
    """Returns a figure from a file, or measures it and adds it to the file.

    Args:
      path: the file, JSON.
      key: what the figure depends on, as JSON has it.
      measure: measures it.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    figures = read_json(path)
    if name not in figures:
        write_json(path, figures | {name: measure()})
    return read_json(path)[name]
