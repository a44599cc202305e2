"""The files of a run's folder that several modules read: JSON, whole or line by line."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.training.processes import write_text

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LEDGER = "reporters.json"
LOG = "log.txt"  # what a run prints that trains beside others
ERROR = "error.txt"  # why such a run failed


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file; returns {} if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines with a step each; leaves out a last one that a kill cut short."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes a file of JSON lines, which is there whole or not at all."""
    write_text(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Writes rows, the header among them, as CSV, which is there whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
