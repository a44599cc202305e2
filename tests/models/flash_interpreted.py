"""Flash attention by its programs in Triton's language, interpreted, against dense attention.

A process of its own (`TRITON_INTERPRET=1`): Triton decides at its import whether it interprets. It
reads names of `PROOFS`, a line each, and answers each with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cases.attention import AttentionShape
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.kernels import flash, flash_call
from lora_jax.models.layers.kernels.flash import Flash
from tests.models.test_splash import MASKS, differentiated
from tests.support import draw

FLASH = Flash(queries=32, keys=16)
PACKED = AttentionShape(
    60, packed=True, padding="right", window=30, cap=1.5, kv_heads=1, group=3, sinks=True
)
BRANCHED = AttentionShape(
    60, branched=True, packed=True, padding="right", kv_heads=1, group=3, sinks=True
)
NARROW = AttentionShape(50, window=20, padding="left", kv_heads=1, group=2)


def _of_mask(case: AttentionShape, some: bool | None = None) -> tuple[Any, Any]:
    want = differentiated(case, "dense", some)
    assert all(np.abs(x).max() > 1e-2 for x in want)
    return differentiated(case, FLASH, some), want


def _of_completions() -> tuple[Any, Any]:
    got, want = _of_mask(BRANCHED)
    apart = differentiated(dataclasses.replace(BRANCHED, branched=False), FLASH)
    assert np.abs(apart[0] - want[0]).max() > 0.1, "the control: completions see each other"
    return got, want


def _of_sums() -> tuple[Any, Any]:
    """Sums of weights and their gradient, against scores that are written out."""
    case = dataclasses.replace(BRANCHED, padding=None)
    mask, arrays, cotangent = case.mask(), case.arrays(), draw(4, (2, 60, 3))

    def written_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bshd,btd->bsht", q, k[:, :, 0]) * 7**-0.5
        seen = mask.visible()[:, :, None]
        return jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)

    def kernel(*arrays: jax.Array) -> jax.Array:
        return FLASH.compute_with_sums(AttentionInputs(*arrays, mask))[1]

    def gradient(run: Any) -> Any:
        def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum((sums := run(*arrays)) * cotangent), sums

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    ((_, got), of_got), ((_, want), of_want) = jax.jit(
        lambda *arrays: [gradient(run)(*arrays) for run in (kernel, written_out)]
    )(*arrays)
    assert np.ptp(want) > 1 and np.abs(of_want[1]).max() > 1e-2
    return (got, of_got), (want, of_want)


PROOFS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "packed, padded, a window, capped": functools.partial(_of_mask, PACKED),
    "bidirectional": functools.partial(
        _of_mask, AttentionShape(40, causal=False, padding="left", kv_heads=2, group=2)
    ),
    "a prompt and its completions": _of_completions,
    "sums of weights": _of_sums,
    "a layer with a window": functools.partial(_of_mask, NARROW, True),
    "a layer without": functools.partial(_of_mask, NARROW, False),
    **{f"long: {name}": functools.partial(_of_mask, *case) for name, case in MASKS.items()},
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


def run_interpreted(*operands: jax.Array, name: str, options: Any) -> Any:
    """Runs a program of `flash_triton` on the host; what it does not write is NaN."""
    from lora_jax.models.layers.kernels import flash_triton

    results = flash_call._result_shapes(name, *operands[6:8])
    kernel, grid, sizes = flash_triton.program_of(name, options, operands)

    def run(*arrays: Any) -> list[np.ndarray]:
        given = [np.ascontiguousarray(x) for x in arrays]
        made = [np.full(x.shape, np.nan, x.dtype) for x in results]
        kernel[grid](*map(Memory, given + made), **sizes)
        return made

    return jax.pure_callback(run, results, *operands)


def largest_difference(got: Any, want: Any) -> float:
    """Returns max|Δ| / max(1, max|want|), the largest of all leaves; NaN where a leaf has one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return float(np.max([np.abs(x - y).max() / max(1, np.abs(y).max()) for x, y in pairs]))


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    patch = pytest.MonkeyPatch()
    patch.setattr(flash_call, "_run_triton", run_interpreted)
    patch.setattr(flash, "missing_compiler", lambda: None)
    for line in sys.stdin:
        try:
            answer: Any = largest_difference(*PROOFS[line.strip()]())
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
