"""Model cards: front matter, the facts of the run, code that runs, and cards that are kept."""

import html
import json
import re

import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import lora_jax as lj
from lora_jax import models
from tests.models.tiny import run as plain_logits
from tests.support import assert_close, with_random_factors
from tests.train.test_classify import write_encoder
from tests.train.tiny import write_model
from train.adapters.source import find_adapter
from train.export.__main__ import main
from train.export.card import find_run_folder

IDS = np.array([[1, 5, 77, 200, 3]])
LABELS = ("no", "a|b", "<img src=x> [y](javascript:z) `*c*` &lt; _d_")  # as in untrusted data
LOSSES = [{"step": n, "loss": 3.0 / n} for n in (1, 2, 7)] + [{"step": 7, "eval_loss": 0.625}]
OPTIONS = {"dataset": "owner/data", "rank": 2, "seed": 3, "dropout": 0.0, "batch_size": 4}
OPTIONS |= {"output": "/secret/out", "model": "/secret/model", "init": "kaiming", "train": []}


@pytest.fixture
def run(tmp_path):
    """Writes what a run leaves, and returns its folder and its base's."""

    def made(base, head, rules, **options):
        _, params = models.from_pretrained(base, **head)
        tree = with_random_factors(lj.lorafy(params, rules))
        folder = tmp_path / "run"
        about = {"model": str(base)} | ({"labels": LABELS} if head else {})
        lj.save_adapter(folder / "adapter", tree, about=about)
        resolved = {"steps": 7, "examples": 24, "lr": 0.01}
        facts = {"resolved": resolved, "versions": {"jax": "0.1"}, "summary": "trainable: 5"}
        (folder / "facts.json").write_text(json.dumps(facts))
        (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS | options))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(m)}\n" for m in LOSSES))
        scores = {"fine-tuned": {"accuracy": 0.875, "confusion": [[1]]}, "answers": [{"x": 1}]}
        (folder / "scores.json").write_text(json.dumps(scores))
        return folder

    return made


def export(*args):
    main([str(arg) for arg in args])


def read(folder):
    text = (folder / "README.md").read_text()
    return ModelCard(text).data, text


def code(text, which, **names):
    """Runs a block of the card's code, with folders in the place of names."""
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[which]
    for name, folder in names.items():
        assert name.replace("_", "/") in block
        block = block.replace(name.replace("_", "/"), str(folder))
    made = {}
    exec(block, made)
    return made


@pytest.mark.slow
def test_the_card_of_an_adapter(run, tmp_path):
    base = write_model(tmp_path / "base")
    folder = run(base, {}, [lj.LoraRule(targets=["q_proj"], rank=2, alpha=5)])
    export("--adapter", folder, "--output", tmp_path / "out", "--base-name", "owner/base")
    data, text = read(tmp_path / "out")
    assert data.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "datasets": ["owner/data"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_jax", "jax"],
    }
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert (rows["r"], rows["lora_alpha"], rows["target_modules"]) == ("2", "5", "q_proj")
    assert (rows["steps"], rows["lr"], rows["seed"], rows["batch_size"]) == ("7", "0.01", "3", "4")
    assert not {"dropout", "lora_dropout", "use_dora", "train", "modules_to_save"} & set(rows)
    assert rows["training, step 1"] == "3.0000" and rows["training, step 7"] == "0.4286"
    assert rows["held-out rows, step 7"] == "0.6250" and rows["fine-tuned, accuracy"] == "0.8750"
    assert "Data: owner/data, 24 examples." in text and "Trained with jax 0.1." in text
    assert "/secret" not in text and str(tmp_path) not in text
    loaded = code(text, 1, owner_base=base, path_to_out=tmp_path / "out")
    model, params = models.from_pretrained(base)
    tree = lj.load_adapter(folder / "adapter", params)
    want = plain_logits(model, lj.merge(tree), IDS)
    got = jax.jit(loaded["forward"])({"params": loaded["params"]}, IDS)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("name", ["run", "best"])
def test_a_run_may_be_named_as_the_folder_of_its_best_adapters(name, tmp_path):
    """Its facts are found beside the adapter, and beside the best one of a run on its way."""
    folder = tmp_path / name
    (folder / "best/105/lora").mkdir(parents=True)
    (folder / "config.yaml").write_text("{rank: 3}")
    for given in (folder, folder / "best/105"):
        source = find_adapter(str(given))
        assert (source.folder, find_run_folder(source)) == (folder / "best/105", folder)
    (folder / "adapter/lora").mkdir(parents=True)
    source = find_adapter(str(folder))
    assert (source.folder, find_run_folder(source)) == (folder / "adapter", folder)
    (tmp_path / "elsewhere/lora").mkdir(parents=True)
    assert find_run_folder(find_adapter(str(tmp_path / "elsewhere"))) is None


@pytest.mark.slow
def test_the_card_of_a_merged_classifier(run, tmp_path):
    head = {"head": "classification", "num_labels": 3}
    base = write_encoder(tmp_path / "base")
    rules = [lj.TrainRule(targets=["classifier"]), lj.LoraRule(targets=["query"], rank=2)]
    folder = run(base, head, rules, dataset=str(tmp_path / "<b>*rows*.jsonl"))
    export("--adapter", folder, "--output", tmp_path / "out", "--merged")
    data, text = read(tmp_path / "out")
    assert data.pipeline_tag == "text-classification" and data.library_name == "transformers"
    assert data.base_model is None and data.datasets is None
    shown = MarkdownIt("commonmark").enable("table").render(text.partition("---\n\n")[2])
    assert "<p>Its classes: " + ", ".join(map(html.escape, LABELS)) + ".</p>" in shown
    assert "<p>Data: &lt;b&gt;*rows*.jsonl, 24 examples.</p>" in shown
    assert not set(re.findall("<(img|a|b|em|code)\\b", shown)) - {"code"}
    assert str(tmp_path) not in text
    loaded = code(text, 1, path_to_out=tmp_path / "out")
    assert loaded["model"].config.label_names == LABELS


def test_a_card_that_somebody_wrote_stays(run, tmp_path, capsys):
    folder = run(write_model(tmp_path / "base"), {}, [lj.LoraRule(targets=["q_proj"], rank=2)])
    args = ["--adapter", folder, "--output", tmp_path / "out", "--overwrite", "--base-name"]
    export(*args, "owner/one")
    export(*args, "owner/two")
    assert "owner/two" in read(tmp_path / "out")[1]
    (tmp_path / "out" / "README.md").write_text("Mine.")
    export(*args, "owner/three")
    assert (tmp_path / "out" / "README.md").read_text() == "Mine."
    assert "README.md stays as it is" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("merged", [False, True])
def test_the_code_of_the_card_runs_on_torch(merged, run, tmp_path):
    import torch

    base = write_model(tmp_path / "base")
    folder = run(base, {}, [lj.LoraRule(targets=["q_proj"], rank=2, alpha=9)])
    how = ["--merged"] if merged else ["--base-name", "owner/base"]
    export("--adapter", folder, "--output", tmp_path / "out", *how)
    names = {} if merged else {"owner_base": base}
    loaded = code(read(tmp_path / "out")[1], 0, path_to_out=tmp_path / "out", **names)
    with torch.no_grad():
        got = loaded["model"].eval()(input_ids=torch.from_numpy(IDS)).logits.numpy()
    model, params = models.from_pretrained(base)
    tree = lj.load_adapter(folder / "adapter", params)
    assert_close(got, jax.jit(lj.adapt(model.apply))({"params": tree}, IDS), 1e-4)
