"""Writes correct answers to the sums of `train.grpo --dataset arithmetic`, as examples."""

from pathlib import Path

from train.environments import arithmetic
from train.findings.making.inputs import FindingInputs
from train.processes.session import Session
from train.reporters.files import write_lines

ROWS = 1_300  # all sums that are not held out


def make(folder: Path, session: Session) -> FindingInputs:
    """Writes the sums with their answers; returns the option that names the file.

    Args:
      folder: where it goes.
      session: not needed, as nothing is trained.
    """
    del session
    rows = folder / "answers.jsonl"
    pairs = ((row["prompt"], row["answer"]) for row in arithmetic.rows(0, ROWS))
    write_lines(rows, [{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    return FindingInputs({"demonstrations": rows})
