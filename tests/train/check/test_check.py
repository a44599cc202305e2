"""The command that checks a device: rows, children that hang or crash, the table, and the file."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.train.check import spoiled
from train.check import __main__ as check
from train.check import rows as check_rows
from train.check import steps
from train.check.group import TimeLimits, run_group
from train.check.options import CheckOptions
from train.check.shapes import choose_shapes
from train.check.steps import StepCheck, judge_memory, judge_time
from train.check.table import FAILS, HOLDS, NOT_APPLICABLE, NOT_REACHED, RowResult, format_table

ROOT = Path(__file__).parents[3]
SPOILED = spoiled.__name__
LAUNCH = {
    "coordinator": None,
    "distributed": False,
    "num_processes": None,
    "process_id": None,
    "heartbeat_timeout": 100,
}


def run_spoiled(group: str, seconds: float = 60.0, row_seconds: float = 3.0) -> list[RowResult]:
    """Returns the rows of a group of `spoiled`."""
    rows: list[RowResult] = []
    clock = TimeLimits(time.monotonic() + seconds, row_seconds)
    assert run_group(group, {"launch": LAUNCH}, clock, rows.append, SPOILED) in (0, None)
    return rows


@pytest.mark.slow
def test_a_hang_or_a_crash_ends_its_child_alone() -> None:
    rows = {row.name: row for row in run_spoiled("attention", row_seconds=10)}
    assert [row.state for row in rows.values()] == [HOLDS, *[FAILS] * 5, HOLDS]
    assert list(rows) == [row.name for row in spoiled.rows(None)]
    texts = [row.text for row in rows.values()][1:-1]
    assert texts[0] == "it hangs: no answer in 10 s"
    assert texts[2].startswith("the process ends by signal SIGABRT: ")
    assert texts[3].startswith("the process ends by exit code 3: ")
    assert texts[4] == "RuntimeError: the compiler refuses"


def test_a_device_that_computes_differently_is_named() -> None:
    (row,) = run_spoiled("scaled", row_seconds=50)
    assert row.state == FAILS and row.text.endswith("on device 1 of 2"), row
    first, second = row.figures["errors"]
    assert first < row.figures["bound"] < second


def test_what_the_time_does_not_reach_is_listed() -> None:
    rows = run_spoiled("hanging", seconds=8, row_seconds=50)
    assert [row[:2] for row in rows] == [("hanging: 1", NOT_REACHED), ("hanging: 2", NOT_REACHED)]
    assert rows[0].text == "it was running when the time was up"
    assert [row[:2] for row in run_spoiled("attention", seconds=0)] == [("attention", NOT_REACHED)]


def test_a_child_that_dies_at_its_start() -> None:
    (row,) = run_spoiled("dead")
    assert row[:2] == ("dead", FAILS) and "SIGABRT" in row.text


def test_memory_beside_the_plan() -> None:
    """A device that reports none, and one that reports the memory of another program."""
    gib = 2**30
    states = {
        (None, gib): NOT_APPLICABLE,
        (gib, None): NOT_APPLICABLE,
        (int(1.08 * gib), gib): HOLDS,
        (int(0.9 * gib), gib): HOLDS,
        (int(1.3 * gib), gib): FAILS,
        (0, gib): FAILS,
        (40 * gib, gib): FAILS,
    }
    for (peak, planned), state in states.items():
        assert judge_memory("memory", peak, planned).state == state, (peak, planned)
    assert "+30% of the plan's 1.00 GiB" in judge_memory("memory", int(1.3 * gib), gib).text


def test_time_beside_the_estimate() -> None:
    assert judge_time("time", 1.0, None).state == NOT_APPLICABLE
    assert judge_time("time", 1.9, 1.0).state == HOLDS
    assert judge_time("time", 2.1, 1.0).state == FAILS


@pytest.mark.parametrize(
    ("losses", "compilations", "state"),
    [
        ([9.0, 8.0], 0, HOLDS),
        ([9.0, 9.0], 0, FAILS),
        ([9.0, float("nan")], 0, FAILS),
        ([9.0, 8.0], 1, FAILS),
    ],
)
def test_steps(losses: Any, compilations: int, state: str, monkeypatch: Any) -> None:
    measured = steps.Measured(losses=losses, seconds=1.0, compilations=compilations, mfu=0.5)
    monkeypatch.setattr(StepCheck, "run_steps", lambda self: measured)
    checks = StepCheck("config.json", 2048, None)
    assert checks.check_steps().state == state


def test_rows_after_steps_that_failed_are_not_reached() -> None:
    from train.check.child import run_row

    rows = StepCheck("config.json", 2048, None).rows()
    assert [run_row(row).state for row in rows[1:]] == [NOT_REACHED] * 3


def test_offload(monkeypatch: Any) -> None:
    """A CPU stands for a device with a host: programs for CPUs are traced with moves that the
    compiler of CPUs leaves out. Gradients of wrong arrays are found."""
    assert check_rows.check_offload().state == NOT_APPLICABLE
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jit = jax.jit
    factor = 1.0
    programs: list[str] = []

    def spoil(function: Any) -> Any:
        """Scales the gradients of the first program, which is the one with offload."""
        scale = factor if not programs else 1.0

        def run(*arrays: Any) -> Any:
            programs.append(str(jax.make_jaxpr(function)(*arrays)))
            return scale * jit(function)(*arrays)

        return run

    monkeypatch.setattr(check_rows.jax, "jit", spoil)
    assert check_rows.check_offload().state == HOLDS
    assert ["MemorySpace.Host" in program for program in programs] == [True, False]
    programs.clear()
    factor = 1.1
    assert check_rows.check_offload().state == FAILS
    monkeypatch.setattr(check_rows, "_PINNED_HOST", "no such memory")
    assert check_rows.check_offload().state == NOT_APPLICABLE


def test_the_table_says_what_to_do() -> None:
    rows = [
        RowResult("attention: causal, bfloat16", FAILS, "error 1"),
        RowResult("attention: packed, bfloat16", FAILS, "error 2"),
        RowResult("experts: even, bfloat16", FAILS, "error 3"),
        RowResult("offload", NOT_APPLICABLE),
    ]
    text = format_table(rows, "check.json")
    assert "3 fails, 1 not applicable" in text
    joined = " ".join(text.split())
    assert "causal, bfloat16; attention: packed, bfloat16: train, generate and serve with" in joined
    assert "--attention blockwise" in joined and "--experts blocks" in joined
    assert "Paste this table" in text and text.endswith("figures: check.json")


def test_a_file_is_replaced_only_if_the_user_says_so(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "check.json"
    file.write_text("mine")
    for args, message in [
        (["--output", str(file)], "exists. Pass --overwrite"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--output", str(tmp_path / "no" / "check.json")], "cannot be written"),
        (["--minutes", "0"], "--minutes 0"),
        (["--model", str(tmp_path / "nothing")], "nothing"),
        (["--minuts", "5"], "--minuts"),
    ]:
        with pytest.raises(SystemExit) as ended:
            check.main(args)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine"


PROBE = {"platform": "cpu", "kind": "cpu", "count": 1, "memory": 2**34, "topology": None}


@pytest.fixture
def probed(monkeypatch: Any) -> None:
    """A machine without a plan, whose devices are found at once."""
    from train.doctor.devices import ChildEnding

    monkeypatch.setattr(check, "ask_jax", lambda: ChildEnding(json.dumps(PROBE), "", 0))
    monkeypatch.setattr(check, "GROUPS", {"scaled": None, "hanging": None, "dead": None})


def test_the_file_has_figures_and_nothing_of_the_user_s(
    tmp_path: Path, capsys: Any, probed: None
) -> None:
    file = tmp_path / "check.json"
    model = tmp_path / "config.json"
    model.write_text("{}")
    options = CheckOptions(output=str(file), minutes=0.2, json=True, model=str(model))
    rows = check.run(options, SPOILED)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert [row["state"] for row in printed["rows"]] == [row.state for row in rows]
    assert {row.name: row.state for row in rows}["dead"] in (FAILS, NOT_REACHED)
    assert printed["versions"]["jax"] and printed["device"]["kind"] == "cpu"
    assert printed["options"] == {"minutes": 0.2, "model": "given", "num_processes": None}
    assert str(tmp_path) not in file.read_text() and str(Path.home()) not in file.read_text()


def test_no_device_is_a_failure(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from train.doctor.devices import ChildEnding

    monkeypatch.setattr(check, "ask_jax", lambda: ChildEnding("", "no TPU was found", 1))
    rows = check.run(CheckOptions(output=str(tmp_path / "check.json")))
    assert rows[0] == RowResult("devices", FAILS, "no TPU was found")
    assert {row.state for row in rows[1:]} == {NOT_REACHED}
    assert "lora-jax doctor" in capsys.readouterr().out


def start(*words: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.check", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_prints_the_table_so_far(tmp_path: Path) -> None:
    process = start(folder=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "plan: steps" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "not applicable  attention" in out and "not reached     products" in out
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert rows[-1] == {"name": "longest", "state": NOT_REACHED}


@pytest.mark.slow
def test_the_cpu_as_a_device(tmp_path: Path) -> None:
    """Two steps of 2,048 tokens, whose memory is within a quarter of the plan."""
    process = start("--minutes", "6", "--json", folder=tmp_path)
    out, err = process.communicate(timeout=600)
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert process.returncode == 0, err
    assert rows["steps: two, of 2,048 tokens"]["state"] == HOLDS
    memory = rows["memory: steps of 2,048 tokens"]
    print(memory["text"])
    assert memory["state"] == HOLDS
    assert rows["decoding: after steps of 2,048 tokens"]["state"] == HOLDS
    assert {row["state"] for row in rows.values()} <= {HOLDS, NOT_APPLICABLE, NOT_REACHED}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Process 0 alone writes; steps and decoding hold on the devices of both."""
    _, fields = choose_shapes("cpu", None)
    fields |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
    model = tmp_path / "config.json"
    model.write_text(json.dumps(fields))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    words = ["--model", str(model), "--minutes", "3", "--num-processes", "2"]
    words += ["--coordinator", f"localhost:{port}"]
    processes = []
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        processes.append(start(*words, "--process-id", str(index), folder=folder))
    (first, _), (second, _) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first
    for name in ("steps: two, of 2,048 tokens", "decoding: after steps", "fsdp"):
        (line,) = [line for line in first.splitlines() if name in line]
        assert line.startswith(HOLDS), line
    assert second == "" and list((tmp_path / "1").iterdir()) == []
