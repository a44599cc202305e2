"""The words that findings are made of: those of VADER, with their ratings."""

from collections.abc import Iterable
from pathlib import Path

from train.reporters.files import write_csv
from train.tasks import vader

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
    """Writes rows as CSV with the columns text and label; the file appears whole or not at all."""
    write_csv(path, [("text", "label"), *rows])
