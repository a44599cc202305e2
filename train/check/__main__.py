"""Do the kernels and the training steps of this project hold on this device?

    python -m train.check

Compares kernels with dense arithmetic on the device, takes real training steps, and compares their
memory and time with the plan. Takes five minutes at most, and prints a table of what holds.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.check.child import GROUPS
from train.check.group import CHILD, TimeLimits, run_group
from train.check.options import CheckOptions, check_options
from train.check.report import make_report, write_report
from train.check.shapes import choose_shapes
from train.check.table import (
    FAILS,
    NOT_APPLICABLE,
    NOT_REACHED,
    RowResult,
    State,
    exit_code,
    format_table,
)
from train.console.errors import reported
from train.doctor.devices import ask_jax, run_module
from train.options.command import parse_options

_SCRIPT = "train.check"
_SEQ = 2048  # tokens of the rows of the first steps
_STEP_GROUPS = ("steps", "longest")
_STEP_SECONDS = 300.0  # to compile a step and run it twice
_LAUNCH = ("distributed", "coordinator", "num_processes", "process_id", "heartbeat_timeout")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 1 if a check fails, and with 2 for bad options."""
    with reported():
        options = parse_options(CheckOptions, args, _SCRIPT)
        check_options(options)
        rows = run(options)
    sys.exit(exit_code(rows))


def run(options: CheckOptions, child: str = CHILD) -> list[RowResult]:
    """Runs the checks, prints the table and writes the file; returns the rows.

    Args:
      options: the options, checked.
      child: the module that runs a group of checks in a process.
    """
    with tempfile.TemporaryDirectory(prefix="lora-jax-check-") as folder:
        checks = Checks(options, Path(folder), child)
        try:
            checks.run_all()
        except KeyboardInterrupt:
            checks.tell("interrupted")
    checks.add_missing_groups()
    if checks.process == 0:
        content = make_report(
            options, checks.device, checks.rows, shapes=checks.shapes, seconds=checks.seconds
        )
        write_report(options.output_path, content)
        if options.json:
            print(json.dumps(content, indent=2))
        else:
            print(format_table(checks.rows, options.output))
    return checks.rows


class Checks:
    """The checks of one command, in their order.

    Attributes:
      rows: the results so far.
      device: the facts of `train.doctor.probe`.
      shapes: the name of the shapes of the steps.
      process: the number of this process among those of a run.
    """

    def __init__(self, options: CheckOptions, folder: Path, child: str) -> None:
        """Takes the options, a folder for files, and the module of a child."""
        self.options = options
        self.rows: list[RowResult] = []
        self.device: dict[str, Any] = {}
        self.shapes = ""
        self.process = options.process_id or 0
        self._child = child
        self._start = time.monotonic()
        self._limits = TimeLimits(self._start + 60 * options.minutes)
        self._model = folder / "config.json"
        self._started: list[str] = []

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self._start

    def tell(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{self.seconds:4.0f} s] {text}", file=sys.stderr, flush=True)

    def run_all(self) -> None:
        """Finds the device, and runs the groups."""
        self.tell("JAX finds its devices")
        ending = ask_jax()
        lines = ending.output.strip().splitlines()
        if ending.code != 0 or not lines:
            self.add_row(RowResult("devices", FAILS, ending.last_error))
            return
        self.device = json.loads(lines[-1])
        self.tell(f"{self.device['count']} × {self.device['kind']}")
        self._write_model()
        for group in GROUPS:
            self._started.append(group)
            request: dict[str, Any] = {
                "launch": {name: getattr(self.options, name) for name in _LAUNCH},
                "model": str(self._model),
            }
            limits = self._limits
            if group in _STEP_GROUPS:
                limits = limits._replace(row_seconds=_STEP_SECONDS)
                plan = self._plan_steps(group)
                if group == "longest" and plan is None:
                    continue
                seq = plan["seq_len"] if plan else _SEQ
                request |= {"plan": plan, "seq": seq}
            process = run_group(group, request, limits, self.add_row, self._child)
            self.process = self.process if process is None else process

    def add_row(self, row: RowResult) -> None:
        """Adds a result, and prints it."""
        self.rows.append(row)
        self.tell(row.line)

    def add_missing_groups(self) -> None:
        """Adds a row for each group that an interruption left out."""
        for group in GROUPS:
            if group not in self._started:
                self.rows.append(RowResult(group, NOT_REACHED))

    def _write_model(self) -> None:
        if self.options.model is not None:
            self.shapes = "given"
            self._model = Path(self.options.model).expanduser().absolute()
            return
        self.shapes, fields = choose_shapes(self.device["platform"], self.device["memory"])
        self._model.write_text(json.dumps(fields))

    def _plan_steps(self, group: str) -> dict[str, Any] | None:
        """Returns the plan of the steps of a group for this device; None if there is none.

        It runs in a process of its own, because a plan computes on the CPU.
        """
        name = f"plan: {group}"
        topology = self.device["topology"]
        if topology is None or self.options.distributed or self.options.coordinator:
            reason = "there is no plan for this device" if topology is None else "several hosts"
            self.add_row(RowResult(name, NOT_APPLICABLE, reason))
            return None
        if self._limits.left <= 0:
            self.add_row(RowResult(name, NOT_REACHED))
            return None
        words = ["--model", str(self._model), "--topology", topology, "--alone", "--json"]
        words += ["--batch-size", str(self.device["count"]), "--seq-len", str(_SEQ)]
        if self.device["platform"] == "cpu":
            words += ["--dtype", "float32"]
        if group == "longest":
            words.append("--longest")
        self.tell(f"{name} is compiled")
        ending = run_module("train.plan.__main__", words, self._limits.left)
        if ending.code != 0:
            state: State = NOT_REACHED if ending.code is None else NOT_APPLICABLE
            text = "the time was up" if ending.code is None else ending.last_error
            self.add_row(RowResult(name, state, text))
            return None
        plan: dict[str, Any] = json.loads(ending.output)
        return plan


if __name__ == "__main__":
    main(sys.argv[1:])
