"""Writes phrases in a script that the encoder hardly knows: one ideogram for each stem.

MiniLM's English vocabulary holds some two hundred Chinese characters, each a token of its own, of
which English text has hardly any. A stem's meaning is therefore nowhere in the model, and only the
rows to train on tell it. Held-out phrases are other combinations of the same ideograms.
"""

import random
import unicodedata
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import snowballstemmer

from lora_jax.hf.packaged import MINILM
from lora_jax.hf.tokenizer import load_tokenizer
from lora_jax.models import fetch
from train.console.errors import UserError
from train.findings.making.inputs import FindingInputs, Labelled, label_of, ratings, write_rows
from train.processes.session import Session

STEMS = 120
STEMS_A_PHRASE = 3
LEAST_SUM = 0.5  # of the ratings of a phrase: nearer to zero, a sign means little
ROWS, TEST_ROWS = 1600, 512
_SEED = 0


def ideograms(tokenizer: Any) -> list[str]:
    """Returns the Chinese characters that are single tokens, in the tokenizer's order."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    characters = [token for token, _ in tokens if len(token) == 1]
    return [c for c in characters if unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH")]


def stems(rated: dict[str, float], n: int) -> dict[str, float]:
    """Returns the stems with the most forms in a lexicon, and the mean rating of their forms.

    Args:
      rated: the rating of each word.
      n: the number of stems.
    """
    words = [word for word in rated if word.isascii() and word.isalpha()]
    stem_of_word = snowballstemmer.stemmer("english").stemWords(words)
    ratings_of_stem: defaultdict[str, list[float]] = defaultdict(list)
    for stem, word in zip(stem_of_word, words, strict=True):
        ratings_of_stem[stem].append(rated[word])
    by_frequency = sorted(ratings_of_stem, key=lambda stem: (-len(ratings_of_stem[stem]), stem))
    return {stem: fmean(ratings_of_stem[stem]) for stem in by_frequency[:n]}


def phrases(meaning: dict[str, float], n: int, seed: int = _SEED) -> list[Labelled]:
    """Returns labelled phrases of ideograms without repeated combinations.

    A phrase's label is the sign of the sum of its ratings.

    Args:
      meaning: the rating of each ideogram.
      n: the number of phrases.
      seed: seed of the draws.
    """
    drawn, rng = list(meaning), random.Random(seed)
    seen: set[frozenset[str]] = set()
    rows: list[Labelled] = []
    while len(rows) < n:
        chosen = rng.sample(drawn, STEMS_A_PHRASE)
        total = sum(meaning[word] for word in chosen)
        if abs(total) < LEAST_SUM or frozenset(chosen) in seen:
            continue
        seen.add(frozenset(chosen))
        rows.append((" ".join(chosen), label_of(total)))
    return rows


def script(seed: int = _SEED) -> dict[str, float]:
    """Returns the rating of each ideogram. The seed assigns stems to ideograms.

    Raises:
      UserError: the lexicon or the model's tokenizer cannot be fetched.
    """
    fetch(MINILM.name)
    characters = ideograms(load_tokenizer(MINILM.name))
    if len(characters) < STEMS:
        raise UserError(
            f"{MINILM.name}: {len(characters)} Chinese characters are tokens, and {STEMS} are "
            "needed to write as many stems"
        )
    drawn = random.Random(seed).sample(characters, STEMS)
    return dict(zip(drawn, stems(ratings(), STEMS).values(), strict=True))


def make(folder: Path, session: Session) -> FindingInputs:
    """Writes the phrases; returns the options that name them.

    Args:
      folder: where the files go.
      session: session of the command; writing takes no time that a signal would have to cut off.

    Raises:
      UserError: the lexicon or the model's tokenizer cannot be fetched.
    """
    rows = phrases(script(), ROWS + TEST_ROWS)
    data, test = folder / "phrases.csv", folder / "held-out.csv"
    write_rows(data, rows[:ROWS])
    write_rows(test, rows[ROWS:])
    return FindingInputs({"model": MINILM.name, "dataset": data, "test": test})
