"""The file of a check: versions, the device, options and figures, and nothing of the user's."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.check.options import CheckOptions
from train.check.table import RowResult
from train.doctor.hardware import find_hardware
from train.doctor.packages import installed
from train.doctor.troubles import without_secrets

FORMAT = 1  # of the file


def make_report(
    options: CheckOptions,
    device: Mapping[str, Any],
    rows: Sequence[RowResult],
    *,
    shapes: str,
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of the file.

    Args:
      options: the options of the command.
      device: the facts of `train.doctor.probe`.
      rows: the results.
      shapes: the name of the shapes of the steps.
      seconds: the time that the check took.
    """
    content = {
        "format": FORMAT,
        "versions": {"Python": platform.python_version(), **installed()},
        "device": {**device, "driver": find_hardware().driver},
        "options": {
            "minutes": options.minutes,
            "model": shapes,
            "num_processes": options.num_processes,
        },
        "seconds": round(seconds, 1),
        "rows": [row.as_json() for row in rows],
    }
    cleaned: dict[str, Any] = without_secrets(content)
    return cleaned


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file at once: a reader sees the whole of it, or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(content, indent=2) + "\n")
    os.replace(file.name, path)
