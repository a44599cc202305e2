"""Reads the rows of a dataset, from a file or from the hub."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.hf.hub import probe
from lora_jax.training.data.chats import Row
from train.run.errors import UserError

FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")


def read_rows(dataset: str, *, split: str = "train", subset: str | None = None) -> list[Row]:
    """Reads the rows of a JSONL, Parquet or CSV file, or of a dataset on the hub.

    Args:
      dataset: a path with one of the endings `FILE_KINDS`, or a name on the hub.
      split: the split of a dataset on the hub.
      subset: its subset (configuration).

    Raises:
      UserError: there is no such file or dataset, it cannot be read, or it has no rows.
    """
    path = Path(dataset).expanduser()
    if path.suffix in FILE_KINDS:
        if not path.is_file():
            raise UserError(f"--dataset {dataset}: there is no such file")
        rows = _read_file(path)
    elif path.exists():
        kinds = ", ".join(FILE_KINDS)
        raise UserError(f"--dataset {dataset}: a file of one of the kinds {kinds} is needed")
    else:
        rows = _read_hub(dataset, split, subset)
    if not rows:
        raise UserError(f"--dataset {dataset} has no rows")
    return rows


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file)) if path.suffix == ".csv" else _json_lines(path, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path, lines: Iterable[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({error}): {_shown(line)}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {_shown(line)}")
        rows.append(row)
    return rows


def _read_hub(name: str, split: str, subset: str | None) -> list[Row]:
    import datasets
    import huggingface_hub

    # Without an answer, datasets would try again for half a minute before it looks into its cache.
    problem = probe(name, kind="dataset")
    constants: Any = huggingface_hub.constants
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, problem is not None
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
        kinds = dataset.features or {}
        classes = {n: kind for n, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        return [{**row, **_named(row, classes)} for row in dataset]
    except Exception as error:  # any error of the hub's layers is about the given name
        raise UserError(
            f"--dataset {name} is neither a file nor a dataset that can be loaded from the hub "
            f"(--split {split}, --subset {subset}): {problem or error}. Give a file, a dataset "
            "that is in the local cache, or a name on the hub that can be reached"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _named(row: Row, classes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row's class numbers as the dataset's class names; leaves out -1 (no class)."""
    numbers = {name: row[name] for name in classes}
    known = {name: n for name, n in numbers.items() if n is not None and n >= 0}
    return {name: classes[name].int2str(n) for name, n in known.items()}


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
