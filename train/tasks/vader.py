"""The default task of `train.classify`: is a word positive or negative?

The words and ratings come from the VADER lexicon (Hutto and Gilbert 2014), in which ten people
rated each word. A Python package contains the lexicon. All words of one stem are in the same part
of the split, because otherwise most held-out words would be other forms of training words.
"""

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import snowballstemmer

from lora_jax.hf.packaged import FetchError, Package
from lora_jax.training.data.rows import Row
from train.console.errors import UserError
from train.options.scripts.classify import Config
from train.run.task import TaskRows
from train.tasks import labelled

LEXICON = Package(
    requirement="vaderSentiment==3.3.2",
    wheel_bytes=125_950,
    wheel_folder="vaderSentiment",
    files={"vader_lexicon.txt": "1ec9c6e9ee19aade328f8beb393a6afa71a5bb3acf7d3cc22d4ef568df374bf5"},
    folder="vaderSentiment",
)
LABELS = ("negative", "positive")
PREFIX = 5  # the look-up baseline compares words by their first five letters
_TEST_SHARE = 0.2


def read_words() -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows to test on), each with `text` and `label`.

    Raises:
      UserError: the lexicon cannot be downloaded.
    """
    return split_words(read_lexicon())


def read_lexicon() -> str:
    """Returns the text of the lexicon.

    Raises:
      UserError: the lexicon cannot be downloaded.
    """
    try:
        folder = LEXICON.local()
    except FetchError as error:
        files = ", ".join(LEXICON.files)
        raise UserError(
            f"The words of --dataset vader cannot be downloaded ({error}). Copy {files} of the "
            f"package {LEXICON.requirement} to {LEXICON.path}, or pass another --dataset."
        ) from None
    return (folder / "vader_lexicon.txt").read_text(encoding="utf-8")


def ratings_of(lexicon: str) -> list[tuple[str, float]]:
    """Returns each entry of a lexicon's text with its rating (-4 to 4). Some entries come twice."""
    fields = (line.split("\t") for line in lexicon.splitlines())
    return [(word, float(rating)) for word, rating, *_ in fields]


def split_words(lexicon: str) -> tuple[list[Row], list[Row]]:
    """Splits the words of a lexicon, whose lines begin with a word and the mean rating."""
    rows: list[Row] = [
        {"text": word, "label": LABELS[rating > 0]}
        for word, rating in ratings_of(lexicon)
        if re.fullmatch("[a-z]+", word)  # no emoticons, no abbreviations with digits
    ]
    stems = snowballstemmer.stemmer("english").stemWords([row["text"] for row in rows])
    train, test = labelled.split_by_group(rows, stems, _TEST_SHARE)
    return train, test


def look_up_prefixes(train: list[Row], words: list[str]) -> tuple[list[str], float]:
    """Labels words by their prefixes, as a baseline.

    A word gets the most frequent label of the training words with the same first five letters or,
    if there are none, of all training words.

    Returns:
      A label for each word, and the share of words whose prefix was found.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        counts[row["text"][:PREFIX]][row["label"]] += 1
    label_counts = Counter(row["label"] for row in train)
    ((commonest_label, _),) = label_counts.most_common(1)
    labels: list[str] = []
    n_known = 0
    for word in words:
        label = commonest_label
        if word[:PREFIX] in counts:
            ((label, _),) = counts[word[:PREFIX]].most_common(1)
            n_known += 1
        labels.append(label)
    return labels, n_known / len(words)


def check(config: Config) -> None:
    """Raises a UserError for --test, because the words have their own split."""
    if config.data.test is not None:
        raise UserError(
            "--test cannot be used with --dataset vader, which holds out words itself, so that no "
            "stem is in both halves. Remove --test."
        )


def read_rows(config: Config) -> TaskRows:
    """Returns the words. --rows limits the number of training words."""
    train, test = read_words()
    return TaskRows(train[: config.data.rows], test)


def label_by_prefix(rows: Sequence[Row], texts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Returns the name and the labels of the baseline `look_up_prefixes`."""
    labels, share = look_up_prefixes(list(rows), list(texts))
    return f"look-up of {PREFIX}-letter prefixes ({100 * share:.0f}% found)", labels


TASK = dataclasses.replace(
    labelled.TASK,
    check=check,
    rows=read_rows,
    evaluation=functools.partial(labelled.ClassifierEvaluation, baselines=(label_by_prefix,)),
)
