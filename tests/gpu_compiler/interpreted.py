"""Attention by the programs in Triton's language, interpreted, against dense attention.

A process of its own (`TRITON_INTERPRET=1`): Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from lora_jax.models.layers.kernels import flash_call, flash_triton
from lora_jax.models.layers.kernels.flash import Flash
from tests.models.test_attention import Case
from tests.models.test_flash import BRANCHED
from tests.models.test_splash import differentiated

NARROW = Case(50, window=20, padding="left", kv_heads=1, group=2)
CASES = {
    "packed": (
        Case(60, packed=True, padding="right", window=30, cap=1.5, kv_heads=1, group=3, sinks=True),
        None,
    ),
    "bidirectional": (Case(40, causal=False, padding="left", kv_heads=2, group=2), None),
    "a layer with a window": (NARROW, True),
    "a layer without": (NARROW, False),
    "a prompt and completions": (dataclasses.replace(BRANCHED, seq=60), None),
}


class Memory:
    """An array as Triton's interpreter takes one, which expects torch's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, array.dtype
        self.data_ptr = lambda: array.ctypes.data

    def same(self, *_: Any, **__: Any) -> Memory:
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = same

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    stride = size


def run_interpreted(*operands: jax.Array, name: str, how: Any) -> Any:
    """Runs a program of `flash_triton` on the host; what it does not write is NaN."""
    results = flash_call._results(name, *operands[6:8])
    kernel, grid, sizes = flash_triton.program_of(name, how, operands)

    def run(*arrays: Any) -> list[np.ndarray]:
        given = [np.ascontiguousarray(x) for x in arrays]
        made = [np.full(x.shape, np.nan, x.dtype) for x in results]
        kernel[grid](*map(Memory, given + made), **sizes)
        return made

    return jax.pure_callback(run, results, *operands)


def main() -> None:
    """Prints the largest difference of each mask's values and gradients."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    flash_call._backend = lambda: flash_call._Backend(run_interpreted)  # type: ignore[assignment]
    flash_call._BEFORE_IT = False
    for name, (case, some) in CASES.items():
        want = differentiated(case, "dense", some)
        got = differentiated(case, Flash(queries=32, keys=16), some)
        apart = [
            np.abs(x - y).max() / max(1, np.abs(y).max()) for x, y in zip(got, want, strict=True)
        ]
        print(f"{name}: {max(map(float, apart)):.2e}")


if __name__ == "__main__":
    main()
