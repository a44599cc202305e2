"""The FLOPs of kernels by name, because neither XLA nor a jaxpr states them.

A kernel is a `pallas_call` in a jaxpr, and a custom call in HLO. `KERNELS` is the table; a kernel
that it does not list counts nothing, and plans name it.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lora_jax.models.layers.kernels.splash_backward import KERNEL_NAME as SPLASH_GRADIENTS
from train.plan.hlo.module import bytes_of_arrays
from train.plan.machines import KERNEL_SHARE

Array = tuple[str, tuple[int, ...]]  # (dtype, shape), the dtype as HLO writes it: "bf16"

FLOPS_PER_CYCLE = 2**17  # of a v5e's matrix units
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
      fills_units: whether matrix units limit the kernel. Then `cycles` are those of a v5e, and
        another device takes as much less time as its peak is higher.
    """

    label: str
    part: str
    flops: Callable[[KernelCall], int]
    unread: Callable[[KernelCall], int] = lambda _: 0
    cycles: Callable[[KernelCall], float] | None = None
    fills_units: bool = False


def kernel_of(call: KernelCall) -> KernelWork | None:
    """Returns the table entry with the longest name that the called kernel's name starts with."""
    prefixes = [prefix for prefix in KERNELS if call.name.startswith(prefix)]
    return KERNELS[max(prefixes, key=len)] if prefixes else None


def kernel_flops(call: KernelCall) -> int:
    """Counts the FLOPs of a call; 0 for a kernel that is not listed."""
    kernel = kernel_of(call)
    return 0 if kernel is None else kernel.flops(call)


def kernel_lines(calls: Iterable[KernelCall]) -> tuple[str, ...]:
    """Returns the kernels of a program as text, such as "splash (fwd, dq, dkv)".

    A kernel that the table does not list has its own name.
    """
    parts_of_label: dict[str, set[str]] = {}
    for call in calls:
        kernel = kernel_of(call)
        if kernel is None:
            unlisted_name = re.sub(r"[.\d]+$", "", call.name)
            parts_of_label.setdefault(unlisted_name, set())
        else:
            parts_of_label.setdefault(kernel.label, set()).add(kernel.part)
    part_order = [kernel.part for kernel in KERNELS.values()]
    lines: list[str] = []
    for label, parts in sorted(parts_of_label.items()):
        part_list = ", ".join(sorted(parts, key=part_order.index))
        lines.append(f"{label} ({part_list})" if parts else label)
    return tuple(lines)


def unlisted_kernels(calls: Iterable[KernelCall]) -> tuple[str, ...]:
    """Returns the names of kernels with unknown FLOPs."""
    return kernel_lines(call for call in calls if kernel_of(call) is None)


# Attention

_VISITED = re.compile(r"blocks_(\d+)(?:_or_(\d+))?_of_(\d+)")
_WINDOWED = re.compile(r"windowed_(\d+)_of_(\d+)")


def _attention_flops(n_products: int, token_axis: int = -2) -> Callable[[KernelCall], int]:
    """Returns the FLOP counter of an attention kernel with `n_products` products per block.

    Its first two floating operands are queries and keys, with their tokens on the axis
    `token_axis`. The scope says how many of all blocks the mask leaves (see
    `lora_jax.models.layers.kernels.splash`). Where that depends on the layer, a call counts as the
    mean of all layers.
    """

    def flops(call: KernelCall) -> int:
        query_shape, key_shape, *_ = _floating_shapes(call.operands)
        score_size = math.prod(query_shape) * key_shape[token_axis]
        return round(2 * n_products * score_size * _visited_block_share(call.scope))

    return flops


def _visited_block_share(scope: str) -> float:
    """Returns the share of blocks that a mask does not skip; 1 if the scope has no share."""
    blocks = _VISITED.search(scope)
    if blocks is None:
        return 1.0
    visited_blocks = int(blocks[1])
    n_blocks = int(blocks[3])
    layers = _WINDOWED.search(scope)
    if blocks[2] is None or layers is None:  # the mask is the same in all layers
        return visited_blocks / n_blocks
    windowed_blocks = int(blocks[2])
    n_windowed = int(layers[1])
    n_layers = int(layers[2])
    total_visited = visited_blocks * (n_layers - n_windowed) + windowed_blocks * n_windowed
    return total_visited / (n_layers * n_blocks)


def _floating_shapes(operands: Sequence[Array]) -> list[tuple[int, ...]]:
    """Returns the shapes of floating-point operands."""
    return [shape for dtype, shape in operands if dtype.startswith(("f", "bf"))]


# The backward pass of splash attention as one kernel, by the compiler's schedule on v5e.
_GRADIENT_BLOCK = 512 * 512  # queries times keys
_GRADIENT_CYCLES = 2700  # of a block and 128 features of a head, or fewer
_gradient_flops = _attention_flops(5)  # q k^T, p^T do, do v^T, ds^T q, ds k


def _gradient_cycles(call: KernelCall) -> float:
    """Returns the cycles of a backward pass, at the share of the peak that others reach at most.

    A schedule has no waits. So the kernel's price is never below that of JAX's attention kernels.
    """
    query_shape, key_shape, *_ = _floating_shapes(call.operands)
    n_scores = math.prod(query_shape[:-1]) * key_shape[-2]
    n_blocks = n_scores * _visited_block_share(call.scope) / _GRADIENT_BLOCK
    scheduled = _GRADIENT_CYCLES * n_blocks * math.ceil(query_shape[-1] / 128)
    return max(scheduled, _gradient_flops(call) / (KERNEL_SHARE * FLOPS_PER_CYCLE))


# Products of the rows of groups (`jax.lax.ragged_dot`)


_GROUPED_ROWS = re.compile(r"rows_(\d+)_of_(\d+)")


def grouped_share(scope: str) -> float:
    """Returns the share of rows that belong to a group; 1 if the scope has no share.

    Kernels skip the other rows; see `lora_jax.models.decoder.dispatch`.
    """
    rows = _GROUPED_ROWS.search(scope)
    return int(rows[1]) / int(rows[2]) if rows else 1.0


def _ragged_dot_flops(call: KernelCall) -> int:
    """Counts the FLOPs of a grouped product, in which each row belongs to at most one group.

    The last operands are rows, [m, k], and kernels, [groups, …], or, for their gradient, the rows
    of a cotangent, [m, n].
    """
    row_shape, other_shape = _floating_shapes(call.operands)[-2:]
    n_rows, row_width = row_shape
    has_kernels = len(other_shape) == 3
    kernel_size = math.prod(other_shape[1:]) if has_kernels else row_width * other_shape[1]
    return round(2 * n_rows * grouped_share(call.scope) * kernel_size)


# Products of few rows with a layer of a stack of codes (`lora_jax.quantized.rows`)


def _shapes_of_rows_and_codes(call: KernelCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of rows, [rows, in], and of quantized kernels, [layers, in, out]."""
    shapes = [shape for _, shape in call.operands]
    row_shapes = [shape for shape in shapes if len(shape) == 2]
    stack_shapes = [shape for shape in shapes if len(shape) == 3]
    return row_shapes[0], stack_shapes[0]


def _rows_flops(call: KernelCall) -> int:
    row_shape, stack_shape = _shapes_of_rows_and_codes(call)
    layer_size = math.prod(stack_shape[1:])
    return 2 * row_shape[0] * layer_size


def _bytes_of_other_layers(call: KernelCall) -> int:
    """Returns the bytes of the stacked layers that a call does not read."""
    stacks = [(dtype, shape) for dtype, shape in call.operands if len(shape) == 3]
    layers = [(dtype, shape[1:]) for dtype, shape in stacks]
    return bytes_of_arrays(stacks) - bytes_of_arrays(layers)


def _cycles_for_weights(cycles_per_1024: float) -> Callable[[KernelCall], float]:
    """Returns the cycle counter of a kernel that dequantizes W, from cycles per 1,024 weights."""

    def cycles(call: KernelCall) -> float:
        _, stack_shape = _shapes_of_rows_and_codes(call)
        return cycles_per_1024 * math.prod(stack_shape[1:]) / 1024

    return cycles


# Cycles for 1,024 weights, by the compiler's schedule of a tile on v5e (its "final bundles").
_CAST_CYCLES = 1.2
_TABLE_CYCLES = 3.8


def _coded_rows_kernel(part: str, cycles_per_1024: float) -> KernelWork:
    """Returns the table entry of a kernel that multiplies few rows by a quantized kernel."""
    return KernelWork(
        label="few rows by codes",
        part=part,
        flops=_rows_flops,
        unread=_bytes_of_other_layers,
        cycles=_cycles_for_weights(cycles_per_1024),
    )


# Ragged products with a layer of quantized experts (`lora_jax.quantized.ragged`)

_DECODE_CYCLES = 3.2  # for 1,024 weights, by the compiler's schedule on v5e
_LOOK_UP_CYCLES = 5.2  # for 1,024 weights whose values are in a table
_SCHEDULE_OVERHEAD = 1.05  # of loops, and of the padding of tiles
_BLOCK_ROWS = 64  # rows that are multiplied at a time, if one of them belongs to an expert


def _coded_ragged_shapes(call: KernelCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of rows, [rows, width], and of kernels, [layers, experts, in, out]."""
    shapes = [shape for _, shape in call.operands]
    (stack_shape,) = [shape for shape in shapes if len(shape) == 4]
    row_shape = next(shape for shape in shapes if len(shape) == 2)  # before a table
    return row_shape, stack_shape


def _coded_ragged_flops(call: KernelCall) -> int:
    row_shape, stack_shape = _coded_ragged_shapes(call)
    return 2 * row_shape[0] * math.prod(stack_shape[2:])


def _coded_ragged_cycles(cycles_per_1024: float) -> Callable[[KernelCall], float]:
    """Returns the counter of the cycles of decoding each kernel once, and of blocks of rows."""

    def cycles(call: KernelCall) -> float:
        (n_rows, _), (_, n_experts, n_in, n_out) = _coded_ragged_shapes(call)
        decoding = cycles_per_1024 * n_experts * n_in * n_out / 1024
        n_multiplied_rows = n_rows + n_experts * _BLOCK_ROWS
        flops = 2 * n_multiplied_rows * n_in * n_out
        return decoding + _SCHEDULE_OVERHEAD * flops / FLOPS_PER_CYCLE

    return cycles


def _coded_ragged_kernel(part: str, cycles_per_1024: float) -> KernelWork:
    """Returns the table entry of a kernel that multiplies sorted rows by quantized experts."""
    return KernelWork(
        label="ragged products by codes",
        part=part,
        flops=_coded_ragged_flops,
        unread=_bytes_of_other_experts,
        cycles=_coded_ragged_cycles(cycles_per_1024),
    )


def _bytes_of_other_experts(call: KernelCall) -> int:
    """Returns the bytes of the other layers in the stack, which a call does not read."""
    stacks = [(dtype, shape) for dtype, shape in call.operands if len(shape) == 4]
    layers = [(dtype, shape[1:]) for dtype, shape in stacks]
    return bytes_of_arrays(stacks) - bytes_of_arrays(layers)


# The beginning of a kernel's name -> its entry.
KERNELS: dict[str, KernelWork] = {
    # q k^T, p v; q k^T, do v^T, ds k; q k^T, p^T do, do v^T, ds^T q.
    "splash_mha_fwd": KernelWork("splash attention", "fwd", _attention_flops(2)),
    "splash_mha_dq": KernelWork("splash attention", "dq", _attention_flops(3)),
    "splash_mha_dkv": KernelWork("splash attention", "dkv", _attention_flops(4)),
    SPLASH_GRADIENTS: KernelWork(
        label="splash attention",
        part="bwd",
        flops=_gradient_flops,
        cycles=_gradient_cycles,
        fills_units=True,
    ),
    "flash_fwd": KernelWork("flash attention", "fwd", _attention_flops(2, -3)),
    "flash_dq": KernelWork("flash attention", "dq", _attention_flops(3, -3)),
    "flash_dkv": KernelWork("flash attention", "dkv", _attention_flops(4, -3)),
    "coded_rows": _coded_rows_kernel("cast", _CAST_CYCLES),
    "coded_rows_by_table": _coded_rows_kernel("by table", _TABLE_CYCLES),
    "coded_ragged": _coded_ragged_kernel("cast", _DECODE_CYCLES),
    "coded_ragged_by_table": _coded_ragged_kernel("by table", _LOOK_UP_CYCLES),
    "ragged-dot": KernelWork("ragged products", "rows", _ragged_dot_flops),
    "ragged-dot-metadata": KernelWork("ragged products", "groups", lambda _: 0),
}
