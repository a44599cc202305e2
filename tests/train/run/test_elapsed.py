"""The time of a run over all its processes: those that ended, were killed, or worked on a table."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from train.run import costs
from train.run.costs import byte_size, note_seconds, step_time, whole_time

ROOT = Path(__file__).parents[3]


@pytest.fixture
def clock(monkeypatch):
    """Returns the clocks of a machine on which a second passes where a test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(costs, "time", SimpleNamespace(monotonic=lambda: 7.0 + now.seconds))
    return now


def process(clock):
    return SimpleNamespace(began=7.0 + clock.seconds, began_at=1e9 + clock.seconds)


def begin(folder, facts=None):
    folder.mkdir(exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts or {"resolved": {}}))
    return folder


def test_the_time_of_a_run_is_that_of_all_its_processes(clock, tmp_path):
    folder = begin(tmp_path / "run")
    ended = process(clock)
    clock.seconds = 20.0  # before training
    note_seconds(folder, ended)
    clock.seconds = 100.0
    assert whole_time([folder], ended) == "1 min 40 s"
    note_seconds(folder, ended)

    clock.seconds = 1000.0
    killed = process(clock)
    clock.seconds = 1010.0
    note_seconds(folder, killed)
    lines = [{"step": n, "loss": 1.0, "time": 1e9 + 1010.0 + 10 * n} for n in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    clock.seconds = 5000.0
    last = process(clock)
    clock.seconds = 5005.0
    note_seconds(folder, last)
    clock.seconds = 5030.0
    assert whole_time([folder], last) == f"{(100 + 60 + 30) // 60} min 10 s in 3 processes"
    facts = json.loads((folder / "facts.json").read_text())
    assert [*facts["process_seconds"].values()] == [100, 60, 5] and facts["resolved"] == {}


def test_a_process_of_a_table_counts_once(clock, tmp_path):
    folders = [begin(tmp_path / name) for name in ("a", "b")]
    both = process(clock)
    for clock.seconds, folder in ((30.0, folders[0]), (40.0, folders[1])):
        note_seconds(folder, both)
    clock.seconds = 500.0
    alone = process(clock)  # goes on with one of them
    clock.seconds = 510.0
    note_seconds(folders[1], alone)
    assert whole_time(folders, alone) == "50 s in 2 processes"
    assert whole_time(folders[1:], alone) == "50 s in 2 processes"


@pytest.mark.slow
def test_a_run_counts_its_imports_and_nothing_that_a_shell_did_before():
    imports = "import time\nwhile time.process_time() < 0.4: pass\n"
    code = f"{imports}from train import BEGAN\nprint(time.monotonic() - BEGAN)"
    line = f"sleep 0.8 && exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    began = time.monotonic()
    ended = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    after_the_sleep = time.monotonic() - began - 0.8
    assert 0.4 <= float(ended.stdout) <= after_the_sleep


def test_a_run_that_never_began_is_left_alone(clock, tmp_path):
    note_seconds(tmp_path, process(clock))
    assert not any(tmp_path.iterdir())


def test_sizes_and_times_have_a_unit_in_which_they_can_be_read():
    sizes = {0: "0.0 kB", 3_240: "3.2 kB", 999_949: "999.9 kB", 999_950: "1.0 MB"}
    sizes |= {19_640_000: "19.6 MB", 16_060_522_496: "16,060.5 MB"}
    assert {size: byte_size(size) for size in sizes} == sizes
    times = {0.0059: "5.9 ms", 0.9994: "999 ms", 0.9996: "1.00 s", 7.834: "7.83 s"}
    assert {seconds: step_time(seconds) for seconds in times} == times
