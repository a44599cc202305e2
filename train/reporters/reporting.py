"""Runs all reporters of a run, each in its own thread, so that none delays or ends training.

`reporters.json` in the run's folder keeps the id of the run in each service, and the last step that
each metric was reported for. A resumed run continues the same runs there, and reports no step
twice; a reporter that joins later gets all steps from the beginning.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lora_jax.training.errors import Interrupted
from lora_jax.training.processes import write_json
from lora_jax.training.run.log import Line
from train.reporters.contract import Ending, Reporter, Sample, Start
from train.reporters.files import LEDGER, read_json

_OPEN_SECONDS = 30.0  # seconds for the reporters to begin before the run goes on without waiting
_CLOSE_SECONDS = 60.0  # seconds for what is still to be sent
_SAMPLES = "samples"
_NOT_METRICS = ("step", "time", "reason")

Steps = dict[str, int]  # the last step reported, by the name of the metric


class Reporting:
    """Passes a run's lines and samples to its reporters; a context manager."""

    def __init__(
        self,
        folder: Path,
        reporters: Mapping[str, Callable[[Start], Reporter]],
        *,
        config: Mapping[str, object],
        project: str | None,
        lines: Sequence[Line],
        samples: Sequence[Line],
        warn: Callable[[str], object],
    ) -> None:
        """Starts the reporters' threads.

        Args:
          folder: the run's folder.
          reporters: by name.
          config: the options of the run.
          project: the project that the run belongs to; None for the default.
          lines, samples: the whole record of an earlier process of this run, including lines that
            this one will write again.
          warn: is called once with a message about a reporter that fails.
        """
        self._path = folder / LEDGER
        self._is_open = True
        self._ledger_lock = threading.Lock()
        self._channels: list[_Channel] = []
        self._other_entries = {}  # of reporters that this process does not have
        entries = {}
        for name, entry in read_json(self._path).items():
            entries[name] = _close_ledger_entry(entry, lines, samples)
            if name not in reporters:
                self._other_entries[name] = entries[name]
        for name, make in reporters.items():
            entry = entries.get(name, {"run": None, "reported": {}})
            start = Start(
                name=folder.name,
                folder=folder,
                project=project,
                config=config,
                run_id=entry["run"],
            )
            channel = _Channel(
                name=name,
                make=make,
                start=start,
                reported=entry["reported"],
                warn=warn,
                run_id=start.run_id,
            )
            self._channels.append(channel)
        for channel in self._channels:
            channel.open(self._write_ledger)
        deadline = time.monotonic() + _OPEN_SECONDS
        for channel in self._channels:
            channel.wait_until_open(deadline - time.monotonic())

    def __enter__(self) -> "Reporting":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the reporters with the run's ending, and writes the ledger."""
        ending: Ending = "finished"
        if kind is not None:
            is_interrupted = issubclass(kind, Interrupted | KeyboardInterrupt)
            ending = "stopped" if is_interrupted else "failed"
        for channel in self._channels:
            channel.close(ending)
        self._is_open = False
        self._write_ledger()

    def line(self, line: Line) -> None:
        """Reports a line of metrics as in metrics.jsonl."""
        for channel in self._channels:
            channel.put(line)

    def samples(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Reports the model's answers after a step."""
        for channel in self._channels:
            channel.put({"step": step, "time": at, _SAMPLES: list(samples)})

    def _write_ledger(self) -> None:
        """Writes the ledger. It is also called when a reporter knows the id of its run."""
        with self._ledger_lock:
            ledger = dict(self._other_entries)
            for channel in self._channels:
                if channel.run_id is not None:
                    ledger[channel.name] = {
                        "run": channel.run_id,
                        "reported": dict(channel.reported),
                        "open": self._is_open and not channel.failed,
                    }
            if ledger:
                write_json(self._path, ledger)


@dataclasses.dataclass(eq=False)
class _Channel:
    """A reporter with its thread and queue.

    Attributes:
      name: the reporter's.
      make: makes it.
      start: what it is made with.
      reported: the last step of each metric that it was told.
      warn: is called once with a message if it fails.
      run_id: its run there, once it is known.
      failed: whether nothing more is reported.
    """

    name: str
    make: Callable[[Start], Reporter]
    start: Start
    reported: Steps
    warn: Callable[[str], object]
    run_id: str | None
    failed: bool = False
    _queue: SimpleQueue[Line | Ending] = dataclasses.field(default_factory=SimpleQueue)
    _ready: threading.Event = dataclasses.field(default_factory=threading.Event)

    def open(self, on_open: Callable[[], object]) -> None:
        """Starts the thread, which calls `on_open` when it knows the id of the service's run."""
        name = f"report to {self.name}"
        self._thread = threading.Thread(
            target=self._report_queue, args=(on_open,), name=name, daemon=True
        )
        self._thread.start()

    def wait_until_open(self, seconds: float) -> None:
        """Waits for a short time until the reporter has started or failed."""
        if not self._ready.wait(max(0.0, seconds)):
            self.warn(
                f"warning: --report-to {self.name} did not start within {_OPEN_SECONDS:.0f} s. The "
                "run continues meanwhile."
            )

    def put(self, line: Line) -> None:
        """Queues a line for the report."""
        if not self.failed:
            self._queue.put(line)

    def close(self, ending: Ending) -> None:
        """Ends the report after waiting for the queue, for a limited time."""
        if self.failed:
            return
        self._queue.put(ending)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self.failed = True
            self.warn(
                f"warning: --report-to {self.name} is still busy after {_CLOSE_SECONDS:.0f} s. The "
                "tracker lacks what was not sent; metrics.jsonl has everything."
            )

    def _report_queue(self, on_open: Callable[[], object]) -> None:
        """Reports the lines of the queue until it receives the ending."""
        try:
            reporter = self.make(self.start)
            self.run_id = reporter.run_id
            on_open()
            self._ready.set()
            item = self._queue.get()
            while isinstance(item, dict):
                self._report(reporter, item)
                item = self._queue.get()
            reporter.close(item)
        except BaseException as error:  # of code that is not ours: whatever it is, training goes on
            self._fail(error)
        finally:
            self._ready.set()

    def _report(self, reporter: Reporter, line: Line) -> None:
        """Reports a line's samples or metrics, except those that were reported earlier."""
        step = line["step"]
        values = {}
        for name, value in line.items():
            is_reported = step <= self.reported.get(name, -1)
            if name not in _NOT_METRICS and not is_reported:
                values[name] = value
        if _SAMPLES in values:
            reporter.show(step, values[_SAMPLES], line["time"])
        elif values:
            reporter.report(step, values, line["time"])
        for name in values:
            self.reported[name] = step

    def _fail(self, error: BaseException) -> None:
        """Stops the report, and prints a warning with the error."""
        self.failed = True
        reason = " ".join(str(error).split())[:300]
        self.warn(
            f"warning: --report-to {self.name} failed, so it gets no more reports: "
            f"{type(error).__name__}: {reason}. Training continues, and metrics.jsonl has its "
            "record."
        )


def _close_ledger_entry(
    entry: Mapping[str, Any], lines: Sequence[Line], samples: Sequence[Line]
) -> Any:
    """Returns a closed ledger entry; one that a killed run left open counts as fully reported."""
    reported: Steps = dict(entry["reported"])

    def note(name: str, step: int) -> None:
        reported[name] = max(reported.get(name, -1), step)

    if entry["open"]:
        for line in lines:
            for name in line:
                if name not in _NOT_METRICS:
                    note(name, line["step"])
        for sample in samples:
            note(_SAMPLES, sample["step"])
    return {"run": entry["run"], "reported": reported, "open": False}
