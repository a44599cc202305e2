"""The log of a run, as the loop knows it."""

from collections.abc import Mapping
from typing import Any, Protocol

Line = dict[str, Any]


class Log(Protocol):
    """Gets a line of metrics a window of steps; used in a `with`."""

    def __enter__(self) -> "Log": ...

    def __exit__(self, *_: Any) -> None: ...

    def add(self, line: Line) -> None:
        """Takes a line of metrics, which has a `step`."""

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step that was skipped."""


class NullLog:
    """Keeps nothing: in all processes but the first, which keeps the log for all."""

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, line: Line) -> None:
        """Keeps nothing."""

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps nothing."""
