"""Data sets as the option --dataset names them, with their weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from train.console.errors import UserError
from train.data.files import kind_of

_NEEDED = "a weight is a positive number, such as a.jsonl:3 b.jsonl:1"


class Named(NamedTuple):
    """A data set's name or path, and its weight; None where none was given."""

    name: str
    weight: float | None


def named(given: Sequence[str]) -> list[Named]:
    """Returns the data sets that --dataset names: `a.jsonl`, or `a.jsonl:3 b.jsonl:1`.

    A colon belongs to the name if a file or a folder has that name, or if part of a path follows
    it rather than a number.

    Raises:
      UserError: none is named, one is named twice, a weight is not a positive number, or only
        some have weights.
    """
    found = [_named(text) for text in given]
    names = [one.name for one in found]
    if not found:
        raise UserError("--dataset names no data set: give a file, a folder, or a name on the hub")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"--dataset names {twice[0]} twice: give it once, with a larger weight if it is to be "
            "seen more often"
        )
    without = [one.name for one in found if one.weight is None]
    if len(found) == 1 and not without:
        raise UserError(
            f"--dataset {given[0]}: a weight has no effect on a single data set; name "
            f"{names[0]} alone, or others beside it"
        )
    if without and len(without) < len(found):
        raise UserError(
            f"--dataset {' '.join(given)}: {', '.join(without)} has no weight, and others have: "
            "give all of them a weight, or none (each row then comes once an epoch)"
        )
    return found


def _named(text: str) -> Named:
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Named(text, None)
    try:
        number = float(weight)
    except ValueError:
        if kind_of(weight) or "/" in weight or "\\" in weight:
            return Named(text, None)
        raise UserError(
            f"--dataset {text}: {weight!r} is not a weight of {name}; {_NEEDED}"
        ) from None
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"--dataset {text}: {_NEEDED}, not {weight}")
    if not name:
        raise UserError(f"--dataset {text} has a weight and no name")
    return Named(name, number)
