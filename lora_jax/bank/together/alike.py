"""Batches of the adapters of one stack, which its compiled step takes in the same shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.bank.stored import BankError
from lora_jax.core.types import ArrayBatch


def calls_of(
    batches: Mapping[str, ArrayBatch], *, draws: bool
) -> Sequence[Mapping[str, ArrayBatch]]:
    """Returns the calls that take a step with each batch: one for all, or one for each.

    Batches of other shapes are filled up and share a call; see `alike`. Those of other arrays, such
    as prompts that completions share and prompts of their own, have another. Where the loss draws
    random numbers, each has a call of its own instead: what is drawn for an array depends on its
    shape, and an adapter draws what it draws alone.

    Args:
      batches: a dictionary of arrays for each adapter, by the adapter's name.
      draws: whether the loss draws random numbers (dropout, noise).

    Raises:
      BankError: see `alike`.
    """
    first, *others = (_shapes(batch) for batch in batches.values())
    if draws and any(shapes != first for shapes in others):
        return [{name: batch} for name, batch in batches.items()]
    kinds: dict[Any, dict[str, ArrayBatch]] = {}
    for name, batch in batches.items():
        arrays = frozenset((key, np.ndim(array)) for key, array in batch.items())
        kinds.setdefault(arrays, {})[name] = batch
    return [alike(kind) for kind in kinds.values()]


def alike(batches: Mapping[str, ArrayBatch]) -> Mapping[str, ArrayBatch]:
    """Returns batches in the same shapes: filled up to the largest with zeros.

    Args:
      batches: a dictionary of arrays for each adapter, by the adapter's name.

    Raises:
      BankError: they have other shapes, and no "weights", of which 0 is for what does not count.
    """
    shapes = {name: _shapes(batch) for name, batch in batches.items()}
    first, *others = shapes
    wrong = next((name for name in others if shapes[name] != shapes[first]), None)
    if wrong is None:
        return batches
    if not all(
        "weights" in batch and batch.keys() == batches[first].keys() for batch in batches.values()
    ):
        raise BankError(
            f"together: {first!r} and {wrong!r} train in one stack, and their batches have the "
            f'shapes {shapes[first]} and {shapes[wrong]}, without "weights" by which they could be '
            "filled up: give them the same shapes"
        )
    largest = {
        name: np.max([np.shape(batch[name]) for batch in batches.values()], axis=0)
        for name in batches[first]
    }

    def filled(array: jax.Array | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.pad(array, [(0, more) for more in np.subtract(shape, np.shape(array))])

    return {
        name: {key: filled(array, largest[key]) for key, array in batch.items()}
        for name, batch in batches.items()
    }


def _shapes(batch: ArrayBatch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in batch.items()}
