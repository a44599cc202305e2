"""trackio; its own environment variables count (TRACKIO_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID)."""

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from train.run.reporters.contract import PROJECT, Ending, Sample, Start


def _package() -> Any:
    import trackio

    return trackio


class Trackio:
    """Logs to one run of trackio, which knows runs by their names."""

    def __init__(self, start: Start) -> None:
        trackio = _package()
        self._table = trackio.Table
        self.run_id: str | None = start.run_id or f"{start.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=start.project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=self.run_id,
            config=dict(start.config),
            resume="allow",
            embed=False,
        )

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Logs the values."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Logs the samples as a table."""
        table = self._table(columns=list(Sample._fields), data=[list(sample) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self, how: Ending) -> None:
        """Sends what is left, and ends the run there."""
        self._run.finish()
