"""The rows of a check, and the table that it ends with."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

State = Literal["holds", "fails", "not reached", "not applicable"]
HOLDS: State = "holds"
FAILS: State = "fails"
NOT_REACHED: State = "not reached"
NOT_APPLICABLE: State = "not applicable"

_COLUMNS = 100
_PASTE = (
    "Paste this table and the content of the file into an issue of lora_jax, so that the next "
    "version works here."
)
# What to do about a failure, by the beginning of a row's name.
_REMEDIES = {
    "devices": "find the reason with lora-jax doctor",
    "attention": "train, generate and serve with --attention blockwise",
    "product": "train without --quantize, or with another kind of codes",
    "few rows": "train with --few-rows xla",
    "quantized experts": "train with --few-rows xla",
    "experts": "train with --experts blocks",
    "exchange": "train with a --mesh without the axis expert",
    "fsdp": "train with --mesh data=N, where each device has the whole model",
    "donation": "expect a step to take the memory of its state twice: use smaller batches",
    "offload": "train with another --remat than offload",
    "memory": "leave more memory free than a plan says: use smaller batches",
    "time": "find the slow part with lora-jax plan and a profile",
    "decoding": "generate with --attention dense",
    "steps": "train with --attention blockwise, or on a CPU (JAX_PLATFORMS=cpu)",
}


class RowResult(NamedTuple):
    """The result of one check.

    Attributes:
      name: the subject and the variant: "attention: causal, bfloat16".
      state: see `State`.
      text: the figures or the reason, in words.
      figures: numbers by name.
    """

    name: str
    state: State
    text: str = ""
    figures: Mapping[str, Any] = {}

    @property
    def remedy(self) -> str | None:
        """Returns the remedy for a failure; None for other states."""
        if self.state != FAILS:
            return None
        subjects = [subject for subject in _REMEDIES if self.name.startswith(subject)]
        return _REMEDIES[subjects[0]] if subjects else "see lora-jax doctor"

    @property
    def line(self) -> str:
        """Returns the row as a line of the table."""
        return f"{self.state:14}  {self.name:44}  {self.text}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """Returns the row as fields for JSON."""
        fields = self._asdict() | {"figures": dict(self.figures), "remedy": self.remedy}
        return {name: value for name, value in fields.items() if value not in (None, "", {})}


def exit_code(rows: Sequence[RowResult]) -> int:
    """Returns 1 if a check fails, else 0."""
    return int(any(row.state == FAILS for row in rows))


def format_table(rows: Sequence[RowResult], file: str | None) -> str:
    """Returns the table, with what to do about failures.

    Args:
      rows: the results.
      file: the file with the figures; None if none was written.
    """
    lines = [row.line for row in rows]
    failures = [row for row in rows if row.state == FAILS]
    counts = {state: sum(row.state == state for row in rows) for state in State.__args__}  # type: ignore[attr-defined]
    lines += ["", ", ".join(f"{count} {state}" for state, count in counts.items() if count)]
    for remedy in dict.fromkeys(row.remedy for row in failures):
        names = [row.name for row in failures if row.remedy == remedy]
        lines += _wrap(f"error: {'; '.join(names)}: {remedy}.")
    if failures:
        lines += _wrap(_PASTE)
    if file is not None:
        lines.append(f"figures: {file}")
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
