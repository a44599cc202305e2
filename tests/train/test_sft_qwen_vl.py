"""Qwen3.5 with images through the whole scripts: a run learns colours, resumes, answers, merges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.support import assert_identical, thorough
from tests.train import tiny_qwen_vl as tiny
from tests.train.tiny_smolvlm import write_rows
from train.export.__main__ import main as export
from train.generate.__main__ import main as generate
from train.run.log import read_metrics
from train.sft import main

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
OPTIONS = ["--batch-size", 4, "--rank", 4, "--lr", 1e-2, "--seq-len", 256, "--log-every", 1]
OPTIONS += ["--schedule", "constant", "--warmup", 1, "--targets", "all-linear"]


def run(made: Path, folder: Path, *args: Any) -> Path:
    options = ["--model", made / "model", "--dataset", made / "rows" / "rows.jsonl", *OPTIONS]
    main([*map(str, (*options, *args)), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and chats about its images."""
    folder = tmp_path_factory.mktemp("made")
    tiny.write_qwen_vl(folder / "model")
    write_rows(folder / "rows", 24)
    return folder


def answers(adapter: Path | str, folder: Path, *args: Any) -> list[str]:
    options = ["--adapter", adapter, "--max-new-tokens", 12, "--overwrite"]
    generate([*map(str, (*options, "--output", folder / "said.jsonl", *args))])
    lines = (folder / "said.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def test_a_run_learns_what_images_show(made: Path, tmp_path: Path) -> None:
    """It answers as it learned; PEFT's files and a merged folder answer the same."""
    folder = run(made, tmp_path / "run", "--steps", 100, "--eval-every", 50)
    assert read_metrics(folder)[-1]["eval_loss"] < 0.3
    rows = [json.loads(line) for line in (made / "rows" / "rows.jsonl").read_text().splitlines()]
    asked = [{**row, "messages": row["messages"][:1]} for row in rows]
    asks = made / "rows" / "asks.jsonl"
    asks.write_text("".join(f"{json.dumps(one)}\n" for one in asked))
    learned = answers(folder, tmp_path, "--prompts", asks)
    right = [row["messages"][1]["content"][0]["text"] for row in rows]
    assert sum(a == b for a, b in zip(learned, right, strict=True)) > 19
    export(["--adapter", str(folder), "--output", str(tmp_path / "peft")])
    given = ("--prompts", asks, "--model", made / "model")
    assert answers(tmp_path / "peft", tmp_path, *given) == learned
    export(["--adapter", str(folder), "--output", str(tmp_path / "merged"), "--merged"])
    model, _ = models.from_pretrained(tmp_path / "merged", images=True)
    assert isinstance(model, models.QwenVL)


@thorough  # as test_sft.py does
def test_a_resumed_run_ends_where_a_whole_one_does(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", "--steps", 4)
    run(made, tmp_path / "half", "--steps", 2)
    run(made, tmp_path / "half", "--steps", 4, "--resume")
    _, params = models.from_pretrained(made / "model", images=True)
    whole, half = (
        lj.split(lj.load_adapter(tmp_path / name / "adapter", params))[0]
        for name in ("whole", "half")
    )
    assert any("visual" in path for path in whole)
    assert_identical(whole, half)
    losses = [line["loss"] for line in read_metrics(tmp_path / "whole")]
    assert np.isfinite(losses).all()


def test_peft_of_texts_is_merged_into_the_model_whose_names_it_has(
    made: Path, tmp_path: Path
) -> None:
    rules = [lj.LoraRule(targets=["q_proj"], rank=2)]
    for name, kind in (("whole", models.QwenVL), ("text", models.Decoder)):
        images = {"images": True} if name == "whole" else {}
        model, params = models.from_pretrained(made / "model", **images)
        lp.save(tmp_path / name, model, lj.lorafy(params, rules))
        args = ["--adapter", tmp_path / name, "--model", made / "model", "--merged"]
        export([*map(str, [*args, "--output", tmp_path / "merged" / name])])
        merged, _ = models.from_pretrained(tmp_path / "merged" / name, **images)
        assert isinstance(model, kind) and isinstance(merged, kind)
        card = (tmp_path / "merged" / name / "README.md").read_text()
        assert ("images=True" in card) == (name == "whole")


def test_texts_alone_and_what_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of texts train the text's adapter, which is not asked about images."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"prompt": "colour?", "completion": "blue"}\n' * 4)
    run(made, tmp_path / "texts", "--dataset", rows, "--steps", 1)
    assert "images" not in lj.adapter_info(tmp_path / "texts" / "adapter")
    image = next((made / "rows").glob("*.png"))
    for args, message in (
        (["--adapter", tmp_path / "texts"], "was trained on .* as a model of text only"),
        (["--model", made / "model", "--tokenizer", made / "model"], "its own tokenizer"),
    ):
        with pytest.raises(SystemExit):
            generate([*map(str, args), "--prompt", "colour?", "--image", str(image)])
        assert_matches(message, capsys.readouterr().err)
    words = ["--model", made / "model", "--dataset", made / "rows" / "rows.jsonl", "--steps", 1]
    words += ["--init-adapter", tmp_path / "texts", "--output", tmp_path / "goes_on"]
    with pytest.raises(SystemExit):
        main([*map(str, words)])
    assert_matches("on the text of .* alone, but this command reads", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        run(made, tmp_path / "packed", "--steps", 1, "--packing")
    assert "--packing does not work with images" in capsys.readouterr().err


def assert_matches(message: str, text: str) -> None:
    import re

    assert re.search(message, " ".join(text.split())), text
