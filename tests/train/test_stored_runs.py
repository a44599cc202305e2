"""Runs over a checkpoint in FP8: it stays so, unless arrays are asked for."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.models import from_pretrained
from lora_jax.quantized import dequantize, is_coded
from tests.hf import shipped
from tests.support import assert_close
from tests.train.test_sft import run
from tests.train.tiny import CONFIG, write_model, write_rows
from train.export import __main__ as export
from train.generate import __main__ as generate

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 136, "intermediate_size": 200, "num_attention_heads": 4}
UP = "model/layers/mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a checkpoint in FP8, one with the weights that its codes mean)"""
    floats = write_model(tmp_path_factory.mktemp("models") / "floats", **SIZES)
    folder = floats.parent / "shipped"
    shutil.copytree(floats, folder)
    tensors = load_file(floats / "model.safetensors")
    meant = shipped.ship(folder, CONFIG | SIZES, tensors, "fp8 blocks, bf16")
    shipped.plain(floats, CONFIG | SIZES, meant)
    return folder, floats


@pytest.fixture(scope="module")
def options(models):
    rows = write_rows(models[0].parent / "rows.jsonl")
    return ["--dataset", str(rows), "--batch-size", "4", "--lr", "0.01", "--steps", "2"]


def sft(model, options, folder, *more):
    return run(["--model", str(model), *options], folder, "--rank", 2, *more)


@pytest.fixture(scope="module")
def trained(models, options):
    return sft(models[0], options, models[0].parent / "run")


def factors(folder, model, **how):
    tree = lj.load_adapter(folder / "adapter", from_pretrained(model, **how)[1])
    return lj.split(tree)[0]


def test_a_run_keeps_the_codes_and_trains_as_over_what_they_mean(models, options, trained):
    assert lj.adapter_info(trained / "adapter")["quantize"] == "stored"
    base = from_pretrained(models[0])[1]
    size = json.loads((trained / "report.json").read_text())["base_bytes"]
    assert size == sum(lj.quantized.bytes_of(x) for x in jax.tree.leaves(base))
    got = factors(trained, models[0])
    want = factors(sft(models[1], options, trained.parent / "floats-run"), models[1])
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), got, want)


def test_arrays_are_asked_for(models, options, trained, capsys):
    folder = sft(models[0], options, trained.parent / "arrays", "--quantize", "none")
    assert lj.adapter_info(folder / "adapter")["quantize"] == "none"
    sizes = [json.loads((f / "report.json").read_text())["base_bytes"] for f in (folder, trained)]
    assert sizes[0] > 2 * sizes[1]
    capsys.readouterr()
    generate.main(["--adapter", str(folder), "--prompt", "hello", "--max-new-tokens", "2"])
    assert "merged into the base" in capsys.readouterr().err


def test_full_fine_tuning_has_arrays(models, options, tmp_path):
    run(["--model", str(models[0]), *options], tmp_path / "full", "--full")
    report = json.loads((tmp_path / "full" / "report.json").read_text())
    assert report["base_bytes"] == sum(
        x.nbytes for x in jax.tree.leaves(from_pretrained(models[1])[1])
    )


def test_answers_and_exports(models, trained, tmp_path, capsys):
    ask = ["--prompt", "hello", "--max-new-tokens", "2"]
    generate.main(["--model", str(models[0]), *ask])
    generate.main(["--adapter", str(trained), *ask])
    assert "not merged (the base is quantized" in capsys.readouterr().err
    export.main(["--adapter", str(trained), "--merged", "--output", str(tmp_path / "whole")])
    assert "dequantized stored values of the base plus the update" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in config
    whole = from_pretrained(tmp_path / "whole")[1]
    assert not any(map(is_coded, jax.tree.leaves(whole, is_leaf=is_coded)))
    tree = lj.load_adapter(trained / "adapter", from_pretrained(models[0])[1])
    jax.tree.map(np.testing.assert_array_equal, whole, dequantize(lj.merge(tree)))
    export.main(["--adapter", str(trained), "--output", str(tmp_path / "peft")])
    assert "Serve it over the same" in " ".join(capsys.readouterr().out.split())


def test_a_merged_export_keeps_what_the_adapter_leaves_alone(models, options, tmp_path, capsys):
    run_of = sft(models[0], options, tmp_path / "run", "--targets", "q_proj")
    capsys.readouterr()
    export.main(["--adapter", str(run_of), "--merged", "--output", str(tmp_path / "whole")])
    said = " ".join(capsys.readouterr().out.split())
    tree = lj.merge(lj.load_adapter(run_of / "adapter", from_pretrained(models[0])[1]))
    n_layers = len(tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"])
    assert f"{4 * n_layers} kernels stay quantized as in {models[0]}, byte for byte" in said
    assert "self_attn.k_proj, model.layers.{}.self_attn.v_proj are dequantized, though" in said
    whole = from_pretrained(tmp_path / "whole")[1]
    kernels = whole["model"]["layers"]
    coded = {n for part in ("self_attn", "mlp") for n, k in kernels[part].items() if in_codes(k)}
    assert coded == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    jax.tree.map(np.testing.assert_array_equal, dequantize(whole), dequantize(tree))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert f"model.layers.{n_layers - 1}.self_attn.v_proj" in config["modules_to_not_convert"]
    arrays = ["--merged", "--quantize", "none", "--output", str(tmp_path / "arrays")]
    export.main(["--adapter", str(run_of), *arrays])
    config = json.loads((tmp_path / "arrays" / "config.json").read_text())
    assert "quantization_config" not in config
    again = from_pretrained(tmp_path / "arrays")[1]
    jax.tree.map(np.testing.assert_array_equal, again, dequantize(tree))


def test_what_quantize_is_about(models, options, trained, tmp_path, capsys):
    floats = sft(models[1], options, tmp_path / "run")
    for adapter, more, message in [
        (floats, ["--merged"], "--quantize none has no effect.* Remove --quantize"),
        (trained, [], "--quantize needs --merged"),
    ]:
        asked = ["--adapter", str(adapter), "--output", str(tmp_path / "out"), "--quantize", "none"]
        with pytest.raises(SystemExit):
            export.main([*asked, *more])
        assert re.search(message, " ".join(capsys.readouterr().err.split()))


def in_codes(module):
    return is_coded(module["kernel"])
