"""The reference of `train.dpo`: which one it is, what is kept of it, and KTO's divergence."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.lorafy import map_nodes
from tests.train.scripts import fails
from tests.train.test_preferences import BATCH, LABELLED, run, write_inputs
from tests.train.tiny import write_jsonl
from train.console.errors import UserError
from train.dpo import main
from train.live.reference import reference_params

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_an_initial_adapter_is_the_reference(folder, tmp_path, capsys):
    """Unless another one is named, of which a resumed run is not asked again."""
    used = folder / "used"
    (first,) = run(folder, tmp_path / "run", "--steps", 1)
    assert f"reference: {used}, the adapter from which the run starts" in said(capsys)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == 0

    (first,) = run(folder, tmp_path / "base", "--steps", 1, "--reference", "base")
    assert "reference: base, without the adapter from which the run starts" in said(capsys)
    assert min(abs(first["chosen"]), abs(first["rejected"])) > 1e-3
    _, second = run(folder, tmp_path / "base", "--steps", 2, "--resume")
    assert "reference: base, without" in said(capsys)
    assert min(abs(second["chosen"]), abs(second["rejected"])) > 1e-3


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_completions_of_a_model_that_trains_whole_have_no_second_base():
    """--reference of train.grpo --full would need one. Its data have no --reference-logps."""
    config = SimpleNamespace(
        data=SimpleNamespace(reference="base"),
        adapter=SimpleNamespace(full=True),
        optim=SimpleNamespace(loss="grpo"),
    )
    outline, plain = SimpleNamespace(name="base"), {}
    with pytest.raises(UserError, match="--full trains the base itself"):
        reference_params(config, outline, plain, takes_from_base=True)


@pytest.mark.slow
def test_the_held_out_loss_of_kto_is_that_of_training(folder, tmp_path):
    """On the same rows, and with the weights that the next step begins with."""
    rows = folder / "labelled.jsonl"
    args = ["--loss", "kto", "--reference", "base", "--dataset", rows, "--eval-dataset", rows]
    args += ["--batch-size", BATCH // 2, "--grad-accum", 2, "--kto-weights", 1.5, 0.5]
    lines = run(folder, tmp_path / "run", *args, "--eval-every", 1, "--steps", 3, "--lr", 1e-4)
    steps, measured = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    for held_out, after in zip(measured[:-1], steps[1:], strict=True):
        for name in ("loss", "kl", "chosen", "rejected"):
            assert held_out[f"eval_{name}"] == pytest.approx(after[name], rel=1e-5), name
        assert held_out["eval_kl"] > 0.05


@pytest.mark.slow
def test_rewards_of_kto_over_a_window_are_means_over_the_rows_of_their_label(folder, tmp_path):
    """A batch of two rows has one row of each label, or two of one label and none of the other."""
    args = ["--loss", "kto", "--dataset", folder / "labelled.jsonl", "--reference", "base"]
    args += ["--batch-size", 2, "--steps", 8, "--seed", 1]
    steps = run(folder, tmp_path / "steps", *args, "--log-every", 1)
    (window,) = run(folder, tmp_path / "window", *args, "--log-every", 8)
    labels = ("chosen", "rejected")
    assert {len({*labels} & line.keys()) for line in steps} == {1, 2}, "the control: some lack one"
    for name in labels:
        rows = [
            (line[name], 1 if {*labels} <= line.keys() else 2) for line in steps if name in line
        ]
        mean = np.average([value for value, _ in rows], weights=[n for _, n in rows])
        assert window[name] == pytest.approx(mean, rel=1e-5), name
    assert not any(name.endswith("_units") for name in window)


def test_one_held_out_row_has_no_divergence(folder, tmp_path, capsys):
    one = write_jsonl(tmp_path / "one.jsonl", LABELLED[:1])
    line = ["--model", folder / "model", "--dataset", folder / "labelled.jsonl", "--loss", "kto"]
    line += ["--output", tmp_path / "run", "--eval-every", 1, "--eval-dataset", one]
    assert "compares held-out rows with each other" in fails(capsys, main, *line)


@pytest.mark.slow
def test_a_kept_reference_is_of_this_model(folder, tmp_path):
    """Its log-probabilities are read anew where config.json has changed, or the adapter's scale."""
    model, used = (shutil.copytree(folder / name, tmp_path / name) for name in ("model", "used"))
    args = ["--token-cache", tmp_path / "cache", "--model", model, "--steps", 1, "--overwrite"]
    args += ["--init-adapter", used, "--reference", used]

    def begun():
        (first,) = run(folder, tmp_path / "run", *args)
        return first["chosen"], first["rejected"]

    assert begun() == (0, 0)
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"rope_theta": 50.0}))
    assert begun() == (0, 0)

    _, params = models.from_pretrained(model)
    tree = lj.load_adapter(used, params)
    twice = map_nodes(lambda _, node: node.replace(scale=2 * node.scale), tree)
    lj.save_adapter(used, twice, overwrite=True)
    assert begun() == (0, 0)
