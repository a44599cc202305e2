"""All reporters of a run: each in a thread of its own, so that none holds up or ends the training.

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

_OPENING = 30.0  # seconds for the reporters to begin before the run goes on without waiting
_CLOSING = 60.0  # seconds for what is still to be sent
_SAMPLES = "samples"
_NOT_METRICS = ("step", "time", "reason")

Steps = dict[str, int]  # the last step reported, by the name of the metric


class Reporting:
    """Hands a run's lines and samples to its reporters; a context manager."""

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
        """Opens the reporters.

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
        ledger = read_json(self._path)
        was = {name: _settled(entry, lines, samples) for name, entry in ledger.items()}
        self._others = {name: entry for name, entry in was.items() if name not in reporters}
        self._channels = []
        self._is_open = True
        self._writing = threading.Lock()
        for name, make in reporters.items():
            entry = was.get(name, {"run": None, "reported": {}})
            start = Start(folder.name, folder, project, config, entry["run"])
            channel = _Channel(name, make, start, entry["reported"], warn, start.run_id)
            self._channels.append(channel)
        for channel in self._channels:
            channel.open(self._keep)
        until = time.monotonic() + _OPENING
        for channel in self._channels:
            channel.wait_until_open(until - time.monotonic())

    def __enter__(self) -> "Reporting":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        how: Ending = "finished"
        if kind is not None:
            how = "stopped" if issubclass(kind, Interrupted | KeyboardInterrupt) else "failed"
        for channel in self._channels:
            channel.close(how)
        self._is_open = False
        self._keep()

    def line(self, line: Line) -> None:
        """Reports a line of metrics, as metrics.jsonl has it."""
        for channel in self._channels:
            channel.put(line)

    def samples(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Reports the model's answers after a step."""
        for channel in self._channels:
            channel.put({"step": step, "time": at, _SAMPLES: list(samples)})

    def _keep(self) -> None:
        """Writes the ledger; a reporter's thread does so once its run there is known."""
        with self._writing:
            ledger = self._others | {
                channel.name: {
                    "run": channel.run_id,
                    "reported": dict(channel.reported),
                    "open": self._is_open and not channel.failed,
                }
                for channel in self._channels
                if channel.run_id is not None
            }
            if ledger:
                write_json(self._path, ledger)


@dataclasses.dataclass(eq=False)
class _Channel:
    """Reports by one reporter, in a thread.

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
    _waiting: SimpleQueue[Line | Ending] = dataclasses.field(default_factory=SimpleQueue)
    _ready: threading.Event = dataclasses.field(default_factory=threading.Event)

    def open(self, opened: Callable[[], object]) -> None:
        """Starts the thread; `opened` is called in it, once the run there is known."""
        name = f"report to {self.name}"
        self._thread = threading.Thread(target=self._work, args=(opened,), name=name, daemon=True)
        self._thread.start()

    def wait_until_open(self, seconds: float) -> None:
        """Waits until the report has begun or failed, but not for long."""
        if not self._ready.wait(max(0.0, seconds)):
            self.warn(
                f"warning: --report-to {self.name}: it has not begun after {_OPENING:.0f} s; the "
                "run goes on meanwhile"
            )

    def put(self, line: Line) -> None:
        """Reports a line, later."""
        if not self.failed:
            self._waiting.put(line)

    def close(self, how: Ending) -> None:
        """Ends the report; waits for what is still to be sent, but not for ever."""
        if self.failed:
            return
        self._waiting.put(how)
        self._thread.join(_CLOSING)
        if self._thread.is_alive():
            self.failed = True
            self.warn(
                f"warning: --report-to {self.name}: it is still busy after {_CLOSING:.0f} s; what "
                "it has not sent is missing there"
            )

    def _work(self, opened: Callable[[], object]) -> None:
        try:
            reporter = self.make(self.start)
            self.run_id = reporter.run_id
            opened()
            self._ready.set()
            while isinstance(item := self._waiting.get(), dict):
                self._report(reporter, item)
            reporter.close(item)
        except BaseException as error:  # of code that is not ours: whatever it is, training goes on
            self._fail(error)
        finally:
            self._ready.set()

    def _report(self, reporter: Reporter, line: Line) -> None:
        step, at = line["step"], line["time"]
        new = {
            name: value
            for name, value in line.items()
            if name not in _NOT_METRICS and step > self.reported.get(name, -1)
        }
        if _SAMPLES in new:
            reporter.show(step, new[_SAMPLES], at)
        elif new:
            reporter.report(step, new, at)
        self.reported.update({name: step for name in new})

    def _fail(self, error: BaseException) -> None:
        self.failed = True
        reason = " ".join(str(error).split())[:300]
        self.warn(
            f"warning: --report-to {self.name} fails, and nothing more is reported there: "
            f"{type(error).__name__}: {reason}. Training goes on, and its record is metrics.jsonl"
        )


def _settled(entry: Mapping[str, Any], lines: Sequence[Line], samples: Sequence[Line]) -> Any:
    """Returns an entry of the ledger. One that a kill left open counts as having reported all."""
    reported = dict(entry["reported"])
    if entry["open"]:
        told = [(name, line["step"]) for line in lines for name in {*line} - {*_NOT_METRICS}]
        for name, step in (*told, *((_SAMPLES, line["step"]) for line in samples)):
            reported[name] = max(reported.get(name, -1), step)
    return {"run": entry["run"], "reported": reported, "open": False}
