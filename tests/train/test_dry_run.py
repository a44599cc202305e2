"""--dry-run: its output, which the run then confirms, and that it changes nothing."""

import json
import re

import pytest

from lora_jax import training
from tests.train.test_sft import fails
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train import classify
from train.data.shown import shown
from train.dry_run import as_text
from train.run.output import state_of
from train.sft import main


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_shows_what_the_run_does_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    model = write_model(tmp_path / "model")
    rows = [{"prompt": f"{n}?", "completion": f"yes {n}"} for n in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = ["--model", model, "--dataset", data, "--epochs", "2", "--packing", "--eval-every", "3"]
    args += ["--targets", "q_proj"]
    args += ["--output", tmp_path / "run", "--token-cache", tmp_path / "tokens"]
    args = [str(arg) for arg in args]
    before = files_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("train.finetune.read_model", None)
        main([*args, "--dry-run"])
    said = capsys.readouterr().out
    assert files_in(tmp_path) == before
    assert re.search(r"<\|im_start\|>assistant\n\[\[yes \d+<\|im_end\|>\]\]\n---", said)
    assert "in [[ ]]:" in said and "\x1b" not in said
    assert f"{tmp_path / 'run'}: this output folder is not there yet" in said
    main([*args, "--compilation-cache", "off"])
    ran = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for line in ("36 rows are packed into ", "4 of the 40 rows of ", "attention: "):
        (of_run,) = (one for one in ran.splitlines() if line in one)
        assert of_run in said
    assert f"steps: {report['steps']:,}, " in said and "2." in said
    compiled = report["compiled_bytes"]
    assert f"temporaries {compiled['temporaries'] / 1e6:,.1f} MB" in said
    assert state_of(tmp_path / "run").startswith("this output folder holds another run: --resume")


def test_what_the_loss_counts_is_green_on_a_terminal(tmp_path):
    rows = [{"prompt": "a" * 500, "completion": "b"}]
    made = tokenizer()
    examples = training.chats(rows, made, seq_len=1024)
    (one,) = shown(examples, made, 3)
    assert one.title == "row 1: 521 tokens, 2 of them count"
    coloured = as_text(one, coloured=True)
    assert [coloured.plain[s.start : s.end] for s in coloured.spans] == ["b<|im_end|>"]
    plain = as_text(one, coloured=False).plain
    assert plain.endswith("[[b<|im_end|>]]") and " … 201 tokens … " in plain


@pytest.mark.slow
def test_classes_have_a_dry_run_too(tmp_path, capsys):
    classify.main(["--dry-run", "--rows", "100", "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "the label to learn is 'positive'" in said and "[CLS] " in said
    assert "memory of a device, by the compiler: " in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--resume", "--coordinator=x:1"])
def test_options_without_effect_beside_it_are_refused(option, capsys):
    said = fails(capsys, "--dry-run", option)
    assert (
        said == f"error: --dry-run trains nothing, in one process: leave out {option.split('=')[0]}"
    )
