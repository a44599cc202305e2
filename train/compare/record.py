"""The progress of a comparison: `sweep.json`, from which it goes on."""

import dataclasses
from pathlib import Path

from train.compare.result import Rung, read_record

FILE = "sweep.json"


@dataclasses.dataclass
class Done:
    """The progress of a run.

    Attributes:
      stages: the stages that are over.
      seconds: the time they took; of runs side by side, an even share.
      side_by_side: the runs that shared the last stage's steps.
      finished: whether it was trained to the end and measured.
      error: what ended it early.
      score: the task's own, at the end.
      saved_bytes: bytes of what it leaves to ship.
      outside: the loss on text outside the task, at the end.
      intruders: intruder dimensions of a matrix, on average, at the end.
    """

    stages: int = 0
    seconds: float = 0.0
    side_by_side: int = 1
    finished: bool = False
    error: str | None = None
    score: float | None = None
    saved_bytes: int | None = None
    outside: float | None = None
    intruders: float | None = None


@dataclasses.dataclass
class Record:
    """The progress of all runs.

    Attributes:
      date: when the comparison began, as ISO 8601 has it.
      runs: what was done of each run, by name.
      rungs: the decisions, stage by stage.
    """

    date: str
    runs: dict[str, Done] = dataclasses.field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()

    def of(self, name: str) -> Done:
        """Returns what was done of a run."""
        return self.runs.setdefault(name, Done())


def read(folder: Path, date: str) -> Record:
    """Returns the record of a folder, or a new one that begins now.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / FILE
    return read_record(Record, path) if path.exists() else Record(date)
