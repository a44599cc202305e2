"""A run on rows longer than the model's positions: its adapter says how RoPE was scaled."""

import json

import pytest

import lora_jax as lj
from lora_jax import models
from tests.train.test_sft import fails, run
from tests.train.tiny import write_jsonl, write_model
from train import sft
from train.console.errors import UserError
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.options.rope import parse_rope_scaling, rope_scaling_text

SCALING = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}


@pytest.mark.parametrize(
    ("text", "scaling"),
    [
        (None, None),
        ("linear:2", {"rope_type": "linear", "factor": 2.0}),
        ("yarn:4, beta_fast=16", SCALING),
        ("yarn:1.5,truncate=false", {"rope_type": "yarn", "factor": 1.5, "truncate": False}),
        ("dynamic", {"rope_type": "dynamic"}),
    ],
)
def test_a_scaling_is_read(text, scaling):
    assert parse_rope_scaling(text) == scaling
    if text and "factor" in scaling:
        assert parse_rope_scaling(rope_scaling_text(scaling)) == scaling


@pytest.mark.parametrize("text", ["yarn", "yarn:four", "yarn:4,beta", "yarn:4,factor=8", "4", ""])
def test_what_is_no_scaling_is_refused(text):
    with pytest.raises(UserError, match="is not a kind with a factor"):
        parse_rope_scaling(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model", max_position_embeddings=32)
    rows = [{"prompt": f"{i} plus {i}?", "completion": str(2 * i) * 20} for i in range(8)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    options = ["--model", model, "--dataset", data, "--seq-len", "100", "--batch-size", "4"]
    return [str(option) for option in options]


def test_rows_that_are_too_long_are_refused_and_so_is_what_is_not_supported(inputs, capsys):
    said = fails(capsys, *inputs)
    assert "allows at most 32 tokens. Pass a smaller --seq-len, or --rope-scaling" in said
    said = fails(capsys, *inputs, "--rope-scaling", "linear:2")
    assert said.endswith("allows at most 64 tokens. Pass a smaller --seq-len.")
    said = fails(capsys, *inputs, "--rope-scaling", "dynamic")
    assert said.startswith("error: --rope-scaling dynamic: RoPE type 'dynamic' changes")


@pytest.mark.slow
def test_what_follows_a_run_scales_as_it_did(inputs, tmp_path, capsys):
    first = run(inputs, tmp_path / "run", "--steps", 1, "--rope-scaling", "yarn:4,beta_fast=16")
    adapter = first / "adapter"
    assert lj.adapter_info(adapter)["rope_scaling"] == SCALING
    capsys.readouterr()
    said = fails(capsys, *inputs, "--output", first, "--resume", "--rope-scaling", "yarn:8")
    assert "--rope-scaling was yarn:4,beta_fast=16 and is now yarn:8" in said
    ahead = sft.parse([*inputs, "--init-adapter", str(adapter)])
    assert ahead.data.rope_scaling == "yarn:4,beta_fast=16"

    prompt = ["--adapter", str(adapter), "--prompt", "x" * 60]
    generate.main([*prompt, "--max-new-tokens", "4"])
    with pytest.raises(SystemExit):
        generate.main([*prompt, "--max-new-tokens", "400"])
    assert "allows at most 128 tokens" in capsys.readouterr().err

    merged = ["--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--merged"]
    export.main(merged)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128
    assert written["rope_scaling"].items() >= {**SCALING, "beta_slow": 1.0}.items()
    model, _ = models.from_pretrained(tmp_path / "merged")
    assert model.config == models.from_pretrained(inputs[1], rope_scaling=SCALING)[0].config

    capsys.readouterr()
    export.main(["--adapter", str(adapter), "--output", str(tmp_path / "peft")])
    shown = capsys.readouterr().out
    assert "rope_parameters={'rope_type': 'yarn'" in shown
    assert "max_position_embeddings=128)" in shown
    with pytest.raises(SystemExit) as caught:
        export.main(["--adapter", str(adapter), "--check-serving"])
    assert caught.value.code == 1
    assert '--hf-overrides \'{"rope_parameters": ' in capsys.readouterr().out
