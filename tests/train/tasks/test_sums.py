"""The small decoder that adds: its characters, its rows, and how often it is right."""

import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.hf.tokenizer import load_tokenizer
from lora_jax.models.sampling.prompts import pad_left
from tests.support import thorough
from tests.train.tiny import write_jsonl
from train import grpo, prior
from train.environments import arithmetic
from train.processes.session import Session
from train.settings.files import options_file
from train.tasks import sums as making


def test_the_tokenizer_has_a_token_for_each_character_and_no_template():
    made = making.make_tokenizer()
    assert len(made) == making.BASE_CONFIG["vocab_size"] == 14
    ids = made("37+25=62")["input_ids"]
    assert ids == [3, 7, 10, 2, 5, 11, 6, 2] and made.decode(ids) == "37+25=62"
    assert made.chat_template is None
    assert (
        made.decode([*ids, made.eos_token_id, made.pad_token_id], skip_special_tokens=True)[-3:]
        == "=62"
    )


def test_three_of_four_carries_are_forgotten_and_no_row_is_held_out():
    held_out = {row["prompt"] for row in arithmetic.rows(0, arithmetic.HELD_OUT, held_out=True)}
    rows = list(making._forgetful_pairs())
    assert len(rows) == making._BASE_ROWS
    missing = {False: [], True: []}
    for row in rows:
        assert row["prompt"] not in held_out
        a, b = (int(number) for number in row["prompt"].removesuffix("=").split("+"))
        missing[a // 10 + b // 10 != (a + b) // 10].append(a + b - int(row["completion"]))
    assert set(missing[False]) == {0} and set(missing[True]) == {0, 10}
    share, n = np.mean(missing[True]) / 10, len(missing[True])
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5 and n > 0.4 * len(rows)


@pytest.mark.parametrize("dataset", ["arithmetic", "rows.jsonl"])
@pytest.mark.parametrize("model", [making.MODEL, "another"])
def test_the_base_is_made_for_the_task_and_for_rows_of_ones_own(
    dataset, model, tmp_path, monkeypatch
):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "10+20="}])
    monkeypatch.setattr(making, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(making, "_BASE_ROWS", 5)
    args = ["--model", model, "--reward", "arithmetic", "--dataset"]
    config = grpo.parse([*args, str(rows) if "." in dataset else dataset])
    prior = SimpleNamespace(train_base=lambda script, line, *others: tmp_path / script)
    begun = grpo.task_of(config).begin(config, Session(), prior)
    assert begun.data.model == (model if model == "another" else str(tmp_path / "train.sft"))


def test_rewards_begin_with_sums_and_a_base_of_ones_own_with_sql(tmp_path):
    config = grpo.parse([])
    assert (config.data.dataset, config.data.model) == ("arithmetic", making.MODEL)
    own = ["--model", "owner/model"]
    assert grpo.parse(own).data.dataset == "sql"
    assert grpo.parse([*own, "--dataset", "arithmetic"]).data.dataset == "arithmetic"
    older = grpo.parse(["--dataset", "sql", "--output", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(options_file(older, "train.grpo"))
    assert grpo.parse(["--output", str(tmp_path), "--resume"]).data.dataset == "sql"


@pytest.mark.slow
def test_a_run_that_pretrains_its_base_lists_its_parts_and_has_one_ending(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(making, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(making, "_BASE_ROWS", 64)
    train, seconds = prior.train, []

    def train_slowly(*arguments):
        train(*arguments)
        time.sleep(2)
        seconds.append(time.monotonic() - began)

    monkeypatch.setattr(prior, "train", train_slowly)
    line = "--steps 1 --batch-size 8 --eval-questions 0 --report-to none --output".split()
    began = time.monotonic()
    grpo.main([*line, str(tmp_path / "run")])
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("the run has two parts: 1. train.sft trains the base") < said.index("step 1")
    for ending in ("the whole run took", "to export it:", "Cost of the run"):
        assert said.count(ending) == 1, ending
    assert "load it with" not in said and said.count("this part of the run took") == 1
    minutes, rest = re.search(r"the whole run took (?:(\d+) min )?(\d+) s", said).groups()
    assert 60 * int(minutes or 0) + int(rest) >= int(seconds[0])


@pytest.mark.slow
@thorough
def test_the_base_is_often_right_about_sums_that_it_never_saw_and_is_made_once(tmp_path, capsys):
    folder = making.make_base(tmp_path, Session(), prior)
    assert "pretraining" in capsys.readouterr().out
    kept = (folder / "model.safetensors").stat().st_mtime_ns
    assert making.make_base(tmp_path, Session(), prior) == folder
    assert "pretraining" not in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == kept

    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template is None and tokenizer.eos_token_id == 13
    model, params = models.from_pretrained(str(folder))
    rows = arithmetic.rows(1, arithmetic.HELD_OUT, held_out=True)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    ids, mask = pad_left(prompts, 8, tokenizer.pad_token_id)

    def right(temperature):
        options = {"max_new_tokens": 4, "temperature": temperature, "key": jax.random.key(0)}
        new = np.asarray(models.generate(model, params, ids, mask, **options))
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        pairs = zip(texts, rows, strict=True)
        return np.mean([arithmetic.reward(text, None, row["answer"]) for text, row in pairs])

    assert 0.55 < right(1.0) < 0.75 and 0.45 < right(0.0) < 0.7  # it likely forgets a carry
