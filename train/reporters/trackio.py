"""Reports to trackio, which also reads TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID."""

import os
import secrets

from train.reporters.contract import PROJECT, Ending, Start, Tracker
from train.reporters.wandb import LogsTables


class Trackio(LogsTables):
    """Logs to one run of trackio, which identifies runs by their names."""

    def __init__(self, start: Start) -> None:
        """Creates a run with the options, or continues an earlier run."""
        import trackio

        self.run_id = start.run_id or f"{start.name}-{secrets.token_hex(3)}"
        run = trackio.init(
            project=start.project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=self.run_id,
            config=dict(start.config),
            resume="allow",
            embed=False,
        )
        super().__init__(trackio, run)

    def close(self, how: Ending) -> None:
        """Sends the remaining values, and ends trackio's run."""
        self._run.finish()


TRACKER = Tracker(reporter=Trackio, package="trackio", extra="trackio")
