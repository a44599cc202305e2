"""Exports of tiny adapters: they read back, and impossible ones are refused before the work."""

import functools
import importlib
import json
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.buckets.copies import COPY_PREFIX
from tests.models.tiny import run as plain_logits
from tests.support import assert_close, assert_identical, with_random_factors
from tests.train.tiny import tokenizer, write_model, write_rows
from train import sft
from train.export.__main__ import main
from train.run.pretrained import read_model_info

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IDS = np.array([[1, 5, 77, 200, 3]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the tiny model."""
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of a run, of which only the adapter is there."""
    folder = tmp_path_factory.mktemp("trained")
    _, params = models.from_pretrained(base)
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj", "v_proj"], rank=2)])
    about = read_model_info(str(base)).about
    lj.save_adapter(folder / "adapter", with_random_factors(tree), about=about)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl")
    args = ["--model", base, "--dataset", rows, "--output", folder / "run", "--batch-size", 4]
    args += ["--steps", 3, "--lr", 3e-2, "--rank", 2, "--targets", "q_proj", "v_proj"]
    sft.main([str(arg) for arg in args])
    return folder / "run"


@pytest.fixture
def saved(base, tmp_path):
    """Writes an adapter of the rules, far from zero, that names its base."""

    def save(*rules):
        _, params = models.from_pretrained(base)
        tree = with_random_factors(lj.lorafy(params, rules))
        lj.save_adapter(tmp_path / "run" / "adapter", tree, about={"model": str(base)})
        return tmp_path / "run" / "adapter", tree

    return save


def export(*args):
    main([str(arg) for arg in args])


def fails(capsys, *args, code=2):
    """What is said before the end with this exit code."""
    with pytest.raises(SystemExit) as caught:
        export(*args)
    shown = capsys.readouterr()
    assert caught.value.code == code
    assert "Traceback" not in shown.err
    if code == 2:
        assert shown.err.strip().startswith("error: ")
        assert shown.err.strip().count("\n") == 0, "one paragraph"
        return shown.err.strip()
    return shown.out.strip()


@functools.partial(jax.jit, static_argnames="model")
def logits(model, tree):
    return lj.adapt(model.apply)({"params": tree}, IDS)


@pytest.mark.slow
def test_a_run_as_a_peft_adapter(base, finished, tmp_path, capsys):
    output = tmp_path / "peft"
    export("--adapter", finished / "adapter", "--output", output)
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown and "adapter_config.json" in shown
    assert "names no base, because the base is a local folder" in shown
    assert f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"' in shown
    assert {path.name for path in tmp_path.iterdir()} == {"peft"}
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # no path of this machine
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 2
    model, params = models.from_pretrained(base)
    tree = lj.load_adapter(finished / "adapter", params)
    assert_identical(lp.load(output, model, params), tree)
    assert np.abs(logits(model, tree) - plain_logits(model, params, IDS)).max() > 1e-3
    for file in output.iterdir():
        assert str(base).encode() not in file.read_bytes()
    args = ["--adapter", finished / "adapter", "--output", output, "--overwrite"]
    export(*args, "--base-name", "owner/name")
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert "which a merged model (--merged) does not have" in fails(
        capsys, *args, "--base-name", "owner/name", "--merged"
    )


@pytest.mark.slow
def test_a_run_as_a_merged_model(base, finished, tmp_path, capsys):
    output = tmp_path / "merged"
    args = ["--adapter", finished / "adapter", "--output", output, "--merged"]
    export(*args, "--max-shard-size", "0.02MB")
    shown = capsys.readouterr().out
    assert f'AutoModelForCausalLM.from_pretrained("{output}")' in shown and "float32" in shown
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    model, params = models.from_pretrained(base)
    tree = lj.load_adapter(finished / "adapter", params)
    again, merged = models.from_pretrained(output)
    assert_close(plain_logits(again, merged, IDS), logits(model, tree), 1e-5)
    assert models.load_tokenizer(output)("abc") == tokenizer()("abc")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_merged_model_is_rounded_once(base, trained, tmp_path, dtype):
    output = tmp_path / "merged"
    export("--adapter", trained / "adapter", "--output", output, "--merged", "--dtype", dtype)
    model, params = models.from_pretrained(base)
    merged = lj.merge(lj.load_adapter(trained / "adapter", params))
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), merged)
    _, found = models.from_pretrained(output, dtype=jnp.dtype(dtype))
    assert_identical(found, expected)
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype


def test_the_dtype_is_that_of_the_bases_files(base, trained, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(base, half)
    tensors = load_file(half / "model.safetensors")
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, half / "model.safetensors")
    args = ["--adapter", trained / "adapter", "--model", half, "--merged"]
    output = tmp_path / f"{COPY_PREFIX}x1/gs/bucket/merged"  # written here, then sent to the bucket
    export(*args, "--output", output)
    said = " ".join(capsys.readouterr().out.split())
    assert 'Load it with: lora_jax.models.from_pretrained("gs://bucket/merged").' in said
    assert "(gcloud storage cp -r gs://bucket/merged FOLDER)" in said and "Auto" not in said
    with safe_open(output / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


@pytest.mark.slow
def test_peft_to_peft_makes_plain_lora_of_pissa(base, saved, tmp_path, capsys):
    adapter, tree = saved(lj.LoraRule(targets=["q_proj"], rank=2, init=lj.init.pissa))
    model, params = models.from_pretrained(base)
    export("--adapter", adapter, "--output", tmp_path / "plain")
    first = lp.load(tmp_path / "plain", model, params)
    assert_close(logits(model, first), logits(model, tree), 1e-5)

    # The file that PEFT would write of it without converting.
    node = tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    tensors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = np.asarray(node.a)[layer].reshape(2, -1)
        tensors[f"{stem}.lora_B.weight"] = np.asarray(node.b)[layer].reshape(2, -1).T.copy()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * float(node.scale[0])}
    fields |= {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    fields |= {"base_model_name_or_path": str(base)}
    (theirs / "adapter_config.json").write_text(json.dumps(fields))
    assert "Convert it" in fails(capsys, "--adapter", theirs, "--check-serving", code=1)
    export("--adapter", theirs, "--output", tmp_path / "converted", "--check-serving")
    converted = lp.load(tmp_path / "converted", model, params)
    assert_close(logits(model, converted), logits(model, tree), 1e-5)
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["init_lora_weights"] is True


def test_check_serving(saved, trained, tmp_path, capsys):
    export("--adapter", trained / "adapter", "--check-serving")
    assert capsys.readouterr().out == "Serving: no problems found.\n"
    message = fails(
        *(capsys, "--adapter", trained / "adapter", "--check-serving", "--max-rank", 1), code=1
    )
    assert (
        message == "rank 2: It exceeds the maximum of 1. Start the engine with --max-lora-rank 8."
    )

    adapter, _ = saved(
        lj.TrainRule(targets=["norm"]), lj.LoraRule(targets=["q_proj"], rank=32, dora=True)
    )
    output = tmp_path / "peft"
    message = fails(capsys, "--adapter", adapter, "--check-serving", "--output", output, code=1)
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "use_dora",
        "modules_to_save model.norm",
        "rank 32",
    ]
    assert not output.exists()
    export("--adapter", adapter, "--output", output)
    capsys.readouterr()
    assert fails(capsys, "--adapter", output, "--check-serving", code=1) == message


def test_for_serving(base, saved, tmp_path, capsys):
    """Ranks and scales that differ, which an engine would ignore, become one of each."""
    rules = [lj.LoraRule(targets=[f"{x}_proj"], rank=r, alpha=7) for x, r in (("q", 2), ("v", 3))]
    adapter, tree = saved(*rules)
    args = ["--adapter", adapter, "--output", tmp_path / "served", "--check-serving"]
    assert "with --for-serving" in fails(capsys, *args, code=1)
    export(*args, "--for-serving")
    assert "Load it with: PeftModel.from_pretrained(AutoModel" in capsys.readouterr().out
    copy = tmp_path / f"{COPY_PREFIX}x1/gs/bucket/served"
    export(*args[:3], copy, "--for-serving")
    said = " ".join(capsys.readouterr().out.split())
    assert 'Load it with: lora_jax.peft.load("gs://bucket/served", model, params).' in said
    assert lp.serving_problems(tmp_path / "served") == []
    model, params = models.from_pretrained(base)
    assert_close(lj.merge(lp.load(tmp_path / "served", model, params)), lj.merge(tree), 1e-6)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["There is nothing to do. Add --output, --gguf, --diffusers, --push-to-hub or"]),
        (["--merged"], ["Name a folder with --output, or a file with --gguf"]),
        (["--merged", "--check-serving", "--output", "out"], ["is for adapters"]),
        (["--merged", "--for-serving", "--output", "out"], ["--for-serving is for adapters"]),
        (["--for-serving", "--check-serving"], ["--for-serving writes an adapter"]),
        (["--dtype", "bfloat16", "--output", "out"], ["--dtype needs --merged"]),
        (["--max-shard-size", "5", "--output", "out"], ["--max-shard-size 5 is not a size"]),
        (["--max-shard-size", "0GB", "--output", "out"], ["--max-shard-size 0GB is not a size"]),
        (["--private", "--output", "out"], ["--private needs a repository on the hub"]),
        (["--max-rank", "0", "--check-serving"], ["--max-rank is 0. Use a rank of at least 1"]),
        (["--adapter", "nowhere", "--check-serving"], ["--adapter nowhere: There is no such"]),
        (["--model", "nowhere.gguf", "--output", "out"], ["nowhere.gguf is neither a file"]),
    ],
)
def test_options_that_make_no_sense(trained, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, "--adapter", trained / "adapter", *args)
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_cannot_be_merged(saved, tmp_path, capsys):
    adapter, _ = saved(lj.LoraRule(targets=["q_proj"], rank=2, bias_on_b=True))
    message = fails(capsys, "--adapter", adapter, "--merged", "--output", tmp_path / "out")
    assert message.startswith("error: --merged: merge: ") and "bias on B" in message
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_adapter_of_one_use_cannot_be_merged(base, tmp_path, capsys):
    model, params = models.from_pretrained(base)
    rule = lj.LoraRule(targets=["embed_tokens"], rank=2, uses="lookup")
    lp.save(tmp_path / "peft", model, with_random_factors(lj.lorafy(params, [rule])))
    args = ["--adapter", tmp_path / "peft", "--model", base, "--merged"]
    message = fails(capsys, *args, "--output", tmp_path / "out")
    assert "for one use of it only" in message
    assert {path.name for path in tmp_path.iterdir()} == {"peft"}


@pytest.mark.slow
def test_full_fine_tuning_is_no_adapter_of_pefts(saved, tmp_path, capsys):
    adapter, tree = saved(lj.TrainRule(targets=".*"))
    message = fails(capsys, "--adapter", adapter, "--output", tmp_path / "out")
    assert "adapts no module with LoRA" in message and "--merged" in message
    export("--adapter", adapter, "--merged", "--output", tmp_path / "out")
    assert_identical(models.from_pretrained(tmp_path / "out")[1], lj.merge(tree))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.25, 0.5])
def test_a_run_prints_a_command_that_takes_its_adapter(base, saved, tmp_path, capsys, dropout):
    """PEFT has one dropout for all modules."""
    rules = (lj.LoraRule(targets=["q_proj"], rank=2, dropout=0.25),)
    adapter, _ = saved(*rules, lj.LoraRule(targets=["v_proj"], rank=2, dropout=dropout))
    args = ["--model", base, "--dataset", write_rows(tmp_path / "rows.jsonl"), "--steps", 1]
    args += ["--init-adapter", adapter, "--output", tmp_path / "on", "--batch-size", 4]
    sft.main([str(arg) for arg in args])
    told = " ".join(capsys.readouterr().out.split())
    command = shlex.split(re.search(r"to export it: (.*?exported(?: --merged)?)", told)[1])
    assert ("--merged" in command) == (dropout != 0.25)
    main(command[command.index("--adapter") :])
    assert (tmp_path / "on" / "exported").is_dir()


def test_another_base_is_refused(trained, tmp_path, capsys):
    other = write_model(tmp_path / "other", scale=1.5)
    args = ["--adapter", trained / "adapter", "--model", other, "--output", tmp_path / "out"]
    message = fails(capsys, *args)
    assert "trained on another base" in message and "--allow-base-mismatch" in message
    assert not (tmp_path / "out").exists()
    export(*args, "--allow-base-mismatch")
    assert (tmp_path / "out").is_dir()


def test_a_folder_without_an_adapter(tmp_path, capsys):
    assert "holds no adapter" in fails(capsys, "--adapter", tmp_path, "--check-serving")


def test_an_adapter_stands_alone(trained, tmp_path):
    """Its folder, moved away from its run, says all that is needed. A run's folder means it."""
    shutil.copytree(trained / "adapter", tmp_path / "moved")
    export("--adapter", tmp_path / "moved", "--output", tmp_path / "out")
    export("--adapter", trained, "--output", tmp_path / "beside")
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("out", "beside")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_that_names_no_base(base, tmp_path, capsys):
    _, params = models.from_pretrained(base)
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)])
    lj.save_adapter(tmp_path / "unnamed", tree)
    message = fails(capsys, "--adapter", tmp_path / "unnamed", "--output", tmp_path / "out")
    assert message.endswith("does not state its base model. Name the base with --model.")


def test_what_is_there_is_not_overwritten(base, trained, tmp_path, capsys):
    output = tmp_path / "out"
    args = ["--adapter", trained / "adapter", "--output", output]
    export(*args)
    before = (output / "adapter_config.json").stat().st_mtime_ns
    assert "replace it with --overwrite" in fails(capsys, *args)
    assert (output / "adapter_config.json").stat().st_mtime_ns == before
    message = fails(capsys, *args, "--merged", "--overwrite")
    assert "holds something other than a model" in message
    export(*args, "--overwrite")
    assert (output / "adapter_config.json").stat().st_mtime_ns > before

    # A run's folder is no model's.
    args = ["--adapter", trained / "adapter", "--overwrite", "--merged", "--output"]
    assert "holds something other than a model" in fails(capsys, *args, trained)
    assert "the input" in fails(capsys, *args, base)
    again = ["--adapter", output, "--output", output, "--overwrite", "--model", base]
    assert "the input" in fails(capsys, *again)
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert "holds something other than a model" in fails(capsys, *args, copy)
    assert (copy / "adapter").is_dir()


def test_a_damaged_adapter_is_not_taken_for_that_of_another_base(trained, tmp_path, capsys):
    folder = tmp_path / "cut"
    shutil.copytree(trained / "adapter", folder)
    metadata = folder / "lora" / "metadata"
    metadata.write_text(metadata.read_text()[:-20])
    message = fails(capsys, "--adapter", folder, "--output", tmp_path / "out")
    assert "is damaged and cannot be read" in message and "--model" not in message


def test_a_base_without_a_tokenizer(base, trained, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, bare / name)
    args = ["--adapter", trained / "adapter", "--model", bare, "--merged"]
    export(*args, "--output", tmp_path / "out")
    assert f"{bare} holds no tokenizer" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_a_failed_write_leaves_nothing(trained, tmp_path, monkeypatch, capsys, options):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(f"{path} cannot be written: no space left on device")

    for module in ("lora_jax.peft.contents", "lora_jax.hf.save"):
        monkeypatch.setattr(importlib.import_module(module), "write_tensors", full)
    output = tmp_path / "out"
    message = fails(capsys, "--adapter", trained / "adapter", "--output", output, *options)
    assert "no space left on device" in message
    assert list(tmp_path.iterdir()) == []
