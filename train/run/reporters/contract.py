"""The contract of a reporter: one file each, which alone imports the package that it reports to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

PROJECT = (
    "lora_jax"  # the default, where neither an option nor the package's own variable names one
)

Ending = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed


class Sample(NamedTuple):
    """A prompt, and what the model answers to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """Says what a reporter reports on.

    Attributes:
      name: the run's name, for people.
      folder: the run's folder.
      project: what the run belongs to; None for the package's own default.
      config: the options of the run.
      run_id: the run there that this one goes on with; None for a new one.
    """

    name: str
    folder: Path
    project: str | None
    config: Mapping[str, Any]
    run_id: str | None


class Reporter(Protocol):
    """Reports a run. It is made with a `Start`; whatever it raises ends the reports, not the run.

    All its methods are called in one thread, in the order of the steps.

    Attributes:
      run_id: names the run there, for a later process to go on with; None where each process
        reports all steps anew.
    """

    run_id: str | None

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Reports what was measured after a step, `at` seconds since 1970."""

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Reports what the model answered after a step."""

    def close(self, how: Ending) -> None:
        """Ends the report."""
