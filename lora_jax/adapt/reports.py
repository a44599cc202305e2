"""Records uses of weights, and finds out whether JAX's caches kept reports from being made.

A warning that names a weight is made while JAX traces a use of the weight. JAX traces a function
once for all weights of equal shapes, also in later calls of `adapt` and under a later `jax.jit`.
The other weights then get no warning. A run of `adapt` that calls a function whose trace has made
such a report is **incomplete**: it must be walked again without JAX's caches.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

# Functions and programs, cached by JAX, whose traces have made a report.
_FUNCTIONS_WITH_REPORTS: weakref.WeakSet[Any] = weakref.WeakSet()


class WeightUse(NamedTuple):
    """One use of an adapted weight; see `lora_jax.explain`."""

    path: str
    primitive: str
    place: str  # file:line of the user's code
    how: str  # "factored", "merged" or "unused"
    why: str


class RunReports:
    """Counts the reports of one run of `adapt`, and keeps its messages.

    Attributes:
      n_reports: the number of reports so far.
      is_incomplete: True if a cached trace has perhaps kept a report from being made.
      messages: the warnings so far. Each is shown once.
    """

    def __init__(self) -> None:
        self.n_reports = 0
        self.is_incomplete = False
        self.messages: set[tuple[str, Any]] = set()


_RUN: contextvars.ContextVar[RunReports | None] = contextvars.ContextVar("run", default=None)


@contextlib.contextmanager
def collect_reports() -> Iterator[RunReports]:
    """Collects the reports that are made inside the block, which is one run."""
    reports = RunReports()
    token = _RUN.set(reports)
    try:
        yield reports
    finally:
        _RUN.reset(token)


def note_report() -> None:
    """Counts a report of a weight that is named, or that may be named later."""
    reports = _RUN.get()
    if reports is not None:
        reports.n_reports += 1


def is_new_message(message: str, line: Any) -> bool:
    """Returns True if the run has not yet shown this message at this line, and remembers it."""
    reports = _RUN.get()
    if reports is None:
        return True
    if (message, line) in reports.messages:
        return False
    reports.messages.add((message, line))
    return True


@contextlib.contextmanager
def watch(function: Any) -> Iterator[None]:
    """Surrounds the call of a function whose trace JAX may have cached.

    Args:
      function: the function or program. It is the same object in each call.
    """
    reports = _RUN.get()
    if reports is None:
        yield
        return
    n_reports_before = reports.n_reports
    if function in _FUNCTIONS_WITH_REPORTS:
        reports.is_incomplete = True
        reports.n_reports += 1  # for the functions around this one
    yield
    if reports.n_reports > n_reports_before:
        _FUNCTIONS_WITH_REPORTS.add(function)
