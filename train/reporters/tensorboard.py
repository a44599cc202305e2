"""Writes TensorBoard's event files in the run's folder."""

import shutil
from collections.abc import Mapping, Sequence

from train.reporters.contract import Ending, Sample, Start, Tracker

EVENTS = "tensorboard"


class TensorBoard:
    """Writes the events of all steps again, so that a resumed run has no step twice."""

    run_id: str | None = None

    def __init__(self, start: Start) -> None:
        import tensorboardX

        shutil.rmtree(start.folder / EVENTS, ignore_errors=True)
        self._writer = tensorboardX.SummaryWriter(str(start.folder / EVENTS))

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Writes each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=at)

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Writes the samples as text."""
        text = "\n\n".join(f"**{sample.prompt}**\n\n{sample.answer}" for sample in samples)
        self._writer.add_text("samples", text, step, walltime=at)

    def close(self, how: Ending) -> None:
        """Closes the files."""
        self._writer.close()


TRACKER = Tracker(
    reporter=TensorBoard,
    package="tensorboardX",
    extra="train",
    files=EVENTS,
    no_project="TensorBoard's files have no project",
    one_run=False,
)
