"""Many processes as one run: who writes files, and where all of them wait for one another."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_ASK_SECONDS, _MOST_TURNS = 1.0, 10


def is_first() -> bool:
    """Returns True if this process is the one that writes files and talks."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes have come here.

    Args:
      what: a name of the point, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def broadcast_values(values: dict[str, float]) -> dict[str, float]:
    """Returns the first process's values, which have the same names in all, in every process."""
    if jax.process_count() == 1:
        return values
    # As bytes: JAX would round them to 32 bits.
    own = np.array([*values.values()], np.float64).view(np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(own))
    return dict(zip(values, told.view(np.float64).tolist(), strict=True))


class Agreement:
    """Tells all processes in the same turn a number that one of them has, such as a signal's.

    Asking the others takes about a millisecond. Where turns are short, they are asked about once a
    second, and at least every ten turns.
    """

    def __init__(self) -> None:
        self._turns, self._every = 0, 1
        self._asked = time.monotonic()

    def largest(self, own: Callable[[], int | None], turn: Any = ()) -> int | None:
        """Returns the largest number of all; all processes have to call this, each turn.

        Args:
          own: returns this process's number, from 1; it is called once the turn is over.
          turn: arrays that are ready once the turn is over.
        """
        if jax.process_count() == 1:
            return own()
        self._turns += 1
        if self._turns < self._every:
            return None
        jax.block_until_ready(turn)
        seconds = time.monotonic() - self._asked
        told: Any = multihost_utils.process_allgather(np.array([own() or 0, seconds], np.float32))
        a_turn = max(float(told[:, 1].max()) / self._turns, 1e-3)
        self._turns, self._every = 0, max(1, min(_MOST_TURNS, int(_ASK_SECONDS / a_turn)))
        self._asked = time.monotonic()
        return int(told[:, 0].max()) or None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, in the first process alone; the file appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a text file as `write_json` does."""
    if not is_first():
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
