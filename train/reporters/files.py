"""Reads and writes the files of a run's folder that several modules use, in JSON and CSV."""

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
    """Reads a file of JSON lines that each have a step; skips an incomplete last line."""
    lines = []
    # Texts may contain other ends of lines, such as U+2028, which do not end a line of JSON.
    for text in path.read_text().split("\n") if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes a file of JSON lines atomically."""
    write_text(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Writes rows, including the header, as CSV atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
