"""The report of a run: the fields of report.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Fields that only the reports of some runs have.
_OPTIONAL_FIELDS = frozenset(
    {
        *("best", "ended_early"),  # with --keep-best
        # Of a single run.
        *("compile_seconds", "further_compile_seconds", "compiled_bytes", "compiled_step_bytes"),
        "estimated_step_seconds",  # of a single run on TPUs
        "device_peak_bytes",  # of devices that report it, which CPUs do not
        "side_by_side",  # of a table
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """The fields of report.json, in their order; the scores follow once a run is evaluated.

    Attributes:
      summary: a description of the trained parameters.
      steps: the number of all steps.
      last_step: the number of the last step; smaller than `steps` if the run ended early.
      kept_step: the step of the saved adapter.
      skipped_steps: the numbers of the steps that were skipped.
      skip_reasons: the number of a skipped step -> the reason, if it is known.
      median_step_seconds, step_seconds_quartiles: seconds of a step; None without a step.
      estimated_step_seconds: the compiler's estimate of the median, for a batch of the largest
        shape; None where the compiler estimates no time, and for runs side by side.
      peak_bytes: the peak memory of the process.
      device_peak_bytes: the peak memory of the fullest device of the process, as the device reports
        it; None if it does not.
      adapter_bytes: size of the adapter on disk.
      best: the facts about the best step in the saved adapter; None without --keep-best.
      ended_early: whether --patience ended the run; None without --keep-best.
      compile_seconds: seconds of compiling the step; None for runs side by side.
      further_compile_seconds: seconds of later compilations; None for runs side by side.
      compiled_bytes: memory of the compiled step, by kind; None for runs side by side.
      compiled_step_bytes: the memory that the step takes on a device by the compiler, the sum of
        `compiled_bytes`; None if it is not reported, and for runs side by side.
      side_by_side: the number of runs that took their steps together; None for a single run.
      base_bytes: bytes of the base in memory.
    """

    summary: str
    steps: int
    last_step: int
    kept_step: int
    skipped_steps: list[int]
    skip_reasons: Mapping[int, str]
    median_step_seconds: float | None
    step_seconds_quartiles: list[float] | None
    estimated_step_seconds: float | None
    peak_bytes: int
    device_peak_bytes: int | None
    adapter_bytes: int
    best: Mapping[str, Any] | None
    ended_early: bool | None
    compile_seconds: float | None
    further_compile_seconds: float | None
    compiled_bytes: Mapping[str, int] | None
    compiled_step_bytes: int | None
    side_by_side: int | None
    base_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Returns the content of report.json, without the fields of other kinds of runs."""
        fields = dict(vars(self))
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in _OPTIONAL_FIELDS
        }
