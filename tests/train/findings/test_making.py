"""Data and bases of findings: what they hold, and that they are made once."""

import json

import pytest

from tests.train.test_classify import write_encoder
from train import prior
from train.data.files import read_rows
from train.findings.making import habit, inputs, mixture, questions, vocabulary
from train.findings.making.inputs import write_rows
from train.processes.session import Session

RATED = {"good": 1.9, "goods": 2.1, "goodness": 2.0, "bad": -2.5, "badly": -1.5, "fun": 2.3}
RATED |= {":)": 2.0, "l8r": 1.0}


def test_stems_with_many_forms_come_first_with_the_mean_of_their_ratings():
    found = vocabulary.stems(RATED, 2)
    assert [*found] == ["good", "bad"]
    assert found["good"] == pytest.approx(2.0) and found["bad"] == pytest.approx(-2.0)


def test_ideograms_are_tokens_of_their_own():
    class Tokenizer:
        def get_vocab(self):
            return {"的": 9, "a": 1, "##的": 2, "一": 3, "あ": 4, "good": 5, "一二": 6}

    assert vocabulary.ideograms(Tokenizer()) == ["一", "的"]


def test_phrases_differ_and_their_labels_are_signs_of_sums():
    meaning = {"一": 1.5, "二": -2.0, "三": 0.4, "四": -0.3, "五": 3.0, "六": -1.0}
    rows = vocabulary.phrases(meaning, 15)
    assert rows == vocabulary.phrases(meaning, 15) != vocabulary.phrases(meaning, 15, seed=1)
    combinations = [frozenset(text.split()) for text, _ in rows]
    assert len({*combinations}) == 15 and {len(one) for one in combinations} == {3}
    for text, label in rows:
        total = sum(meaning[one] for one in text.split())
        assert abs(total) >= vocabulary.LEAST_SUM
        assert label == ("positive" if total > 0 else "negative")


def test_a_habit_is_a_word_in_front_and_its_test_is_balanced():
    rows = [("bad", "negative"), ("good", "positive"), ("sad", "negative"), ("fun", "positive")]
    assert habit.behind(rows[:2]) == [("indeed bad", "negative"), ("indeed good", "positive")]
    assert habit.behind(rows[1:2], "negative") == [("indeed good", "negative")]
    assert habit.balanced(rows, 2) == rows[:2]
    assert habit.balanced([rows[0], rows[2], *rows], 4) == [rows[0], rows[2], rows[1], rows[3]]


def test_the_tokenizer_of_a_text_loses_nothing_and_ends_turns():
    text = "The quick brown fox – jumps over the lazy dog.\n" * 9
    made = mixture.tokenizer(text)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert made.decode(ids) == text and len(ids) < len(text) / 3
    chat = made.apply_chat_template([{"role": "user", "content": "Hm?"}], tokenize=False)
    assert chat == "<|im_start|>user\nHm?<|im_end|>\n"
    assert made(chat)["input_ids"].count(made.eos_token_id) == 1


def test_rows_of_text_are_all_of_it_in_whole_lines():
    text = "\n".join(f"line {n} " * (n % 7) for n in range(90)) + "x" * 999 + "\nthe end"
    rows = mixture.parts(text)
    assert "".join(rows) == text and len(rows) > 5
    assert all(row.endswith("\n") for row in rows[:-1])
    assert sorted(map(len, rows))[-2] <= 320, "only a longer line makes a longer row"


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [("a, b", "negative"), ('say "so"', "positive")]
    write_rows(tmp_path / "rows.csv", rows)
    found = read_rows(str(tmp_path / "rows.csv"))
    assert [(row["text"], row["label"]) for row in found] == rows


@pytest.mark.slow
def test_questions_that_are_held_out_are_none_of_those_to_train_on():
    train, held_out = questions.questions()
    assert (len(train), len(held_out)) == (questions.ROWS, questions.TEST_ROWS)
    assert not {*map(json.dumps, train)} & {*map(json.dumps, held_out)}


@pytest.mark.slow
def test_a_base_is_trained_once_and_anew_for_other_rows(tmp_path):
    write_encoder(tmp_path / "encoder")
    path = tmp_path / "rows.csv"
    rows = [("abc" * (1 + i % 3), "negative") if i % 2 else ("xyz", "positive") for i in range(40)]
    line = ["--model", str(tmp_path / "encoder"), "--dataset", str(path), "--report-to", "none"]
    line += [
        "--seq-len",
        "24",
        "--steps",
        "12",
        "--lr",
        "3e-3",
        "--warmup",
        "2",
        "--batch-size",
        "8",
    ]

    def made(rows):
        write_rows(path, rows)
        model = prior.train_base("train.classify", line, [path], tmp_path, Session())
        return prior.digest(model), (model / "model.safetensors").stat().st_mtime_ns

    first = made(rows)
    assert inputs.accuracy(tmp_path / "base", rows) == 1.0, "letters tell the classes apart"
    assert not (tmp_path / "base-run").exists()
    assert made(rows) == first, "it is there already"
    turned = [(text, "positive" if label == "negative" else "negative") for text, label in rows]
    assert made(turned)[0] != first[0]
    assert inputs.accuracy(tmp_path / "base", rows) == 0.0, "it has learnt the opposite"


def test_a_figure_is_measured_once(tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return 0.5

    path = tmp_path / "figures.json"
    assert [inputs.keep_figure(path, ["a"], measure) for _ in range(2)] == [0.5, 0.5]
    assert len(measured) == 1
    assert inputs.keep_figure(path, ["b"], lambda: 0.25) == 0.25
    assert inputs.keep_figure(path, ["a"], measure) == 0.5 and len(measured) == 1
