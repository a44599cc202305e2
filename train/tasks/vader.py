"""The default task of `train.classify`: is a word positive or negative?

The words and ratings are those of the VADER lexicon (Hutto and Gilbert 2014), in which ten people
rated each word; a Python package ships it. All words of one stem are on the same side of the split:
otherwise most held-out words would be other forms of training words.
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
PREFIX = 5  # letters by which the look-up baseline knows a word
_TEST_SHARE = 0.2


def read_words() -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows to test on), each with `text` and `label`; always the same.

    Raises:
      UserError: the lexicon cannot be fetched.
    """
    return split_words(read_lexicon())


def read_lexicon() -> str:
    """Returns the text of the lexicon.

    Raises:
      UserError: it cannot be fetched.
    """
    try:
        folder = LEXICON.local()
    except FetchError as error:
        files = ", ".join(LEXICON.files)
        raise UserError(
            f"the words of --dataset vader cannot be fetched ({error}). Put {files} of the package "
            f"{LEXICON.requirement} into {LEXICON.path}, or name another --dataset"
        ) from None
    return (folder / "vader_lexicon.txt").read_text(encoding="utf-8")


def ratings_of(lexicon: str) -> list[tuple[str, float]]:
    """Returns the entries of a lexicon's text, a few of them twice, and their ratings (-4 to 4)."""
    fields = (line.split("\t") for line in lexicon.splitlines())
    return [(word, float(rating)) for word, rating, *_ in fields]


def split_words(lexicon: str) -> tuple[list[Row], list[Row]]:
    """Splits the words of a lexicon's text; its lines begin with a word and the mean rating."""
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

    A word gets the commonest label of the training words with its first five letters or, if there
    are none, of all training words.

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
    """Raises a UserError for --test: the words have their own split."""
    if config.data.test is not None:
        raise UserError("--test: the words of --dataset vader have a split of their own, by stem")


def read_rows(config: Config) -> TaskRows:
    """Returns the words; --rows limits those to train on."""
    train, test = read_words()
    return TaskRows(train[: config.data.rows], test)


def prefixes(rows: Sequence[Row], texts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Labels words as `look_up_prefixes` does."""
    labels, share = look_up_prefixes(list(rows), list(texts))
    return f"look-up of {PREFIX}-letter prefixes ({100 * share:.0f}% found)", labels


TASK = dataclasses.replace(
    labelled.TASK,
    check=check,
    rows=read_rows,
    evaluation=functools.partial(labelled.ClassifierEvaluation, baselines=(prefixes,)),
)
