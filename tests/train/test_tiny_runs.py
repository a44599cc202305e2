"""Runs of LoRA-XS, VeRA and TinyLoRA: what they train, keep, publish and load again is tiny."""

import json
import shlex

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.models.tiny import run as plain_logits
from tests.support import assert_close, assert_identical, but_rarely
from tests.train.scripts import begun
from tests.train.tiny import write_model, write_rows
from train.adapters.source import find_adapter
from train.export import __main__ as export
from train.generate import options as generate_options
from train.run.log import read_metrics
from train.sft import main

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
WAYS = {
    "xs": ["--xs", "--rank", "3"],
    "vera": ["--vera", "--rank", "12"],
    "tinylora": ["--tinylora", "--rank", "2", "--u", "5", "--weight-tying", "0.5"],
}
TRAINED = {"xs": {"latent"}, "vera": {"lambda_d", "lambda_b"}, "tinylora": {"v"}}
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def run(folder, output, *args):
    data = ["--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl")]
    options = ["--batch-size", "4", "--warmup", "1", "--targets", "q_proj", "v_proj"]
    main([*data, *options, "--output", str(output), *args])
    return output


def tree_of(folder, output):
    model, params = models.from_pretrained(folder / "model")
    return find_adapter(str(output)).load(model, params, "the base")


def loaded(folder, output):
    tree, (model, _) = tree_of(folder, output), models.from_pretrained(folder / "model")
    return model, tree, jax.jit(lj.adapt(model.apply))({"params": tree}, IDS)


def shown_commands(out):
    """Returns the options of the two commands that a run prints in the end."""
    lines = [line for line in out.splitlines() if line.startswith("to ")]
    modules, options = zip(
        *((words[5], words[6:]) for words in map(shlex.split, lines)), strict=True
    )
    assert modules == ("train.generate", "train.export")
    return options


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_and_what_comes_of_it(folder, tmp_path, way, capsys):
    whole = run(folder, tmp_path / "run", *WAYS[way], "--steps", "2")
    asks, exports = shown_commands(capsys.readouterr().out)
    facts = json.loads((whole / "facts.json").read_text())
    model, tree, logits = loaded(folder, whole)
    adapter, _ = lj.split(tree)
    assert {name for parts in adapter.values() for name in parts} == TRAINED[way]
    nodes = [n for n in jax.tree.leaves(tree, is_leaf=lj.is_node) if lj.is_node(n)]
    trained = {
        "xs": 2 * 2 * 3 * 3,
        "vera": 2 * sum(12 + node.shape[-1] for node in nodes),
        "tinylora": 2 * 2 * 5,  # half of them are copies
    }[way]
    assert sum(x.size for x in jax.tree.leaves(adapter)) == trained
    assert lj.count_params(tree)[0] == (trained // 2 if way == "tinylora" else trained)
    assert facts["resolved"]["lr"] == 2e-3
    assert all(float(node.scale[0]) == 1 for node in nodes)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(adapter=ocp.args.StandardRestore())
        held = checkpointer.restore(whole / "adapter", args)["adapter"]
    assert sum(x.nbytes for x in jax.tree.leaves(held)) == 4 * trained
    base = plain_logits(model, lj.strip(tree), IDS)
    assert np.abs(logits - base).max() > 1e-6

    assert generate_options.parse(asks).adapter == (str(whole / "adapter"),)
    export.main([*exports, "--model", str(folder / "model")])
    published = whole / "exported"
    fields = json.loads((published / "adapter_config.json").read_text())
    assert fields["peft_type"] == {"xs": "LORA", "vera": "VERA", "tinylora": "TINYLORA"}[way]
    _, _, again = loaded(folder, published)
    assert_close(again, logits, 1e-5)
    model, params = models.from_pretrained(folder / "model")
    assert lj.count_params(lp.load(published, model, params))[0] > 0
    args = ["--model", folder / "model", "--dataset", folder / "rows.jsonl"]
    onward = begun(main, *args, "--output", tmp_path / "on", "--init-adapter", whole)
    assert_identical(onward, tree)


@pytest.mark.slow
@pytest.mark.parametrize("way", but_rarely(WAYS, "xs", "vera"))
def test_resumed_bit_by_bit(folder, tmp_path, way):
    more = [*WAYS[way], "--schedule", "constant", "--save-every", "2"]
    whole = run(folder, tmp_path / "whole", *more, "--steps", "12")
    run(folder, tmp_path / "parts", *more, "--steps", "2")
    parts = run(folder, tmp_path / "parts", *more, "--steps", "12", "--resume")
    assert_identical(tree_of(folder, parts), tree_of(folder, whole))
    losses = [line["loss"] for line in read_metrics(whole)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_table_of_runs(folder, tmp_path):
    """Each is what its options make of it alone."""
    rows = [
        {"name": "xs", "xs": True, "rank": 3, "lr": 1e-2},
        {"name": "vera", "vera": True, "rank": 12, "lr": 2e-2},
        {"name": "other", "vera": True, "rank": 12, "lr": 1e-2, "seed": 4},
        {"name": "tinylora", "tinylora": True, "rank": 2, "u": 5, "lr": 1e-2},
        {"name": "lora", "rank": 2},
    ]
    rows = [row | {"steps": 3} for row in rows]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    line = ["--eps", "1e-4"]
    run(folder, tmp_path / "many", "--many", str(tmp_path / "runs.json"), *line)
    ways = {**WAYS, "tinylora": WAYS["tinylora"][:-2]}  # without ties
    for way in ways:
        row = next(row for row in rows if row["name"] == way)
        options = [*ways[way], "--lr", str(row["lr"]), "--steps", "3", *line]
        alone = run(folder, tmp_path / way, *options)
        ours, theirs = (lj.split(tree_of(folder, f))[0] for f in (tmp_path / "many" / way, alone))
        assert_close(ours, theirs, 1e-5)
