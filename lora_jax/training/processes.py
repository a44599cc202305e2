"""Coordinates the processes of a run: which one writes files, and where all wait for each other."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_EXCHANGE_SECONDS = 1.0  # between two exchanges of numbers
_MAX_TURNS = 10  # until the next exchange


def is_first() -> bool:
    """Returns True if this process writes files and messages."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes have reached this point.

    Args:
      what: a name of the point, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def broadcast_values(values: dict[str, float]) -> dict[str, float]:
    """Returns the first process's values in every process."""
    if jax.process_count() == 1:
        return values
    # As bytes: JAX would round them to 32 bits.
    value_bytes = np.array([*values.values()], np.float64).view(np.uint8)
    first_bytes = np.asarray(multihost_utils.broadcast_one_to_all(value_bytes))
    first_values = first_bytes.view(np.float64).tolist()
    return dict(zip(values, first_values, strict=True))


class Agreement:
    """Makes a number of any process, such as a signal, known to all in the same turn.

    An exchange takes about a millisecond. If turns are short, the processes exchange their numbers
    about once a second, and at least every ten turns.
    """

    def __init__(self) -> None:
        self._turns = 0  # since the last exchange
        self._exchange_turns = 1  # turns from an exchange to the next
        self._exchange_time = time.monotonic()

    def largest(self, own_number: Callable[[], int | None], turn: Any = ()) -> int | None:
        """Returns the largest number of all processes, which must all call this each turn.

        Args:
          own_number: returns this process's number, from 1; it is called once the turn is over.
          turn: arrays that are ready once the turn is over.
        """
        if jax.process_count() == 1:
            return own_number()
        self._turns += 1
        if self._turns < self._exchange_turns:
            return None
        jax.block_until_ready(turn)
        seconds = time.monotonic() - self._exchange_time
        message = np.array([own_number() or 0, seconds], np.float32)
        messages: Any = multihost_utils.process_allgather(message)  # [processes, 2]
        turn_seconds = max(float(messages[:, 1].max()) / self._turns, 1e-3)
        turns_a_second = int(_EXCHANGE_SECONDS / turn_seconds)
        self._exchange_turns = max(1, min(_MAX_TURNS, turns_a_second))
        self._turns = 0
        self._exchange_time = time.monotonic()
        return int(messages[:, 0].max()) or None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file from the first process; it appears complete or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a text file like `write_json`."""
    if not is_first():
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
