"""Reports to packages whose runs log dictionaries, and whose samples are tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.reporters.contract import Sample

_COLUMNS = ("prompt", "answer", "reward")


class LogsTables:
    """Logs to a run of such a package: wandb, and trackio, which follows it.

    Attributes:
      run_id: see `train.reporters.contract.Reporter`.
    """

    run_id: str | None

    def __init__(self, package: Any, run: Any) -> None:
        self._table = package.Table
        self._run = run

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Logs the values."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Logs the samples as a table."""
        rows = [[getattr(sample, name) for name in _COLUMNS] for sample in samples]
        table = self._table(columns=[*_COLUMNS], data=rows)
        self._run.log({"samples": table}, step=step)
