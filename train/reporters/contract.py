"""The contract of a tracker, and of the reporter that it makes for a run.

A tracker is a `Tracker` called TRACKER in a file of its own, the only one that imports its package,
and a line in `train/reporters/registry.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

PROJECT = "lora_jax"  # where neither an option nor the package's own variable names one

Ending = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed


class Sample(NamedTuple):
    """A prompt and the model's answer, with the facts that are known about the answer.

    A fact that is None is not known, or does not apply. Only completions that a run draws for its
    steps have the facts after `extra`.

    Attributes:
      prompt: the text of the prompt's last turn.
      answer: the answer. An answer of several turns is one text, with the results of tools.
      reward: the weighted sum of the rewards.
      extra: further facts about the answer, by name, for the record alone.
      row: the name of the prompt's row in the data.
      group: the index of the prompt in its step.
      place: the index of the completion among those of its prompt.
      redrawn: whether the completion was drawn again, because its group had equal rewards.
      context: the turns of the prompt before its last turn, in the first completion of a group.
      turns: the turns of the completion, each with a `role`, a `text` and, for tools, a `name`. The
        role is "assistant", "tool", or "environment" for the text that an environment adds to the
        prompt.
      rewards: the value of each reward without its weight, by name. A reward without a value is
        absent.
      advantage: the advantage of the completion over the others of its group.
      cut: whether the completion was cut off at the maximum number of tokens.
      lost: the reason why the completion ended early because of its environment.
      masked: whether the loss counts none of the completion's tokens.
    """

    prompt: str
    answer: str
    reward: float | None = None
    extra: Mapping[str, object] | None = None
    row: str | None = None
    group: int | None = None
    place: int | None = None
    redrawn: bool | None = None
    context: Sequence[Mapping[str, str]] | None = None
    turns: Sequence[Mapping[str, str]] | None = None
    rewards: Mapping[str, float] | None = None
    advantage: float | None = None
    cut: bool | None = None
    lost: str | None = None
    masked: bool | None = None


class Start(NamedTuple):
    """The run that a reporter reports.

    Attributes:
      name: the run's name, for people.
      folder: the run's folder.
      project: the project that the run belongs to; None for the package's own default.
      config: the options of the run.
      run_id: the service's run to continue; None for a new one.
    """

    name: str
    folder: Path
    project: str | None
    config: Mapping[str, object]
    run_id: str | None


class Reporter(Protocol):
    """Reports a run to a service. An error in it ends the reports but not the run.

    All its methods are called in one thread, in the order of the steps.

    Attributes:
      run_id: the service's run, for a later process to continue; None if each process reports all
        steps again.
    """

    run_id: str | None

    def report(self, step: int, values: Mapping[str, float], at: float) -> None:
        """Reports the metrics of a step, taken `at` seconds since 1970."""

    def show(self, step: int, samples: Sequence[Sample], at: float) -> None:
        """Reports the model's answers after a step."""

    def close(self, how: Ending) -> None:
        """Ends the report."""


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """Describes a service that receives the metrics of runs.

    Attributes:
      reporter: makes the reporter of a run; imports the package.
      package: the package that it imports.
      extra: the extra of this library that installs the package.
      files: the name of its files within the run's folder; None where it keeps them elsewhere.
      no_project: why --report-project has no effect on it; None where it has one.
      one_run: whether it keeps a single run in one process.
    """

    reporter: Callable[[Start], Reporter]
    package: str
    extra: str
    files: str | None = None
    no_project: str | None = None
    one_run: bool = True
