"""Fields that a template shows in some turns only are told once by the scripts."""

import numpy as np
import pytest

from lora_jax.training.data import chats
from tests.train.tiny import tokenizer, write_jsonl
from tests.training.test_dropped import AGAIN, BY_TEXT, THOUGHT, USER
from train.data.blocks import find_blocks
from train.data.chats import tokenize
from train.data.dataset import find_dataset
from train.sft import parse
from train.tasks import stream

ROW = {"messages": [USER, THOUGHT, AGAIN, {**THOUGHT, "reasoning_content": "shorter"}]}


def test_rows_are_reported_once_with_a_count(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chats, "BLOCK", 2)
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)
    tokenize(find_dataset(str(path)), tokenizer(BY_TEXT))
    said = capsys.readouterr().out
    assert said.count("`reasoning_content` of 5 of 10 turns once others follow") == 1
    assert said.count("reasoning_content") == 1 and str(path) in said


@pytest.mark.parametrize("names", [1, 2])
def test_a_stream_reports_the_first_rows(tmp_path, capsys, names):
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", [ROW, ROW])) for n in range(names)]
    line = ["--stream", "--steps", "1", "--truncate", "--dataset", *paths]
    blocks = find_blocks(paths, split="train", subset=None)
    say = stream._RemarksOfFirstRows()
    for block in (*range(names), 0):
        stream._read_sequences(parse(line), blocks, tokenizer(BY_TEXT), say, np.array([block]))
    said = capsys.readouterr().out
    assert said.count("among the first rows of") == said.count("reasoning_content") == 1
    assert "leaves out `reasoning_content` of 2 of 4 turns" in said
