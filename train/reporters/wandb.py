"""Weights & Biases; its own environment variables count (WANDB_MODE, WANDB_PROJECT, WANDB_DIR)."""

import os

from train.reporters.contract import PROJECT, Ending, Start, Tracker
from train.reporters.tables import LogsTables


class Wandb(LogsTables):
    """Logs to one run of Weights & Biases."""

    def __init__(self, start: Start) -> None:
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
        """Ends the run there, as failed if it failed."""
        self._run.finish(exit_code=int(how == "failed"))


TRACKER = Tracker(reporter=Wandb, package="wandb", extra="wandb", files="wandb")
