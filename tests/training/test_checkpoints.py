"""Checkpoints come back bitwise, and a damaged one is found and named."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.futures.future import AwaitableSignalsContract

import lora_jax as lj
from lora_jax.training.errors import DamagedCheckpoint
from lora_jax.training.run.bucket_files import checkpoint_writer
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.step import State
from tests.support import array, over

# Orbax leaves coroutines behind where a file cannot be read; they are noticed when collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    gc.collect()


def state_at(step):
    rng = np.random.default_rng(step)
    adapter = {
        "layers/q/kernel": {"a": array(rng.standard_normal((64, 80)), jnp.float32)},
        "norm/scale": {"value": array(rng.standard_normal(7), jnp.bfloat16)},
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {"cursor": {"row": step}})
    checkpoints.close()
    return folder


@pytest.fixture
def saved(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
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


def remove(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_every_file_counts(saved, damage, tmp_path):
    folder = saved.folder / "3"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files if damage is flip else files[::4]:
        content = path.read_bytes()
        damage(path)
        with pytest.raises(DamagedCheckpoint) as caught:
            saved.restore(state_at(0))
        message = str(caught.value)
        assert f"the checkpoint {folder} is damaged" in message and "\n" not in message
        assert str(path.relative_to(folder)) in message
        assert "of step 2 is whole. To continue from there, delete the folder" in message
        path.write_bytes(content)
    assert_same(saved.restore(state_at(0))[0], state_at(3))


class Killed(BaseException):
    """The end of a process, at a place that a test chooses."""


def save_and_die(folder, step, place, keep):
    """Saves a state that is later lost, in a process that ends before the `place` is done."""

    def die(*_):
        raise Killed

    checkpoints = Checkpoints(folder, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"lora_jax.training.run.disk_files.{place}", die)
        with pytest.raises(Killed):
            checkpoints.save(state_at(step)._replace(key=jax.random.key(99)), {})
    checkpoints.close()
    assert (folder / str(step)).is_dir(), "what Orbax wrote is there"


@over(
    ("before", "place", "keep"),
    [
        (*kill, keep)
        for kill in ((0, "DiskFiles.digests"), (3, "DiskFiles.digests"), (3, "write_text"))
        for keep in (1, 2)
    ],
    often=["(0, 'DiskFiles.digests', 1)", "(3, 'write_text', 2)"],
    called=str,
)
def test_one_whose_files_are_not_recorded_does_not_count(tmp_path, before, keep, place):
    """A kill between Orbax's rename and the record: the one before is there, and saving goes on."""
    folder = tmp_path / "checkpoints"
    first = Checkpoints(folder, keep)
    for step in range(1, before + 1):
        first.save(state_at(step), {"cursor": step})
    first.close()
    save_and_die(folder, before + 1, place, keep)
    for _ in range(2):  # and once more after another kill at that very step
        resumed = Checkpoints(folder, keep)
        assert resumed.steps() == [1, 2, 3][:before][-keep:]
        if before:
            state, run = resumed.restore(state_at(0))
            assert_same(state, state_at(before))
            assert run == {"cursor": before}
        resumed.close()
        save_and_die(folder, before + 1, "DiskFiles.digests", keep)
    again = Checkpoints(folder, keep)
    again.save(state_at(before + 1), {"cursor": before + 1})
    assert again.steps() == [1, 2, 3, 4][: before + 1][-keep:]
    assert_same(again.restore(state_at(0))[0], state_at(before + 1))
    assert sorted(path.name for path in folder.iterdir()) == [str(step) for step in again.steps()]


def test_an_incomplete_one_of_a_later_step_goes_as_well(saved):
    saved.close()
    save_and_die(saved.folder, 7, "DiskFiles.digests", 2)
    saved.save(state_at(5), {})
    assert saved.steps() == [3, 5] and not (saved.folder / "7").exists()
    assert_same(saved.restore(state_at(0))[0], state_at(5))


def test_a_kill_before_the_oldest_goes_leaves_the_newest(saved, monkeypatch):
    real = Checkpoints._remove_all_but

    def die(self, kept):
        if 4 in kept:
            raise Killed
        real(self, kept)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_remove_all_but", die)
        with pytest.raises(Killed):
            saved.save(state_at(4), {})
    saved.close()
    assert (saved.folder / "2").is_dir() and saved.steps() == [3, 4]
    saved.save(state_at(5), {})
    assert saved.steps() == [4, 5]
    assert sorted(path.name for path in saved.folder.iterdir()) == ["4", "5"]


@over("damage", [truncate, remove], often=["truncate"], called=lambda f: f.__name__)
def test_without_the_record_nothing_is_taken_or_removed(saved, damage):
    damage(saved.folder.with_name("checkpoints.json"))
    for use in (lambda: saved.restore(state_at(0)), lambda: saved.save(state_at(4), {})):
        with pytest.raises(
            DamagedCheckpoint, match="json is missing or cannot be read.*Put the file ba"
        ):
            use()
    assert sorted(path.name for path in saved.folder.iterdir()) == ["2", "3"]


def test_where_all_are_damaged_only_a_new_run_helps(saved):
    for step in ("2", "3"):
        truncate(largest_file(saved.folder / step))
    with pytest.raises(DamagedCheckpoint, match="No earlier checkpoint is whole. Start again with"):
        saved.restore(state_at(0))


def test_bytes_that_decode_but_differ_are_found(saved, monkeypatch):
    shutil.rmtree(saved.folder / "3" / "state")
    shutil.copytree(saved.folder / "2" / "state", saved.folder / "3" / "state")
    with pytest.raises(DamagedCheckpoint, match="its file state/.* (has changed|is missing)"):
        saved.restore(state_at(0))
    # The control: without the digests, the other's arrays are taken for this one's.
    monkeypatch.setattr(Checkpoints, "_recorded", lambda _: {"2": {}, "3": {}})
    assert_same(saved.restore(state_at(0))[0], state_at(2))


def save_an_adapter(folder):
    params = {"dense": {"kernel": array(np.ones((4, 3)))}}
    lj.save_adapter(folder, lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)]))


def save_a_checkpoint(folder, writer=checkpoint_writer):
    items = ocp.args.Composite(
        state=ocp.args.StandardSave({"a": np.ones(3)}), run=ocp.args.JsonSave({"cursor": 1})
    )
    with writer() as opened:
        opened.save(folder, items)


def test_a_save_waits_for_no_signal_that_another_thread_could_take(tmp_path, monkeypatch):
    """An adapter is saved beside the thread that writes a checkpoint to a bucket.

    Orbax names signals by the number of the process's newest save, whichever thread began it.
    """
    waits = []
    add = AwaitableSignalsContract.add_to_awaitable_signals_contract

    def add_and_count(signals):
        waits.extend(signals)
        add(signals)

    monkeypatch.setattr(
        AwaitableSignalsContract, "add_to_awaitable_signals_contract", add_and_count
    )
    save_a_checkpoint(tmp_path / "checkpoint")
    save_an_adapter(tmp_path / "adapter")
    assert not waits
    # The control: Orbax's own way.
    save_a_checkpoint(
        tmp_path / "control", lambda: ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    )
    assert waits
