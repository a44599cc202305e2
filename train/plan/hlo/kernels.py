"""The FLOPs of kernels, by name: neither XLA nor a jaxpr states the work of a kernel.

A kernel is a `pallas_call` in a jaxpr, and a custom call in HLO. `KERNELS` is the table; a kernel
that it does not list counts nothing, and plans name it.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from train.plan.hlo.module import size_of

Array = tuple[str, tuple[int, ...]]  # (dtype, shape), the dtype as HLO writes it: "bf16"

# Targets of custom calls that are kernels; XLA's own helpers have others.
TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi")


class KernelCall(NamedTuple):
    """One call of a kernel on one device.

    Attributes:
      name: the kernel's name, which may end in a number.
      scope: the names of the scopes that the call stands in, as HLO and name stacks have them.
      operands: the arrays that it is given, in order.
    """

    name: str
    scope: str
    operands: tuple[Array, ...]


class KernelWork(NamedTuple):
    """An entry of the table of kernels.

    Attributes:
      label: the computation that it is a part of, for tables.
      part: which part.
      flops: counts the FLOPs of a call.
      unread: counts the bytes of operands that a call does not read.
      cycles: counts the cycles of a call, of a kernel whose FLOPs do not say what it takes.
    """

    label: str
    part: str
    flops: Callable[[KernelCall], int]
    unread: Callable[[KernelCall], int] = lambda _: 0
    cycles: Callable[[KernelCall], float] | None = None


def kernel_of(call: KernelCall) -> KernelWork | None:
    """Returns the entry of a call's kernel: the longest name that its own begins with."""
    found = [name for name in KERNELS if call.name.startswith(name)]
    return KERNELS[max(found, key=len)] if found else None


def kernel_flops(call: KernelCall) -> int:
    """Counts the FLOPs of a call; 0 for a kernel that is not listed."""
    kernel = kernel_of(call)
    return 0 if kernel is None else kernel.flops(call)


def kernel_lines(calls: Iterable[KernelCall]) -> tuple[str, ...]:
    """Returns the kernels of a program in words: "splash (fwd, dq, dkv)".

    A kernel that the table does not list has its own name.
    """
    parts: dict[str, set[str]] = {}
    for call in calls:
        kernel = kernel_of(call)
        if kernel is None:
            parts.setdefault(re.sub(r"[.\d]+$", "", call.name), set())
        else:
            parts.setdefault(kernel.label, set()).add(kernel.part)
    order = [kernel.part for kernel in KERNELS.values()]
    return tuple(
        f"{label} ({', '.join(sorted(found, key=order.index))})" if found else label
        for label, found in sorted(parts.items())
    )


def unlisted(calls: Iterable[KernelCall]) -> tuple[str, ...]:
    """Returns the names of kernels whose FLOPs are not known."""
    return kernel_lines(call for call in calls if kernel_of(call) is None)


# Attention

_VISITED = re.compile(r"blocks_(\d+)(?:_or_(\d+))?_of_(\d+)")
_WINDOWED = re.compile(r"windowed_(\d+)_of_(\d+)")


def _attention(products: int, tokens: int = -2) -> Callable[[KernelCall], int]:
    """Returns the count of a kernel that does so many products of each block of scores.

    Its first two floating operands are queries and keys, with their tokens on the axis `tokens`.
    The scope says how many of all blocks the mask leaves (see
    `lora_jax.models.layers.kernels.splash`). Where that depends on the layer, a call counts as the
    mean of all layers.
    """

    def flops(call: KernelCall) -> int:
        queries, keys, *_ = _floating(call.operands)
        return round(2 * products * math.prod(queries) * keys[tokens] * _share(call.scope))

    return flops


def _share(scope: str) -> float:
    """Returns the share of blocks that a mask leaves; 1 if the scope does not say."""
    found = _VISITED.search(scope)
    if found is None:
        return 1.0
    visited, blocks = int(found[1]), int(found[3])
    if found[2] and (layers := _WINDOWED.search(scope)):
        windowed, count = int(layers[1]), int(layers[2])
        return (visited * (count - windowed) + int(found[2]) * windowed) / (count * blocks)
    return visited / blocks


def _floating(operands: Sequence[Array]) -> list[tuple[int, ...]]:
    """Returns the shapes of floating-point operands."""
    return [shape for kind, shape in operands if kind.startswith(("f", "bf"))]


# Products of the rows of groups (`jax.lax.ragged_dot`)


def _ragged_dot(call: KernelCall) -> int:
    """Counts each row once, with its own group; a tile that two groups share runs for both.

    The last operands are rows, [m, k], and kernels, [groups, …], or, for their gradient, the rows
    of a cotangent, [m, n].
    """
    (m, k), other = _floating(call.operands)[-2:]
    return 2 * m * (math.prod(other[1:]) if len(other) == 3 else k * other[1])


# Products of few rows with a layer of a stack of codes (`lora_jax.quantized.rows`)


def _rows_and_codes(call: KernelCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of rows, [rows, in], and of codes, [layers, in, out]."""
    rows = next(shape for _, shape in call.operands if len(shape) == 2)
    return rows, next(shape for _, shape in call.operands if len(shape) == 3)


def _rows_flops(call: KernelCall) -> int:
    rows, (_, *layer) = _rows_and_codes(call)
    return 2 * rows[0] * math.prod(layer)


def _other_layers(call: KernelCall) -> int:
    stacks = [array for array in call.operands if len(array[1]) == 3]
    return size_of(stacks) - size_of([(kind, shape[1:]) for kind, shape in stacks])


def _cycles_by_weights(each: float) -> Callable[[KernelCall], float]:
    """Returns the count of a kernel that forms W, by cycles for 1,024 weights."""
    return lambda call: each * math.prod(_rows_and_codes(call)[1][1:]) / 1024


# The cycles are those of the compiler's schedule of a tile on v5e (its "final bundles").
_CAST, _BY_TABLE = 1.2, 3.8

# The beginning of a kernel's name -> its entry.
KERNELS: dict[str, KernelWork] = {
    # q k^T, p v; q k^T, do v^T, ds k; q k^T, p^T do, do v^T, ds^T q.
    "splash_mha_fwd": KernelWork("splash attention", "fwd", _attention(2)),
    "splash_mha_dq": KernelWork("splash attention", "dq", _attention(3)),
    "splash_mha_dkv": KernelWork("splash attention", "dkv", _attention(4)),
    "flash_fwd": KernelWork("flash attention", "fwd", _attention(2, -3)),
    "flash_dq": KernelWork("flash attention", "dq", _attention(3, -3)),
    "flash_dkv": KernelWork("flash attention", "dkv", _attention(4, -3)),
    "coded_rows": KernelWork(
        "few rows by codes", "cast", _rows_flops, _other_layers, _cycles_by_weights(_CAST)
    ),
    "coded_rows_by_table": KernelWork(
        "few rows by codes", "by table", _rows_flops, _other_layers, _cycles_by_weights(_BY_TABLE)
    ),
    "ragged-dot": KernelWork("ragged products", "rows", _ragged_dot),
    "ragged-dot-metadata": KernelWork("ragged products", "groups", lambda _: 0),
}
