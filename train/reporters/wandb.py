"""Reports to Weights & Biases, which also reads WANDB_MODE, WANDB_PROJECT and WANDB_DIR.

Its runs log dictionaries, and samples as tables; those of trackio follow it.
"""

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

from train.reporters.contract import PROJECT, Ending, Sample, Start, Tracker

_SAMPLE_COLUMNS = ("prompt", "answer", "reward")


class LogsTables:
    """Logs values and tables of samples to a run of wandb, or of trackio, which copies its API.

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
        columns_of = operator.attrgetter(*_SAMPLE_COLUMNS)
        rows = [[*columns_of(sample)] for sample in samples]
        table = self._table(columns=[*_SAMPLE_COLUMNS], data=rows)
        self._run.log({"samples": table}, step=step)


class Wandb(LogsTables):
    """Logs to one run of Weights & Biases."""

    def __init__(self, start: Start) -> None:
        """Creates a run with the options, or continues an earlier run."""
        import wandb

        run = wandb.init(
            project=start.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.name,
            id=start.run_id,
            resume="allow" if start.run_id else None,
            config=dict(start.config),
            allow_val_change=True,
            dir=os.environ.get("WANDB_DIR") or str(start.folder),
            settings=wandb.Settings(console="off"),  # the run's own output stays its own
        )
        super().__init__(wandb, run)
        self.run_id = run.id

    def close(self, how: Ending) -> None:
        """Ends the W&B run, and marks it as failed if the run failed."""
        self._run.finish(exit_code=int(how == "failed"))


TRACKER = Tracker(reporter=Wandb, package="wandb", extra="wandb", files="wandb")
