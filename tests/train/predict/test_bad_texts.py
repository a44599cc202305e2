"""Texts and prompts that no tokenizer takes, or that a chat template drops, are named."""

import io
import sys
from types import SimpleNamespace

import pytest

from lora_jax import training
from tests.train.tiny import CHATML, tokenizer, write_jsonl
from train.console.errors import UserError
from train.generate import prompts
from train.predict.texts import (
    is_row_file,
    read_arguments,
    read_standard_input,
    read_text_file,
    tokenize,
)
from train.stages.inputs import SamplePrompts

USER = {"role": "user", "content": "a"}
HALF = "one half of a surrogate pair"


def outline(template=None):
    return SimpleNamespace(tokenizer=tokenizer(template), max_tokens=500, name="tiny")


def test_half_a_character_names_the_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ok\nb\udcffc\n"))
    for texts, name in (
        (read_arguments(["ok", "a\udcffb"]), "text 2"),
        (read_standard_input(), "standard input, line 2"),
    ):
        with pytest.raises(UserError, match=rf"{name} has \\udcff in .*{HALF}"):
            tokenize(texts, outline(), None, False)


def test_rows_of_a_file_are_named_by_their_line(tmp_path):
    path = tmp_path / "ROWS.JSONL"
    path.write_text('{"text": "a"}\n{"text": "b\\ud83d"}\n')
    assert is_row_file(str(path))
    with pytest.raises(UserError, match=rf"ROWS.JSONL, line 2 has \\ud83d .*{HALF}"):
        read_text_file(str(path), "text", None)
    write_jsonl(path, [{"text": "a"}, {"text": [7] * 5000}])
    message = r"line 2: `text` is \[7, .*\.\.\.\. Write a text"
    with pytest.raises(UserError, match=message) as caught:
        read_text_file(str(path), "text", None)
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match="is a folder. Name a file in it"):
        read_text_file(str(tmp_path), "text", None)


def test_labelled_texts_are_named_by_their_row():
    rows = [{"text": "a", "label": 0}, {"text": "é\ud83d", "label": 1}]
    with pytest.raises(training.TrainingError, match=rf"the rows, row 2 has \\ud83d in .*{HALF}"):
        training.texts(rows, tokenizer(None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a\ud83d"}, rf"row 1 has \\ud83d in .*{HALF}"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, USER]},
            "row 1: .* does not show this turn of the role 'system'",
        ),
        ({"prompt": "a", "documents": [{"text": "b"}]}, "row 1: .* does not read `documents`"),
        ({"messages": [{**USER, "name": "b"}]}, "row 1: .* show `name`"),
    ],
)
def test_a_prompt_of_which_something_would_be_lost_is_refused(row, message):
    prompt = prompts._prompt_from_row(row, "row 1")
    template = CHATML.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(UserError, match=message):
        prompts.tokenize([prompt], outline(template), None)


def test_a_system_prompt_that_would_be_lost_is_refused():
    prompt = prompts.prompt_from_text("a", "prompt 1")
    template = CHATML.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(
        UserError, match="prompt 1: .* does not show this turn of the role 'system'"
    ):
        prompts.tokenize([prompt], outline(template), "Be brief.")
    (tokens,) = prompts.tokenize([prompt], outline(CHATML), "Be brief.")
    assert "Be brief." in tokenizer().decode(tokens)


def test_a_sample_prompt_that_would_be_lost_is_refused(tmp_path):
    path = tmp_path / "prompts.JSONL"
    turns = [{"role": "system", "content": "Be brief."}, USER]
    write_jsonl(path, [{"messages": turns}])
    run = SimpleNamespace(sample_prompts=(str(path),), sample_tokens=3)
    template = CHATML.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(
        UserError, match="--sample-prompts: .* does not show this turn of the role 'system'"
    ):
        SamplePrompts(run, outline(template))
    write_jsonl(path, [{"prompt": "a"}, {"prompt": "b\ud83d"}])
    with pytest.raises(UserError, match=rf"prompts.JSONL, line 2 has \\ud83d in .*{HALF}"):
        SamplePrompts(run, outline(CHATML))
