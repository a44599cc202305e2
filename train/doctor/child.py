"""Processes of this project's own: those that may fail, hang or end for the sake of JAX."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]  # of `train` and `lora_jax`


class ChildEnding(NamedTuple):
    """The output, the errors and the exit code of a process; no code if it took too long."""

    output: str
    errors: str
    code: int | None

    @property
    def last_error(self) -> str:
        """Returns the last line of the errors that says anything, without the error's module."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with code {self.code} and said nothing"


def run_module(
    module: str, args: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None
) -> ChildEnding:
    """Runs the `main` of a module of this project, whatever the working folder holds.

    Args:
      module: the module: "train.doctor.probe".
      args: its command line.
      seconds: the time after which it is ended.
      variables: environment variables that are not set here already.
    """
    start = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from {module} import main; main()"
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-c", start, *args],
            env=dict(variables or {}) | os.environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output, errors = (part or b"" for part in (error.stdout, error.stderr))
        return ChildEnding(_decoded(output), _decoded(errors), None)
    return ChildEnding(ended.stdout, ended.stderr, ended.returncode)


def _decoded(part: bytes | str) -> str:
    return part if isinstance(part, str) else part.decode(errors="replace")
