"""The lock of a run's folder: who holds it, and when it is stale."""

import json
import os
import subprocess
import sys

import pytest

from lora_jax.training.errors import TrainingError
from lora_jax.training.run import lock
from lora_jax.training.run.lock import LOCK, FolderLock, RunLock


def write(folder, **changed):
    """A lock of this process, with some fields changed."""
    with RunLock(FolderLock(folder)):
        content = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(content | changed))
    return folder / LOCK


def test_a_second_run_is_refused_and_the_third_begins(tmp_path):
    with RunLock(FolderLock(tmp_path)):
        holder = json.loads((tmp_path / LOCK).read_text())
        with pytest.raises(TrainingError) as caught:
            with RunLock(FolderLock(tmp_path)):
                pass
        assert f"process {os.getpid()} on {holder['host']}, is writing to" in str(caught.value)
    with RunLock(FolderLock(tmp_path)):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_and_one_that_took_its_number_hold_nothing(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    while not os.path.exists(f"/proc/{dead.pid}") or lock._describe_process(dead.pid):
        pass  # until it is a zombie
    for changed in ({"pid": dead.pid}, {"started": "1"}):
        write(tmp_path, **changed)
        with RunLock(FolderLock(tmp_path)):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    dead.wait()


@pytest.mark.parametrize("other", [{"host": "other"}, {"boot": "before"}, {"container": "other"}])
def test_elsewhere_only_a_lock_that_is_touched_holds(tmp_path, monkeypatch, other):
    """Another host, this one before it was restarted, and another container."""
    path = write(tmp_path, **other)
    os.utime(path, (0, 0))
    with RunLock(FolderLock(tmp_path)):
        pass
    path = write(tmp_path, **other)
    waits = []

    def touched(seconds):
        waits.append(seconds)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))

    monkeypatch.setattr(lock.time, "sleep", touched)
    said = []
    with pytest.raises(TrainingError, match=f"process {os.getpid()} on .* is writing to"):
        with RunLock(FolderLock(tmp_path), said.append):
            pass
    assert (
        len(waits) == 1 and "Waiting up to 60 s to see whether that process still runs" in said[0]
    )


def test_a_lock_that_was_taken_over_is_left_to_its_holder(tmp_path):
    with RunLock(FolderLock(tmp_path)):
        content = json.loads((tmp_path / LOCK).read_text()) | {"pid": 1}
        (tmp_path / LOCK).write_text(json.dumps(content))
    assert json.loads((tmp_path / LOCK).read_text()) == content
