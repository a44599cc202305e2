"""Classifiers trained in a random subspace, --intrinsic: what a run leaves, and who reads it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models, subspace
from tests.support import array, assert_identical, thorough
from tests.train.test_classify import base_of, fails, inputs, run, without_rank
from tests.train.tiny import tokenizer
from train.classify import check, parse
from train.console.errors import UserError
from train.export import __main__ as export
from train.predict.__main__ import main as predict

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
__all__ = ["inputs"]  # a fixture


def options_of(inputs):
    return [*without_rank(inputs), "--intrinsic", "150", "--schedule", "constant"]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    options = ["--steps", 8, "--lr", 0.01, "--eval-every", 4, "--seed", 3]
    return run(options_of(inputs), tmp_path_factory.mktemp("whole"), *options)


@pytest.mark.slow
def test_a_run_leaves_a_small_subspace_that_classifies(inputs, whole, tmp_path):
    model, params = base_of(inputs)
    space, theta = subspace.load(whole / "adapter", params)
    assert (space.dimension, space.kind, space.seed) == (150, "said", 3)
    assert theta["theta"].size + theta["scale"].size == 150
    assert len(space.layers) == 2 + 3  # blocks; embeddings, pooler, head
    assert float(jnp.abs(theta["theta"]).max()) > 0 and space.size == lj.count_params(params)[1]
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").open() if "lr" in line]
    assert np.isfinite(losses).all()

    ids = array([tokenizer(None)("abcz")["input_ids"]])
    by_hand = jax.nn.softmax(model.apply({"params": space.params_of(theta, params)}, ids)[0])
    out = tmp_path / "out.jsonl"
    predict(["--adapter", str(whole), "--out", str(out), "abcz"])
    found = json.loads(out.read_text())["probabilities"]
    np.testing.assert_allclose([found[n] for n in ("low", "middle", "top")], by_hand, atol=1e-5)


@pytest.mark.slow
def test_it_is_exported_merged_alone(inputs, whole, tmp_path, capsys):
    args = ["--adapter", str(whole), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        export.main(args)
    assert "is a subspace (--intrinsic)" in capsys.readouterr().err
    export.main([*args, "--merged"])
    _, params = base_of(inputs)
    space, theta = subspace.load(whole / "adapter", params)
    moved, (_, read) = space.params_of(theta, params), models.from_pretrained(tmp_path / "out")
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    said = fails(capsys, *inputs[:12], "--init-adapter", whole, "--output", tmp_path / "next")
    assert "is a subspace (--intrinsic), not an adapter" in said


@pytest.mark.slow
@thorough  # as test_sft.py does
def test_a_resumed_run_ends_where_a_whole_one_does(inputs, whole, tmp_path, capsys):
    options = ["--lr", 0.01, "--eval-every", 4, "--seed", 3]
    run(options_of(inputs), tmp_path / "half", "--steps", 4, *options)
    again = [*options_of(inputs), "--output", tmp_path / "half", "--steps", 8, "--resume"]
    capsys.readouterr()
    said = fails(capsys, *again, *options, "--seed", 4)
    assert "--seed was 3 and is now 4" in said
    run(options_of(inputs), tmp_path / "half", "--steps", 8, *options, "--resume")
    params = base_of(inputs)[1]
    one, other = (subspace.load(f / "adapter", params)[1] for f in (whole, tmp_path / "half"))
    assert_identical(one, other)


@pytest.mark.slow
def test_a_dry_run_compiles_its_step(inputs, tmp_path, capsys):
    run(options_of(inputs), tmp_path / "dry", "--steps", 4, "--dry-run")
    assert "memory per device" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--intrinsic 9 --full", "a subspace of all parameters. Remove --full"),
        ("--intrinsic 9 --head-only", "a subspace of all parameters. Remove --head-only"),
        ("--intrinsic 9 --rank 4", "without an adapter. Remove --rank"),
        ("--intrinsic 0", "--intrinsic 0 is out of range. Pass a number of at least 1"),
        ("--intrinsic-kind did", "there is no subspace. Remove --intrinsic-kind"),
    ],
)
def test_options_that_make_no_sense(args, message):
    with pytest.raises(UserError, match=message):
        check(parse(args.split()))


@pytest.mark.parametrize(("d", "rate"), [(10_000, 0.03), (625, 0.24), (160_000, 0.00375)])
def test_the_rate_falls_with_the_dimension(d, rate):
    assert parse(["--intrinsic", str(d)]).optim.lr == pytest.approx(rate)
    assert parse(["--intrinsic", str(d), "--lr", "0.5"]).optim.lr == 0.5


def test_sizes_that_do_not_fit_the_model(inputs, tmp_path, capsys):
    args = [*options_of(inputs), "--output", tmp_path / "out"]
    assert "Choose a dimension larger than 5" in fails(capsys, *args, "--intrinsic", 5)
    assert "is larger than the number of parameters" in fails(capsys, *args, "--intrinsic", 10**7)
