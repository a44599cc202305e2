"""Tokens kept for later runs: found if nothing has changed, made again if anything has."""

import datetime
import os

import numpy as np
import pytest

from lora_jax.training.data import drafts
from tests.train.tiny import CHATML, tokenizer
from train.console.errors import UserError
from train.data import cache
from train.data.chats import tokenize
from train.data.dataset import Dataset
from train.run.pretrained import ModelInfo

ROWS = [{"prompt": f"{i} ä?", "completion": "yes" * (i + 1)} for i in range(5)]


@pytest.fixture
def tokenised(monkeypatch, tmp_path, capsys):
    """Tokenises rows; returns the tokens, whether any row was rendered, and what was said."""
    rendered = []

    def counted(*args, **options):
        rendered.append(args)
        return original(*args, **options)

    original = drafts.conversation
    monkeypatch.setattr(drafts, "conversation", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))

    def run(rows=ROWS, made=None, kept_in=str(tmp_path), **options):
        rendered.clear()
        data = Dataset("the rows", lambda: rows, kept_in=kept_in)
        tokens = tokenize(data, made or tokenizer(), **options)
        return tokens, bool(rendered), capsys.readouterr().out

    return run


def same(one, other):
    assert [(t.ids.tolist(), t.counts.tolist(), t.row) for t in one] == [
        (t.ids.tolist(), t.counts.tolist(), t.row) for t in other
    ]


def test_rows_are_tokenised_once(tokenised, tmp_path):
    first, worked, said = tokenised()
    (path,) = tmp_path.glob("*.tokens")
    assert worked and f"tokens of the rows are cached in {path}" in said
    again, worked, said = tokenised([dict(row) for row in ROWS])
    same(again, first)
    assert not worked and f"The tokens of the rows come from an earlier run ({path})" in said
    assert again[0].ids.dtype == np.int32 and again[0].counts.dtype == bool


def test_what_the_tokens_depend_on_makes_others(tokenised, tmp_path):
    tokenised()
    lower = tokenizer()
    lower.add_tokens(["yes"])
    for change in (
        {"rows": ROWS[1:]},
        {"rows": [{**ROWS[0], "completion": "no"}, *ROWS[1:]]},
        {"made": tokenizer(CHATML.replace("\n", " "))},
        {"made": lower},
        {"train_on": "all"},
    ):
        tokens, worked, _ = tokenised(**change)
        assert worked
        same(tokenised(**change)[0], tokens)
    assert len(list(tmp_path.glob("*.tokens"))) == 6


@pytest.mark.parametrize("at", ["empty", "cut", 3, 40, 200, -1])
def test_a_damaged_file_is_made_anew(tokenised, tmp_path, at):
    whole = tokenised()[0]
    (path,) = tmp_path.glob("*.tokens")
    data = bytearray(path.read_bytes())
    if isinstance(at, int):
        data[at] ^= 1
    path.write_bytes({"empty": b"", "cut": data[:-9]}.get(at, data))
    tokens, worked, said = tokenised()
    same(tokens, whole)
    assert worked and f"warning: {path} is damaged, so the rows is tokenised again" in said
    assert not tokenised()[1] and not list(tmp_path.glob("*.partial"))


def test_where_tokens_are_kept(tokenised, tmp_path, monkeypatch):
    folder = tmp_path / "user" / "lora_jax" / "tokens"
    assert tokenised(kept_in=None)[2] == ""  # few rows
    monkeypatch.setattr(cache, "MIN_CACHED_ROWS", 3)
    assert str(folder) in tokenised(kept_in=None)[2] and len(list(folder.iterdir())) == 1
    assert tokenised(kept_in="off")[1]
    (tmp_path / "file").write_text("")
    said = tokenised(kept_in=str(tmp_path / "file"))[2]
    assert "warning: The tokens of the rows are not cached" in said and "--token-cache" in said


def test_the_files_unused_for_longest_make_room(tokenised, tmp_path, monkeypatch):
    for n in (1, 2, 3):
        tokenised(ROWS[:n])
    for seconds, n in ((30, 1), (20, 2), (10, 3)):
        key = Dataset("", lambda n=n: ROWS[:n]).key
        path = cache.token_file_path(str(tmp_path), key, tokenizer(), work="tokenize")
        os.utime(path, (1e9 - seconds,) * 2)
    assert not tokenised(ROWS[:1])[1]  # used again
    size = max(path.stat().st_size for path in tmp_path.glob("*.tokens"))
    monkeypatch.setattr(cache, "_MAX_FOLDER_BYTES", 3 * size)
    tokenised(ROWS[:4])
    assert [tokenised(ROWS[:n], kept_in=str(tmp_path))[1] for n in (4, 1, 2)] == [0, 0, 1]


def test_a_template_on_a_fixed_day(tmp_path, monkeypatch):
    """Its rows have the same tokens on every day, and are kept for later ones."""

    def outline(made):
        return ModelInfo("a model", made, None, {})

    made = tokenizer(CHATML + '{{ strftime_now("%Y-%m-%d") }}')
    dated = outline(made).dated("2025-08-05").tokenizer
    shown = dated.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown.endswith("2025-08-05") and dated is not made

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    def places():
        return [cache.token_file_path(str(tmp_path), "key", one) for one in (made, dated)]

    before = places()
    monkeypatch.setattr(cache, "date", Tomorrow)
    after = places()
    assert before[0] != after[0] and before[1] == after[1]
    for day, template, words in (
        ("today", made.chat_template, "--template-date today: Invalid isoformat"),
        ("2025-08-05", CHATML, "--template-date 2025-08-05: the model's chat template shows no"),
        ("2025-08-05", None, "shows no date"),
    ):
        with pytest.raises(UserError, match=words):
            outline(tokenizer(template)).dated(day)
