"""Weights & Biases; its own environment variables count (WANDB_MODE, WANDB_PROJECT, WANDB_DIR)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from train.run.reporters.contract import PROJECT, Ending, Sample, Start

FILES = "wandb"  # its files in the run's folder


def _package() -> Any:
    import wandb

    return wandb


class Wandb:
    """Logs to one run of Weights & Biases."""

    def __init__(self, start: Start) -> None:
        wandb = _package()
        self._table = wandb.Table
        self._run = wandb.init(
            project=start.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.name,
            id=start.run_id,
            resume="allow" if start.run_id else None,
            config=dict(start.config),
            allow_val_change=True,
            dir=os.environ.get("WANDB_DIR") or str(start.folder),
            settings=wandb.Settings(console="off"),  # the run's own output stays its own
        )
        self.run_id: str | None = self._run.id

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Logs the values."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Logs the samples as a table."""
        table = self._table(columns=list(Sample._fields), data=[list(sample) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self, how: Ending) -> None:
        """Ends the run there, as one that failed where it did."""
        self._run.finish(exit_code=int(how == "failed"))
