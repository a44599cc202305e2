"""Runs a group of rows in child processes: a hang or a crash ends only the child."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from train.check.child import MARK
from train.check.table import FAILS, NOT_REACHED, RowResult
from train.doctor.devices import ChildEnding, module_command

CHILD = "train.check.child"
_START_SECONDS = 180.0  # for JAX to find its devices
_MOST_CHILDREN = 4  # of a group: after so many hangs and crashes, its other rows are left
_END = object()


class TimeLimits(NamedTuple):
    """The end of a check, and the seconds after which a row counts as hanging."""

    deadline: float
    row_seconds: float = 120.0

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()


class _Ending(NamedTuple):
    """The end of a child: the state and the text of the row that it was in."""

    state: Any
    text: str


def run_group(
    group: str,
    request: Mapping[str, Any],
    limits: TimeLimits,
    on_row: Callable[[RowResult], None],
    child: str = CHILD,
) -> int | None:
    """Runs the rows of a group, and goes on with the next row in a new child after a crash.

    Args:
      group: a name of `train.check.child.GROUPS`.
      request: further fields of the request for the child.
      limits: the time limits.
      on_row: gets each result.
      child: the module that a child runs.

    Returns:
      The number of this process among those of a run; None if no child said it.
    """
    finished: list[str] = []
    names: list[str] = [group]
    process: int | None = None

    def add(result: RowResult) -> None:
        finished.append(result.name)
        on_row(result)

    try:
        for _ in range(_MOST_CHILDREN):
            current = group
            ending = _Ending(NOT_REACHED, "")
            fields = {**request, "group": group, "skip": finished}
            for message in _messages_of_child(child, fields, limits):
                if isinstance(message, _Ending):
                    ending = message
                elif "names" in message:
                    names = message["names"]
                    process = message["process"]
                elif "begin" in message:
                    current = message["begin"]
                else:
                    add(RowResult(**message["row"]))
            is_in_row = current not in finished
            if ending.text and is_in_row:
                add(RowResult(current, ending.state, ending.text))
            has_started = current != group
            is_failure = ending.state == FAILS
            if not (has_started and is_failure and set(names) - set(finished)):
                break
    finally:  # after Ctrl-C, too
        for name in names:
            is_replaced = name == group and finished
            if name not in finished and not is_replaced:
                add(RowResult(name, NOT_REACHED))
    return process


def _messages_of_child(
    module: str, request: Mapping[str, Any], limits: TimeLimits
) -> Iterator[dict[str, Any] | _Ending]:
    """Yields the messages of a child, and how it ended; ends it at a deadline."""
    if limits.left <= 0:
        return
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            module_command(module, [json.dumps(request)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the parent
        )
        lines: queue.Queue[Any] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        try:
            yield from _read_messages(process, lines, errors, limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()


def _read_lines(process: subprocess.Popen[str], lines: "queue.Queue[Any]") -> None:
    """Puts the lines that a process prints into a queue, and the end."""
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(_END)


def _read_messages(
    process: subprocess.Popen[str], lines: "queue.Queue[Any]", errors: IO[str], limits: TimeLimits
) -> Iterator[dict[str, Any] | _Ending]:
    """Yields the messages of a process, and how it ended."""
    row_seconds = _START_SECONDS
    while True:
        seconds = min(row_seconds, limits.left)
        try:
            line = lines.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            if limits.left <= 0:
                yield _Ending(NOT_REACHED, "it was running when the time was up")
            else:
                yield _Ending(FAILS, f"it hangs: no answer in {row_seconds:.0f} s")
            return
        if line is _END:
            break
        if line.startswith(MARK):
            row_seconds = limits.row_seconds
            yield json.loads(line.removeprefix(MARK))
    code = process.wait()
    if code:
        errors.seek(0)
        reason = ChildEnding("", errors.read(), code).last_error
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        yield _Ending(FAILS, f"the process ends by {cause}: {reason}"[:300])
