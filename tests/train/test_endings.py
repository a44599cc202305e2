"""Runs that end early: signals, killed processes, and two runs in one folder."""

import re
import signal
import socket
import time

import pytest

from tests.support import thorough
from tests.train.forks import Forked
from tests.train.tiny import write_model, write_rows
from train.run.log import read_metrics

LATEST = 15.0  # seconds after a signal, beside one step and one save
SAVE = 30.0  # more than enough, on a busy machine
SILENT = 20  # seconds without a sign of life: more than Python needs for a turn of a busy machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The options that name the tiny model and 24 rows."""
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    options = ["--batch-size", "4", "--rank", "2", "--steps", "5000", "--save-every", "50"]
    options += ["--targets", "q_proj"]
    return ["--model", str(model), "--dataset", str(rows), *options]


def start(inputs, folder, *args, n=1, script="train.sft"):
    """The script as `n` processes, as a user starts them; each writes to a log of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for i in range(n):
        many = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", n, "--process-id", i]
        words = [*inputs, "--output", folder, *args, *(many if n > 1 else [])]
        log = folder.parent / f"{folder.name}.log{i}"
        started.append(Forked(["-m", script, *words], folder.parent, log=log))
    return started


def log_of(folder, i=0):
    return (folder.parent / f"{folder.name}.log{i}").read_text()


def wait_for(folder, what, processes):
    while not re.search(what, log_of(folder)):
        assert all(process.poll() is None for process in processes), log_of(folder)
        time.sleep(0.02)


def codes(processes, seconds=LATEST):
    """The exit codes of processes that end within so many seconds."""
    try:
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def last_lines(folder, i):
    """Returns what a process said after its last step, without empty lines."""
    said = [line for line in log_of(folder, i).splitlines() if line.strip()]
    return [line for line in said if not re.match(r"step \d+/|trainable|reading|compil", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "number"), [pytest.param(0, signal.SIGINT, marks=thorough), (1, signal.SIGTERM)]
)
def test_a_signal_to_one_of_two_saves_and_ends_both(inputs, tmp_path, which, number):
    folder = tmp_path / "run"
    processes = start(inputs, folder, n=2)
    wait_for(folder, "step 9/", processes)
    processes[which].send_signal(number)
    assert codes(processes, LATEST + SAVE) == [128 + number] * 2, log_of(folder) + log_of(folder, 1)
    done = read_metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / str(done)).is_dir() and not (folder / "run.lock").exists()
    for i in range(2):
        assert last_lines(folder, i)[-1].startswith(f"stopped after step {done}. Go on with: ")
        assert not re.search("Traceback|Fatal|Error", log_of(folder, i))


REWARD = """
import pathlib, time

def slow(completions, **others):
    pathlib.Path(__file__).with_name("asked").touch()
    time.sleep(300)
    return [0.0] * len(completions)
"""


@pytest.mark.slow
def test_a_signal_to_the_second_of_two_ends_the_first_ones_wait_for_rewards(inputs, tmp_path):
    folder, asked = tmp_path / "run", tmp_path / "asked"
    (tmp_path / "reward.py").write_text(REWARD)
    args = ["--reward", tmp_path / "reward.py:slow", "--reward-timeout", 600, "--group", 2]
    args += ["--max-new-tokens", 4, "--eval-questions", 0, "--report-to", "none"]
    processes = start(inputs, folder, *args, n=2, script="train.grpo")
    while not asked.exists():
        assert all(process.poll() is None for process in processes), log_of(folder)
        time.sleep(0.02)
    processes[1].terminate()
    assert codes(processes, LATEST + SAVE) == [143] * 2, log_of(folder) + log_of(folder, 1)
    for i in range(2):
        assert not re.search("Traceback|Fatal|Error", log_of(folder, i))


@pytest.mark.slow
def test_a_signal_while_two_compile_ends_both_and_the_same_command_begins(inputs, tmp_path):
    folder = tmp_path / "run"
    processes = start(inputs, folder, n=2)
    wait_for(folder, "compiling the step …", processes)
    processes[1].terminate()
    assert codes(processes) == [143] * 2, log_of(folder) + log_of(folder, 1)
    assert "Traceback" not in log_of(folder) + log_of(folder, 1)
    late = "stopped after step 1." in last_lines(folder, 1)[-1]  # on a busy machine
    assert late or "run the same command again" in last_lines(folder, 1)[-1]
    assert late or "process 1 of 2 got SIGTERM" in last_lines(folder, 0)[-1]
    again = start(inputs, folder, *(["--resume"] if late else []))
    wait_for(folder, "step 2/", again)
    again[0].terminate()
    assert codes(again, LATEST + SAVE) == [143]


@pytest.mark.slow
@thorough
def test_where_one_of_two_is_killed_the_other_says_so(inputs, tmp_path):
    """Kills process 1; test_mesh.py kills process 0."""
    folder = tmp_path / "run"
    processes = start(inputs, folder, n=2)
    wait_for(folder, "step 9/", processes)
    processes[1].kill()
    assert codes(processes)[0] == 1, log_of(folder)
    said = last_lines(folder, 0)
    (ours,) = [line for line in said if "process 1 of 2 ended without a message" in line]
    assert "--resume" in ours and ours == said[-1]
    assert not re.search("Traceback|Fatal|Error", log_of(folder))


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, pytest.param(0, marks=thorough)])
def test_where_one_of_two_is_frozen_the_other_says_since_when(inputs, tmp_path, which):
    """And that one ends, too, once it goes on."""
    folder, other = tmp_path / "run", 1 - which
    processes = start(inputs, folder, "--heartbeat-timeout", SILENT, n=2)
    wait_for(folder, "step 9/", processes)
    processes[which].send_signal(signal.SIGSTOP)
    try:
        assert codes([processes[other]], LATEST + SILENT) == [1], log_of(folder, other)
    finally:
        processes[which].send_signal(signal.SIGCONT)
    said = last_lines(folder, other)[-1]
    assert said.startswith(f"process {which} of 2 has not answered since "), said
    assert f"If process {processes[which].pid} of " in said and "--resume" in said
    assert not re.search("Traceback|Fatal|Error|Check failure", log_of(folder, other))
    assert codes(processes)[which], log_of(folder, which)
