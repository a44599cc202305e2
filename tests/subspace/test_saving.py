"""Subspaces in folders: few kilobytes, bit for bit, and no other seed, base or selection."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import subspace
from lora_jax.rules import AnyOf
from tests.subspace.test_subspace import moving, small
from tests.support import assert_identical


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, space, theta, params)."""
    params = small()
    del params["embed"]
    space = subspace.make(params, dimension=23, kind="said", seed=7, exclude=["bias"])
    theta, folder = moving(space), tmp_path_factory.mktemp("saved") / "subspace"
    subspace.save(folder, space, theta, params, about={"model": "owner/name"})
    return folder, space, theta, params


def test_a_folder_gives_back_the_space_and_its_numbers(saved):
    folder, space, theta, params = saved
    again, found = subspace.load(folder, params)
    assert again == space
    assert_identical(found, theta)
    np.testing.assert_array_equal(again.keys(), space.keys())
    assert lj.adapter_info(folder)["model"] == "owner/name"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 32_000


def test_one_with_a_name_without_a_match_is_read(saved, tmp_path):
    """Which earlier versions made."""
    _, _, _, params = saved
    space = subspace.make(params, dimension=23, targets=AnyOf(["head", "nowhere"]))
    subspace.save(tmp_path / "older", space, space.zeros(), params)
    again, _ = subspace.load(tmp_path / "older", params, space=space)
    assert again == space


def test_another_one_is_refused(saved, tmp_path):
    folder, space, theta, params = saved
    other = subspace.make(params, dimension=23, kind="said", seed=8, exclude=["bias"])
    with pytest.raises(lj.AdapterError, match="seed 7 in the folder, 8 here"):
        subspace.load(folder, params, space=other)
    changed = params | {"head": jax.tree.map(lambda x: x + 1, params["head"])}
    with pytest.raises(lj.AdapterError, match="another base"):
        subspace.load(folder, changed)
    assert_identical(subspace.load(folder, changed, allow_base_mismatch=True)[1], theta)
    fewer = {"head": params["head"]}
    with pytest.raises(lj.AdapterError, match="size .* in the folder"):
        subspace.load(folder, fewer)
    with pytest.raises(lj.AdapterError, match="does not fit this tree"):
        subspace.load(folder, {"w": np.ones(3)})
    with pytest.raises(lj.AdapterError, match="exists"):
        subspace.save(folder, space, theta, params)
    lj.save_adapter(tmp_path / "lora", lj.lorafy(params, [lj.TrainRule(targets=["head"])]))
    with pytest.raises(lj.AdapterError, match="not a subspace"):
        subspace.load(tmp_path / "lora", params)


def test_other_draws_of_the_same_seed_are_refused(saved, monkeypatch):
    folder, _, _, params = saved
    with jax.threefry_partitionable(False):
        with pytest.raises(lj.AdapterError, match="other random numbers"):
            subspace.load(folder, params)


@pytest.mark.slow
def test_a_tree_of_it_splits_joins_and_runs(saved):
    _, space, theta, params = saved
    tree = subspace.tree_of(space, params, theta)
    adapter, base = lj.split(tree)
    assert {path: parts["value"].shape for path, parts in adapter.items()} == {
        "subspace/theta": (19,),
        "subspace/scale": (4,),
    }
    assert lj.count_params(tree)[0] == 23
    forward = jax.jit(lj.adapt(lambda tree, x: x @ subspace.merge(space, tree)["head"]["kernel"]))
    expected = jax.jit(lambda theta: space.params_of(theta, params)["head"]["kernel"])(theta)
    x = np.ones((2, 5), np.float32)
    out = np.asarray(forward(lj.join(adapter, base), x))
    assert np.abs(out - x @ np.asarray(expected)).max() < 1e-6
    assert json.dumps(subspace.facts_of(space))
