"""Folders that are no model as they lie there: --model uses them, or says what they are."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import models
from tests.hf.test_gguf import write as write_gguf
from tests.train.scripts import begun, fails
from tests.train.tiny import CONFIG, decoder, tokenizer, write_model, write_rows
from train import sft
from train.generate import __main__ as generate
from train.run.pretrained import read_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


def pointer(folder):
    (folder / WEIGHTS).write_text(POINTER)
    return [f"{folder / WEIGHTS} is only a git-lfs pointer", f"`git lfs pull` in {folder}"]


def pointer_to_a_tokenizer(folder):
    (folder / "tokenizer.json").write_text(POINTER)
    return [f"{folder / 'tokenizer.json'} is only a git-lfs pointer", f"`git lfs pull` in {folder}"]


def variant(folder):
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    move = f"(mv {folder / 'model.fp16.safetensors'} {folder / WEIGHTS})"
    return [f"but a variant of them, model.fp16.safetensors. Rename it {move}"]


def variant_in_shards(folder):
    (folder / WEIGHTS).rename(folder / "model.fp16-00001-of-00001.safetensors")
    (folder / (index := "model.safetensors.index.fp16.json")).write_text("{}")
    return [f"but a variant of them, {index}. Rename it (mv {folder / index} {folder / INDEX})"]


def shards_alone(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").touch()
    return ["lists the tensors of model-00001-of-00002.safetensors, ", "Copy the index, too"]


def another_name(folder):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    return [f"rename it (mv {folder / 'weights.safetensors'} {folder / WEIGHTS})"]


def pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["a'; b"]}))
    call = f"t.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('{folder}')"
    return ["but only pytorch_model.bin, which is a pickle. A pickle can run any code", call]


def adapter(folder):
    base = folder.parent / "base"
    folder.rename(base)
    tree = lj.lorafy(decoder()[1], [lj.LoraRule(targets=["q_proj"], rank=2)])
    lj.save_adapter(folder / "adapter", tree, about={"model": str(base)})
    own = folder / "adapter"
    return [f"{own} is an adapter, not a model", f"Name its base, {base}, ", f"--adapter {own}"]


def peft_adapter(folder):
    model = models.from_pretrained(folder)[0]
    tree = lj.lorafy(decoder()[1], [lj.LoraRule(targets=["q_proj"], rank=2)])
    lj.peft.save(folder.parent / "adapter", model, tree, base_model="owner/base")
    for file in folder.iterdir():
        file.unlink()
    for file in (folder.parent / "adapter").iterdir():
        file.rename(folder / file.name)
    said = "is an adapter of PEFT, not a model. Name its base, owner/base, as the model"
    return [f"{folder} {said}", f"--init-adapter {folder} to continue its training"]


def bare_and_untied(folder):
    path = folder / WEIGHTS
    save_file({name.removeprefix("model."): x for name, x in load_file(path).items()}, path)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    return ["1 missing, 0 unexpected", "The files have no head", "AutoModelForCausalLM"]


def several_ggufs(folder):
    for file in (WEIGHTS, "config.json"):
        (folder / file).unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    return [f"holds 2 GGUF files. Name one of them, such as {folder / 'a.gguf'}"]


def pointer_to_a_gguf(folder):
    for file in (WEIGHTS, "config.json"):
        (folder / file).unlink()
    (folder / "a.gguf").write_text(POINTER)
    return [f"{folder / 'a.gguf'} is only a git-lfs pointer"]


OF_WEIGHTS = [pointer, variant, variant_in_shards, shards_alone, another_name, pickle]
OF_FOLDERS = [bare_and_untied, adapter, peft_adapter, several_ggufs, pointer_to_a_gguf]


@pytest.mark.parametrize("make", [*OF_WEIGHTS, *OF_FOLDERS, pointer_to_a_tokenizer])
def test_a_folder_says_what_it_is(make, folder, capsys):
    parts = make(folder)
    rows = write_rows(folder.parent / "rows.jsonl")
    given = ["--model", folder]
    said = fails(capsys, generate.main, *given, "--prompt", "hello")
    assert said.startswith(f"--model {folder}: ")
    for part in parts:
        assert part in said
    assert part in fails(
        capsys, sft.main, *given, "--dataset", rows, "--output", folder.parent / "run"
    )
    load = models.load_tokenizer if make is pointer_to_a_tokenizer else models.from_pretrained
    with pytest.raises((models.ConfigError, models.WeightsError)) as caught:
        load(folder)
    assert part in str(caught.value)


def test_a_bare_model_is_used(folder, capsys):
    """As transformers' AutoModel saves one: the names of its tensors lack "model."."""
    path = folder / WEIGHTS
    save_file({name.removeprefix("model."): x for name, x in load_file(path).items()}, path)
    rows = write_rows(folder.parent / "rows.jsonl")
    tree = begun(sft.main, "--model", folder, "--dataset", rows, "--output", folder.parent / "run")
    table = lj.strip(tree)["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(table, decoder()[1]["model"]["embed_tokens"]["embedding"])


def test_an_adapter_that_git_lfs_left_a_pointer_for(folder, capsys):
    (own := folder.parent / "adapter").mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (own / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["q_proj"]}))
    (own / "adapter_model.safetensors").write_text(POINTER)
    said = fails(capsys, generate.main, "--adapter", own, "--prompt", "hello")
    assert f"{own / 'adapter_model.safetensors'} is only a git-lfs pointer" in said


def test_a_model_of_the_hub_that_has_no_safetensors(folder):
    """Its pickle was not downloaded, and the hub's cache is left as it is."""
    cached = folder.parent / "models--owner--name/snapshots/1a2b"
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    (cached / WEIGHTS).unlink()
    with pytest.raises(models.WeightsError, match="only have pytorch_model.bin") as caught:
        models.from_pretrained(cached)
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        call = f"t.{kind}.from_pretrained('owner/name').save_pretrained('name')"
        assert call in str(caught.value)
    assert str(caught.value).endswith(", and then name the folder name")


@pytest.mark.parity
def test_the_command_for_a_pickle_converts_it(folder):
    import torch
    from safetensors.torch import load_file

    want = models.from_pretrained(folder)[1]
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(models.WeightsError) as caught:
        models.from_pretrained(folder)
    exec(re.search('python -c "(import transformers.*LlamaFor.*)"', str(caught.value))[1])
    jax.tree.map(np.testing.assert_array_equal, models.from_pretrained(folder)[1], want)


@pytest.mark.slow
def test_the_gguf_file_of_a_folder_is_the_model(tmp_path, capsys):
    """With the tokenizer beside it, if there is one; the configuration alone is enough to plan."""
    model, params = decoder()
    folder = tmp_path / "model"
    (tmp_path / "parts").mkdir()
    tokenizer().save_pretrained(folder)
    write_gguf(folder / "tiny.gguf", model.config, params)
    loaded = models.from_pretrained(folder)[1]
    assert capsys.readouterr().err == f"Reading tiny.gguf in {folder}\n"
    np.testing.assert_array_equal(
        loaded["model"]["embed_tokens"]["embedding"], params["model"]["embed_tokens"]["embedding"]
    )
    write_gguf(tmp_path / "parts/split.gguf", model.config, params, split=9)
    jax.tree.map(
        np.testing.assert_array_equal, models.from_pretrained(tmp_path / "parts")[1], loaded
    )
    rows = write_rows(tmp_path / "rows.jsonl")
    assert begun(sft.main, "--model", folder, "--dataset", rows, "--output", tmp_path / "run")
    assert read_shapes(str(folder)).config.hidden_size == model.config.hidden_size
    generate.main(["--model", str(folder), "--prompt", "hello", "--max-new-tokens", "2"])
    models.save_pretrained(tmp_path / "saved", model, params, tokenizer=folder)
    assert models.load_tokenizer(tmp_path / "saved").encode("ab") == tokenizer().encode("ab")
