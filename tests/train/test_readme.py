"""The rows and commands that the pages of train/ show, run as they stand on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest

import train
from tests.train.tiny import write_jsonl, write_model
from train import dpo, sft
from train.run.log import read_metrics

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FOLDER = Path(train.__file__).parent
PAGES = "\n".join(path.read_text() for path in sorted(FOLDER.rglob("*.md")))


@pytest.fixture
def model(tmp_path):
    return str(write_model(tmp_path / "model"))


def rows_of(field):
    """The rows of the pages that have a field."""
    blocks = re.findall(r"```json\n(.*?)```", PAGES, re.DOTALL)
    return "".join(block for block in blocks if f'"{field}"' in block)


def commands_of(script, pages=PAGES):
    """The command lines of the pages, joined, without comments."""
    joined = pages.replace("\\\n", " ")
    lines = re.findall(rf"^lora-jax {script} (.*)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
def test_the_command_of_qlora_trains_on_the_chat_of_the_page(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(rows_of("messages"))
    page = (FOLDER / "sft.md").read_text()
    (line,) = (line for line in commands_of("sft", page) if "--quantize" in line)
    given = dict(zip(line, line[1:], strict=False))
    assert given["--dataset"] == "chats.jsonl" and given["--quantize"] == "nf4"
    line[line.index(given["--model"])] = model
    sft.main([*line, "--steps", "2", "--report-to", "none"])
    assert len(read_metrics(Path(given["--output"]))) == 2
    assert "to use it: python -m train.generate --adapter" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pair_of_the_page_trains(model, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(rows_of("chosen"))
    line = ["--model", model, "--dataset", str(path), "--output", str(tmp_path / "run")]
    dpo.main([*line, "--steps", "1", "--report-to", "none"])
    assert "these fields are not read" not in capsys.readouterr().out


@pytest.mark.slow
def test_fields_that_pairs_do_not_read_are_named(model, tmp_path, capsys):
    """Checks fields as in Intel/orca_dpo_pairs, and one more: its `system` is read."""
    row = {"system": "Be brief.", "question": "a?", "chosen": "b", "rejected": "c", "source": "d"}
    line = ["--model", model, "--output", str(tmp_path / "run"), "--dry-run"]
    line += ["--dataset", str(write_jsonl(tmp_path / "rows.jsonl", [row] * 2))]
    dpo.main([*line, "--fields", "prompt=question"])
    told = capsys.readouterr().out
    assert "rows.jsonl: these fields are not read: source\n" in told.replace("\n/", "/")
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>" in told
