"""A run over a base in codes, and what follows it: each reads the base in the codes of the run."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.models import from_pretrained
from lora_jax.quantized import dequantize
from tests.hf.test_gguf import write
from tests.hf.vocabularies import byte_level, metadata_of
from tests.models.tiny import run as plain_logits
from tests.support import assert_close, thorough
from tests.train.test_classify import words, write_encoder
from tests.train.test_sft import fails, run
from tests.train.tiny import decoder, write_jsonl, write_model, write_rows
from train import classify, sft
from train.adapters.source import find_adapter, prepare_to_run
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.options.defaults import Defaults
from train.plan import __main__ as plan
from train.predict import __main__ as predict
from train.run.log import read_metrics
from train.run.pretrained import read_model_info
from train.settings.defaults import fill_defaults

UP = "model/layers/mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", scale=1.5)


@pytest.fixture(scope="module")
def inputs(model):
    rows = write_rows(model.parent / "rows.jsonl")
    options = ["--batch-size", "4", "--rank", "2", "--alpha", "20", "--lr", "0.01"]
    options += ["--targets", "q_proj", "up_proj"]
    return ["--model", str(model), "--dataset", str(rows), *options]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run(inputs, folder, "--steps", 3, "--quantize", "nf4")


@pytest.mark.slow
def test_the_adapter_knows_the_codes_it_was_trained_over(inputs, trained, capsys):
    assert lj.adapter_info(trained / "adapter")["quantize"] == "nf4"
    size = json.loads((trained / "report.json").read_text())["base_bytes"]
    assert size == sum(lj.quantized.bytes_of(x) for x in jax.tree.leaves(coded(inputs[1])))
    ahead = sft.parse([*inputs[:4], "--init-adapter", str(trained)])
    defaults = Defaults(model="none", alpha=2.0, lr=0.1, full_lr=0.1)
    assert fill_defaults(ahead, defaults).optim.quantize == "nf4"
    said = fails(
        capsys, *inputs[:6], "--output", trained.parent / "other", "--init-adapter", trained,
        "--quantize", "none",
    )  # fmt: skip
    assert "another base" in said and UP in said


def coded(model):
    return from_pretrained(model, quantize="nf4")[1]


def tree_of(trained, model):
    return lj.load_adapter(trained / "adapter", coded(model))


@pytest.mark.slow
def test_a_step_is_that_of_the_tree_in_codes(inputs, trained):
    """The base's own values, dequantised, give the same run."""
    folder = trained.parent / "floats"
    stored = trained.parent / "dequantised"
    model, _ = from_pretrained(inputs[1])
    lj.models.save_pretrained(stored, model, dequantize(coded(inputs[1])), tokenizer=inputs[1])
    run(["--model", str(stored), *inputs[2:]], folder, "--steps", 3)
    want = lj.split(lj.load_adapter(folder / "adapter", from_pretrained(stored)[1]))[0]
    got = lj.split(tree_of(trained, inputs[1]))[0]
    assert got.keys() == want.keys() and len(got) == 2
    for path, parts in want.items():
        for name in ("a", "b"):
            assert_close(got[path][name], parts[name], 1e-5)


@pytest.mark.slow
def test_answers_and_exports_are_those_of_the_codes(inputs, trained, model, tmp_path, capsys):
    tree = tree_of(trained, model)
    net, _ = from_pretrained(model)
    ids = np.array([[5, 9, 70, 3]])
    want = plain_logits(net, dequantize(lj.merge(tree)), ids)
    outline = read_model_info(str(model)).quantized("nf4")
    found = find_adapter(str(trained))
    found.check(outline)
    assert found.quantize == "nf4"
    forward, params = prepare_to_run(net, tree)
    assert params is tree, "codes stay codes"
    assert_close(jax.jit(forward)({"params": params}, ids), want, 1e-5)
    ask = ["--adapter", str(trained), "--prompt", "hello", "--max-new-tokens", "2"]
    generate.main(ask)
    assert "not merged (the base is quantized" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([*ask, "--merge"])
    assert "cannot be merged, because the base is quantized" in capsys.readouterr().err

    export.main(["--adapter", str(trained), "--merged", "--output", str(tmp_path / "whole")])
    assert "dequantized nf4 values of the base plus the update" in capsys.readouterr().out
    _, whole = from_pretrained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, whole, dequantize(lj.merge(tree)))

    export.main(["--adapter", str(trained), "--output", str(tmp_path / "peft")])
    said = " ".join(capsys.readouterr().out.split())
    assert "Load it with quantization_config=BitsAndBytesConfig(load_in_4bit=True" in said
    card = (tmp_path / "peft" / "README.md").read_text()
    assert 'quantize="nf4"' in card and "BitsAndBytesConfig" in card
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 2 * 2 * 2


@pytest.mark.slow
@thorough  # as test_sft.py does
def test_a_resumed_run_ends_bitwise_where_a_whole_one_does(inputs, trained, tmp_path):
    options = ["--quantize", "nf4", "--schedule", "constant", "--warmup", "0"]
    first = run(inputs, tmp_path / "run", "--steps", 1, *options)
    whole = run(inputs, tmp_path / "whole", "--steps", 3, *options)
    run(inputs, first, "--steps", 3, *options, "--resume")
    got, want = (lj.split(tree_of(folder, inputs[1]))[0] for folder in (first, whole))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does(inputs, tmp_path, monkeypatch):
    """Kernels have several blocks, so that scales are sharded as codes are."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    model = write_model(tmp_path / "model", **sizes)
    options = ["--model", str(model), *inputs[2:], "--steps", 3, "--quantize", "nf4"]
    alone = run([], tmp_path / "alone", *options)
    monkeypatch.setattr("train.processes.mesh.all_devices", lambda: jax.devices()[:4])
    placed = run([], tmp_path / "placed", *options, "--mesh", "fsdp=2,tensor=2")
    got, want = ([x["loss"] for x in read_metrics(folder)] for folder in (placed, alone))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(set(want)) == 3


@pytest.mark.slow
def test_a_classifier_over_codes(tmp_path, capsys):
    """Its head trains in full, and is no code; the encoder's kernels are."""
    (folder := tmp_path / "model").mkdir()
    options = ["--model", write_encoder(folder), "--text", "word", "--label", "grade"]
    options += ["--dataset", write_jsonl(tmp_path / "rows.jsonl", words(12)), "--rank", 2]
    options += ["--output", tmp_path / "run", "--steps", 2, "--batch-size", 4, "--quantize", "int8"]
    options += ["--seq-len", 16]
    classify.main([str(option) for option in options])
    about = lj.adapter_info(tmp_path / "run" / "adapter")
    assert about["quantize"] == "int8" and len(about["labels"]) == 3
    capsys.readouterr()
    predict.main(["--adapter", str(tmp_path / "run"), "abba"])
    assert any(label in capsys.readouterr().out for label in about["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--full --quantize nf4", "--full trains every parameter.*Remove --quantize"),
        ("--quantize stored", "are not quantized. Choose a format"),
    ],
)
def test_what_has_no_codes_is_refused(options, message, inputs, tmp_path, capsys):
    given = inputs[:6] if "--full" in options else inputs
    said = fails(capsys, *given, "--output", tmp_path / "run", *options.split())
    assert re.search(message, said), said


def test_types_of_a_gguf_file_that_are_no_codes_here_are_named(inputs, tmp_path, capsys):
    found = metadata_of(byte_level("qwen2"), "qwen2")
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    tiny, params = decoder(vocab_size=len(found["tokenizer.ggml.tokens"]), **sizes)
    write(tmp_path / "model.gguf", tiny.config, params, "Q5_1", tokenizer=found)
    given = ["--model", tmp_path / "model.gguf", *inputs[2:], "--output", tmp_path / "run"]
    said = fails(capsys, *map(str, given), "--quantize", "stored")
    assert (
        "the kernels of this file are Q5_1 (14)" in said and "the others are read as floats" in said
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_counts_codes(model, capsys):
    def planned(*options):
        plan.main(["--model", str(model), "--seq-len", "16", "--json", "--rank", "2", *options])
        return json.loads(capsys.readouterr().out)

    first = planned("--quantize", "nf4")
    assert first["quantize"] == "nf4"
    plain = planned("--alone")
    full = next(one for one in first["others"] if one["name"].startswith("full"))
    kernels = sum(
        x.size
        for p, x in jax.tree_util.tree_leaves_with_path(from_pretrained(model)[1])
        if "proj" in jax.tree_util.keystr(p)
    )
    saved = plain["per_chip_bytes"]["base"] - first["per_chip_bytes"]["base"]
    assert saved == kernels * 2 - sum(
        x.nbytes
        for x in jax.tree.leaves(coded(model), is_leaf=lj.quantized.is_coded)
        if lj.quantized.is_coded(x)
    )
    assert full["per_chip_bytes"]["base"] == 0
    with pytest.raises(SystemExit):
        plan.main(["--model", str(model), "--full", "--quantize", "nf4"])
    assert "quantized weights cannot train" in capsys.readouterr().err
