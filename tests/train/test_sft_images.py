"""Chats with images through the whole scripts: a run learns colours, resumes, and answers."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import assert_identical, thorough
from tests.train import tiny as tiny_decoder
from tests.train import tiny_smolvlm as tiny
from train.data.files import read_rows
from train.generate.__main__ import main as generate
from train.run.log import read_metrics
from train.sft import main

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
OPTIONS = ["--batch-size", 4, "--rank", 4, "--lr", 1e-2, "--seq-len", 512, "--log-every", 1]
OPTIONS += ["--schedule", "constant", "--warmup", 1, "--targets", "all-linear"]


def run(made: Path, folder: Path, *args: Any) -> Path:
    options = ["--model", made / "model", "--dataset", made / "rows" / "rows.jsonl", *OPTIONS]
    main([*map(str, (*options, *args)), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and chats about its images."""
    folder = tmp_path_factory.mktemp("made")
    tiny.write_smolvlm(folder / "model", do_image_splitting=False)
    tiny.write_rows(folder / "rows", 24)
    return folder


def test_a_run_learns_what_images_show(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "run", "--steps", 120, "--eval-every", 60)
    assert read_metrics(tmp_path / "run")[-1]["eval_loss"] < 0.2
    lines = (made / "rows" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    asked = [{**row, "messages": row["messages"][:1]} for row in rows]
    (made / "rows" / "asks.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in asked))
    found = answers(tmp_path, "--prompts", made / "rows" / "asks.jsonl")
    right = [row["messages"][1]["content"][0]["text"] for row in rows]
    assert sum(a == b for a, b in zip(found, right, strict=True)) > 20
    for row, says in list(zip(rows, right, strict=True))[:2]:
        paths = [made / "rows" / name for name in row["images"]]
        assert answers(tmp_path, "--prompt", "colour?", "--image", *paths) == [says]


def answers(folder: Path, *args: Any) -> list[str]:
    options = ["--adapter", folder / "run", "--max-new-tokens", 12, "--overwrite"]
    generate([*map(str, (*options, "--output", folder / "said.jsonl", *args))])
    lines = (folder / "said.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


@thorough  # as test_sft.py does
def test_a_resumed_run_ends_where_a_whole_one_does(made: Path, tmp_path: Path) -> None:
    """With batches of several parts, and with dropout."""
    options = ["--dropout", 0.1, "--grad-accum", 2]
    run(made, tmp_path / "whole", *options, "--steps", 4)
    run(made, tmp_path / "half", *options, "--steps", 2)
    run(made, tmp_path / "half", *options, "--steps", 4, "--resume")
    _, params = models.from_pretrained(made / "model")
    whole, half = (
        lj.split(lj.load_adapter(tmp_path / name / "adapter", params))[0]
        for name in ("whole", "half")
    )
    assert any("vision_model" in path for path in whole)
    assert_identical(whole, half)


def test_rows_of_datasets(made: Path, tmp_path: Path) -> None:
    """A column of images, as `datasets` stores them, gives the run that their paths give."""
    rows = [dict(row) for row in read_rows(str(made / "rows" / "rows.jsonl"))]
    for row in rows:
        row["images"] = [str(made / "rows" / name) for name in row["images"]]
    kind = datasets.List(datasets.Image())
    table = datasets.Dataset.from_list(rows).cast_column("images", kind)
    table.save_to_disk(str(tmp_path / "saved"))
    run(made, tmp_path / "paths", "--steps", 2)
    run(made, tmp_path / "stored", "--steps", 2, "--dataset", tmp_path / "saved")
    paths, stored = (
        [line["loss"] for line in read_metrics(tmp_path / name)] for name in ("paths", "stored")
    )
    assert paths == stored


def test_a_table_of_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Side by side, a run takes the steps that it takes alone; texts and images do not mix."""
    run(made, tmp_path / "alone", "--steps", 2)
    table = tiny_decoder.write_jsonl(
        tmp_path / "t.jsonl", [{"name": "a"}, {"name": "b", "rank": 2}]
    )
    run(made, tmp_path / "many", "--steps", 2, "--many", table)
    alone, beside = ([x["loss"] for x in read_metrics(tmp_path / n)] for n in ("alone", "many/a"))
    np.testing.assert_allclose(beside, alone, rtol=1e-5)
    texts = str(tiny_decoder.write_rows(tmp_path / "texts.jsonl"))
    tiny_decoder.write_jsonl(table, [{"name": "a"}, {"name": "b", "dataset": [texts]}])
    with pytest.raises(SystemExit):
        run(made, tmp_path / "mixed", "--steps", 2, "--many", table)
    assert "The rows of a have images, but the rows of b" in capsys.readouterr().err
