"""Batches of the adapters of one stack, which its compiled step takes in the same shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.bank.stored import BankError


def alike(batches: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns batches in the same shapes: filled up to the largest with zeros.

    Args:
      batches: by the adapter's name, arrays by name.

    Raises:
      BankError: they have other shapes, and no "weights", of which 0 is for what does not count.
    """
    shapes = {n: jax.tree.map(lambda x: tuple(x.shape), batch) for n, batch in batches.items()}
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

    def filled(array: Any, shape: Any) -> np.ndarray:
        return np.pad(array, [(0, more) for more in np.subtract(shape, np.shape(array))])

    return {
        name: {key: filled(array, largest[key]) for key, array in batch.items()}
        for name, batch in batches.items()
    }
