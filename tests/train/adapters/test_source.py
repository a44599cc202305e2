"""Adapters in a run's folder, in ours and in PEFT's act alike; other folders are refused."""

import json
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.models import tiny_qwen_vl
from tests.support import assert_identical, with_random_factors
from tests.train.scripts import begun
from tests.train.tiny import write_model, write_rows
from train import sft
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.generate import __main__ as generate
from train.run import pretrained

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the tiny model."""
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Folders of one adapter: of a run, ours, PEFT's, and PEFT's in a folder like a run's."""
    folder = tmp_path_factory.mktemp("adapters")
    model, params = models.from_pretrained(base)
    rules = [lj.LoraRule(targets=["q_proj", "down_proj"], rank=3, alpha=7)]
    tree = with_random_factors(lj.lorafy(params, rules))
    lj.save_adapter(folder / "run" / "adapter", tree, about={"model": str(base)})
    lp.save(folder / "peft", model, tree, base_model=str(base), task_type="CAUSAL_LM")
    shutil.copytree(folder / "peft", folder / "like" / "adapter")
    return {
        "a run": folder / "run",
        "ours": folder / "run" / "adapter",
        "PEFT's": folder / "peft",
        "PEFT's in another": folder / "like",
    }


@pytest.fixture
def copied(adapters, tmp_path):
    """A copy of PEFT's folder, to be damaged."""
    return shutil.copytree(adapters["PEFT's"], tmp_path / "copied")


def answer(capsys, *args):
    generate.main([str(arg) for arg in ["--max-new-tokens", 8, "--prompt", "3 plus 4?", *args]])
    return capsys.readouterr().out


def fails(capsys, script, *args):
    """Returns the one paragraph that a script says before it ends with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        script.main([str(arg) for arg in args])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and said.startswith("error: ") and "\n" not in said, said
    return said.removeprefix("error: ")


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.slow
def test_every_folder_of_an_adapter_answers_the_same(base, adapters, capsys):
    said = {name: answer(capsys, "--adapter", folder) for name, folder in adapters.items()}
    assert len(set(said.values())) == 1 and said["ours"] != answer(capsys, "--model", base)


@pytest.mark.slow
def test_a_bias_on_b_is_not_merged_and_answers(base, tmp_path, capsys):
    """q_proj has no bias that could take it."""
    model, params = models.from_pretrained(base)
    rule = lj.LoraRule(targets=["q_proj"], rank=3, alpha=700, bias_on_b=True)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    lp.save(tmp_path / "peft", model, tree, base_model=str(base))
    said = answer(capsys, "--adapter", tmp_path / "peft")
    prompt = models.load_tokenizer(base).apply_chat_template(
        [{"role": "user", "content": "3 plus 4?"}], add_generation_prompt=True, return_dict=False
    )
    forward = jax.jit(lj.adapt(model.apply))

    def greedy(tree):
        """The likeliest tokens, without a cache; what stands behind them changes nothing."""
        ids = np.zeros((1, len(prompt) + 8), np.int32)
        ids[0, : len(prompt)] = prompt
        for at in range(len(prompt), ids.size):
            ids[0, at] = np.asarray(forward({"params": tree}, ids))[0, at - 1].argmax()
        return models.load_tokenizer(base).decode(ids[0, len(prompt) :], skip_special_tokens=True)

    adapter, plain = lj.split(tree)
    unadapted = lj.join(jax.tree.map(np.zeros_like, adapter), plain)
    assert said.strip() == greedy(tree).strip() != greedy(unadapted).strip()


def test_attention_is_as_asked(adapters, capsys, monkeypatch):
    class Asked(BaseException):
        pass

    read = generate.read_model

    def recorded(*args, **options):
        raise Asked(options["attention"], read(*args, **options)[0].attention)

    args = ["--adapter", adapters["ours"]]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "read_model", recorded)
        for asked, more in (("blockwise", ["--attention", "blockwise"]), ("auto", [])):
            with pytest.raises(Asked) as caught:
                answer(capsys, *args, *more)
            assert caught.value.args == (asked, asked)
    said = fails(capsys, generate, *args, "--attention", "splash", "--prompt", "?")
    assert said.startswith("--attention splash cannot be used here")


@pytest.mark.slow
def test_a_run_goes_on_with_pefts_adapter(base, adapters, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    args = ["--model", base, "--dataset", rows, "--output", tmp_path / "run", "--init-adapter"]
    of_run, of_peft = (begun(sft.main, *args, adapters[name]) for name in ("a run", "PEFT's"))
    assert_identical(of_run, of_peft)
    args += [adapters["PEFT's"], "--steps", 1, "--batch-size", 4, "--lr", 1e-4]
    sft.main([str(arg) for arg in args])
    trained = lj.load_adapter(tmp_path / "run" / "adapter", lj.strip(of_run))
    before, after = (
        tree["model"]["layers"]["mlp"]["down_proj"]["kernel"] for tree in (of_run, trained)
    )
    assert set(after.ranks) == {3} and np.allclose(after.scale, 7 / 3)
    assert 0 < np.abs(after.b - before.b).max() < 2e-4 < np.abs(after.b).max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"peft_type": "IA3"},
            ["peft_type is 'IA3', but lora_jax supports only LORA", "merge_and_unload"],
        ),
        ({"use_bdlora": True}, ["use_bdlora=True is not supported", "merge_and_unload"]),
        ({"target_modules": ["qwery"]}, ["['qwery'] matches none", "another base with --model"]),
        ({"target_modules": ["k_proj"]}, ["does not fit", "missing base_model", "and 9 more"]),
        ({"r": 5}, ["down_proj.lora_A.weight is [3, 40], expected [5, 40]", "Copy the adapter's"]),
        ({"base_model_name_or_path": None}, ["does not state its base model", "with --model"]),
        ({"base_model_name_or_path": "/gone/away"}, ["the base in /gone/away", "with --model"]),
    ],
)
def test_pefts_adapter_that_does_not_fit(copied, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setattr(pretrained, "from_pretrained", None)  # no weights are read
    edit(copied, **change)
    for script, option in ((generate, "--adapter"), (sft, "--init-adapter")):
        if script is sft and "base_model_name_or_path" in change:
            continue
        args = ["--dataset", write_rows(tmp_path / "rows.jsonl"), "--output", tmp_path / "run"]
        said = fails(capsys, script, option, copied, *(args if script is sft else []))
        assert said.startswith(f"{option} {copied}") and all(word in said for word in words), said


def test_pefts_adapter_that_is_damaged(copied, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    whole = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(whole[:-9])
    assert "is damaged or cut short" in fails(capsys, generate, "--adapter", copied)
    (copied / WEIGHTS).rename(copied / "adapter_model.bin")
    said = fails(capsys, generate, "--adapter", copied)
    assert "only safetensors are read" in said and "safe_serialization=True" in said
    (copied / WEIGHTS).write_bytes(whole)
    (copied / CONFIG).write_text("{")
    assert f"{CONFIG} cannot be read" in fails(capsys, generate, "--adapter", copied)
    (copied / CONFIG).unlink()
    assert f"{CONFIG} is missing, which states" in fails(capsys, generate, "--adapter", copied)


@pytest.mark.slow
def test_another_base_is_refused_by_name_or_by_shape(base, copied, adapters, tmp_path, capsys):
    wide = write_model(tmp_path / "wide", intermediate_size=44)
    for name in ("ours", "PEFT's"):
        said = fails(capsys, generate, "--adapter", adapters[name], "--model", wide)
        assert f"trained on ({base}) with --model" in said, said
    edit(copied, base_model_name_or_path="owner/name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "train.adapters.source.name_on_other_machines", str
        )  # as if both were on the hub
        patch.setattr(
            "train.generate.__main__.read_model_info",
            lambda name, tokenizer=None, **_: pretrained.ModelInfo(name, *[None] * 3),
        )
        said = fails(capsys, generate, "--adapter", copied, "--model", "other/name")
        assert "was trained on owner/name, but --model is other/name" in said
    args = ["--adapter", copied, "--model", base]
    assert answer(capsys, *args) == answer(capsys, *args, "--allow-base-mismatch")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "holds no adapter"),
        (lambda folder: folder.rmdir(), "There is no such folder"),
        (
            lambda folder: (folder.rmdir(), folder.write_text("")),
            "is a file, but an adapter is a folder",
        ),
        (
            lambda folder: [(folder / name).mkdir() for name in ("config.yaml", "checkpoints")],
            "has no adapter yet",
        ),
        (
            lambda folder: ((folder / "one").mkdir(), (folder / "one" / CONFIG).touch()),
            "Did you mean {}/one?",
        ),
    ],
)
def test_a_folder_without_an_adapter(make, words, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    assert words.format(folder) in fails(capsys, generate, "--adapter", folder)


@pytest.mark.slow
def test_an_adapter_of_images_where_texts_are_read_and_back(tmp_path):
    whole, params = tiny_qwen_vl.made()
    text = models.Decoder(whole.config.text)
    alone = {"model": params["model"]["language_model"], "lm_head": params["lm_head"]}
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj", "qkv"], rank=2)])
    only_text = [lj.LoraRule(targets=["q_proj"], rank=2)]
    lj.save_adapter(tmp_path / "whole", tree, about={"images": True})
    lj.save_adapter(tmp_path / "text", lj.lorafy(alone, only_text))
    lp.save(tmp_path / "peft", whole, tree)
    lp.save(tmp_path / "peft_whole", whole, lj.lorafy(params, only_text))
    lp.save(tmp_path / "peft_text", text, lj.lorafy(alone, only_text))
    names = ("whole", "text", "peft", "peft_whole", "peft_text")
    source = {name: find_adapter(str(tmp_path / name)) for name in names}
    for name in ("whole", "peft"):
        assert source[name].images
        source[name].load(whole, params, "M")
        with pytest.raises(
            UserError, match="on M with its images, but this command reads only texts"
        ):
            source[name].load(text, alone, "M")
    for name in ("text", "peft_whole", "peft_text"):
        assert not source[name].images
        source[name].load(text, alone, "M")
    of_whole = [name for name in names if source[name].names_whole_model]
    assert of_whole == ["whole", "peft", "peft_whole"]
    with pytest.raises(UserError, match="on the text of M alone, but this command reads images"):
        source["text"].load(whole, params, "M")
