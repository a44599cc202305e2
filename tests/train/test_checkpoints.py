"""Checkpoints come back bitwise, and a damaged one is found and named."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoints import Checkpoints, DamagedCheckpoint
from train.step import State

# Orbax leaves coroutines behind where a file cannot be read; they are noticed when collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def state_at(step):
    rng = np.random.default_rng(step)
    adapter = {
        "layers/q/kernel": {"a": jnp.asarray(rng.standard_normal((64, 80)), jnp.float32)},
        "norm/scale": {"value": jnp.asarray(rng.standard_normal(7), jnp.bfloat16)},
    }
    optimizer = optax.adamw(1e-3)
    return State(adapter, optimizer.init(adapter), jnp.int32(step), jax.random.key(step))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {"cursor": {"row": step}})
    checkpoints.close()
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_the_newest_comes_back_and_the_oldest_goes(saved):
    assert saved.steps() == [2, 3]
    state, run = saved.restore(state_at(0))
    assert_same(state, state_at(3))
    assert run == {"cursor": {"row": 3}}


def test_nothing_saved_is_no_step(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).steps() == []
    assert not (tmp_path / "none").exists()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()])
def test_a_damaged_one_is_named_with_the_one_before(saved, damage):
    damage(largest_file(saved.folder / "3"))
    with pytest.raises(DamagedCheckpoint) as caught:
        saved.restore(state_at(0))
    message = str(caught.value)
    assert f"the checkpoint {saved.folder / '3'} is damaged" in message
    assert "of step 2, is whole: delete the folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()])
def test_every_file_counts(saved, damage, tmp_path):
    folder = saved.folder / "3"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        damage(path)
        with pytest.raises(DamagedCheckpoint, match="the checkpoint .*3 is damaged") as caught:
            saved.restore(state_at(0))
        assert str(path.relative_to(folder)) in str(caught.value)
        assert "of step 2, is whole" in str(caught.value)
        path.write_bytes(content)
    assert_same(saved.restore(state_at(0))[0], state_at(3))


def test_a_kill_before_the_files_were_counted_loses_nothing(saved):
    saved.folder.with_name("checkpoints.json").unlink()
    assert_same(saved.restore(state_at(0))[0], state_at(3))
    flip(largest_file(saved.folder / "3"))  # the arrays' own checksums are still there
    with pytest.raises(DamagedCheckpoint, match="of step 2, is whole"):
        saved.restore(state_at(0))


def test_where_all_are_damaged_only_a_new_run_helps(saved):
    for step in ("2", "3"):
        truncate(largest_file(saved.folder / step))
    with pytest.raises(DamagedCheckpoint, match="No earlier one is whole: begin again with"):
        saved.restore(state_at(0))


def test_bytes_that_decode_but_differ_are_found(saved, monkeypatch):
    monkeypatch.setattr("train.checkpoints.checksum", lambda array: "another")
    with pytest.raises(DamagedCheckpoint, match="layers/q/kernel.* is not what was saved"):
        saved.restore(state_at(0))
