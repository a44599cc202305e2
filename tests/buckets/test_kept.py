"""Copies of buckets' folders on this machine: who holds one keeps it, and old ones make room."""

import os
import shutil
import sys
import tempfile
import time

import pytest

from lora_jax.buckets import kept

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no such locks")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with four copies, of which this process holds none."""
    monkeypatch.setattr(kept, "_lock_files_of_copies", {})
    for name in ("held", "unused", "young", "without-lock"):
        (tmp_path / name / "gs/bucket").mkdir(parents=True)
        (tmp_path / name / "gs/bucket/file").write_text(name)
    (tmp_path / ".partial1").mkdir()  # of a process that was killed
    yield tmp_path
    for file in kept._lock_files_of_copies.values():
        os.close(file)


def release(root):
    os.close(kept._lock_files_of_copies.pop(root))


def make_old(*roots, days):
    then = time.time() - days * 24 * 3600
    for root in roots:
        use = root / "in_use"
        os.utime(use if use.exists() else root, (then, then))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_copies_that_nobody_holds_make_room_after_a_month(cache):
    for name in ("held", "unused", "young"):
        assert kept.hold_copy(cache / name)
    release(cache / "unused")
    release(cache / "young")
    make_old(*cache.iterdir(), days=31)
    make_old(cache / "young", days=29)
    kept.delete_unused_copies(cache)
    assert names(cache) == {"held", "young"}
    assert (cache / "held/gs/bucket/file").read_text() == "held"
    release(cache / "held")
    kept.delete_unused_copies(cache)
    assert names(cache) == {"young"}


def test_a_copy_that_is_asked_for_is_young_again(cache):
    make_old(cache / "unused", days=31)
    assert kept.hold_copy(cache / "unused")
    release(cache / "unused")
    kept.delete_unused_copies(cache)
    assert "unused" in names(cache)


def test_a_copy_that_is_gone_is_not_held(cache):
    root = cache / "unused"
    assert kept.hold_copy(root)
    root.rename(cache / "elsewhere")
    assert not kept.hold_copy(root) and not kept._lock_files_of_copies
    root.mkdir()
    assert kept.hold_copy(root)
    make_old(root, days=31)
    kept.delete_unused_copies(cache)
    assert root.is_dir(), "the new one is held, too"


def test_files_are_open_of_the_last_copies_alone(cache, monkeypatch):
    monkeypatch.setattr(kept, "_MAX_HELD_COPIES", 2)
    for name in ("held", "unused", "held", "young"):
        assert kept.hold_copy(cache / name)
    assert [root.name for root in kept._lock_files_of_copies] == ["held", "young"]


def test_a_copy_that_goes_while_one_waits_for_it_is_not_held(cache, monkeypatch):
    """Another process has its lock, and deletes it: what is made in its place is locked anew."""
    root = cache / "unused"
    monkeypatch.setattr(kept.fcntl, "flock", lambda *_: shutil.rmtree(root))
    assert not kept.hold_copy(root) and not kept._lock_files_of_copies


def test_working_copies_of_processes_that_are_gone_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kept, "_lock_files_of_working_copies", {})
    (tmp_path / "copy_of_another_release").mkdir()
    gone, alive = (kept.make_working_folder("copy_") for _ in range(2))
    os.close(kept._lock_files_of_working_copies.pop(gone))  # as the end of its process does
    last = kept.make_working_folder("copy_")
    assert names(tmp_path) == {"copy_of_another_release", alive.name, last.name}
    for root in (alive, last):
        kept.drop_working_folder(root)
    assert names(tmp_path) == {"copy_of_another_release"} and not kept._lock_files_of_working_copies


def test_a_working_copy_that_goes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kept, "_lock_files_of_working_copies", {})
    lock, made = kept.fcntl.flock, []

    def slowly(file, how):
        if not made:
            made.extend(tmp_path.iterdir())
            shutil.rmtree(made[0])
        lock(file, how)

    monkeypatch.setattr(kept.fcntl, "flock", slowly)
    root = kept.make_working_folder("copy_")
    assert root.is_dir() and [root] != made
    kept.drop_working_folder(root)
