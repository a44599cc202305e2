"""Counts the FLOPs of products and convolutions, and of kernels, in optimised HLO."""

import math
import re

import numpy as np

from train.plan.hlo.kernels import TARGETS, KernelCall
from train.plan.hlo.module import Computation, Instruction, NotUnderstood, Shape, operand_arrays

_PRODUCTS = ("dot", "convolution")
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")  # of targets
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_KERNEL = re.compile(r'\bname = "([^"]*)"')  # of Triton's; the TPU's name their instructions
_IN_SCOPE = re.compile(r"([\w.\-]+)/triton_kernel_call\b")  # `jax_triton`'s stand in a scope
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def kernel_call(op: Instruction, computation: Computation) -> KernelCall | None:
    """Returns the kernel that an instruction calls; None if it calls none."""
    if op.target not in TARGETS:
        return None
    name = _KERNEL.search(op.text) or _IN_SCOPE.search(op.op_name)
    arrays = operand_arrays(op, computation)
    return KernelCall(name[1] if name else op.name, op.op_name, arrays)


def is_product(op: Instruction) -> bool:
    """Returns True for products and convolutions, and for the calls of cuBLAS that compute them."""
    return op.opcode in _PRODUCTS or op.target in _CUBLAS


def product_flops(op: Instruction, computation: Computation) -> int:
    """Counts two FLOPs for each multiplication of a product or a convolution."""
    (_, left), (_, right) = (computation[name].shapes[0] for name in op.operands[:2])
    if op.opcode == "convolution":
        return _convolution_flops(op, left, right)
    axes = op.attribute("lhs_contracting_dims")
    if op.opcode == "custom-call":
        match = _CONTRACTED.search(op.text)
        if match is None:
            raise NotUnderstood(f"a call of cuBLAS without contracted axes: {op.text[:200]}")
        axes = [int(n) for n in re.findall(r"\d+", match[1])]
    return 2 * math.prod(op.shapes[0][1]) * math.prod(left[axis] for axis in axes)


def _convolution_flops(op: Instruction, left: Shape, right: Shape) -> int:
    """Counts two FLOPs for each pair of a kernel element and an input element that it multiplies.

    The TPU compiler writes matrix products as convolutions, and batch axes as spatial axes dilated
    so that each output meets one input. Padding and dilation holes are no work.
    """
    labels = _LABELS.search(op.text)
    if labels is None:
        raise NotUnderstood(f"a convolution without dim_labels: {op.text[:200]}")
    of_left, of_right, of_result = labels.groups()
    result = op.shapes[0][1]
    window = _WINDOW.search(op.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    total = result[of_result.index("b")] * result[of_result.index("f")]
    total *= right[of_right.index("i")]
    for axis, label in enumerate(sorted(c for c in of_left if c.isdigit())):
        along = {
            name: value.split("x")[axis] if "x" in value else value
            for name, value in fields.items()
        }
        total *= pairs_along(
            left[of_left.index(label)],
            right[of_right.index(label)],
            result[of_result.index(label)],
            stride=int(along.get("stride", 1)),
            hole=int(along.get("lhs_dilate", 1)),
            spread=int(along.get("rhs_dilate", 1)),
            before=int(along.get("pad", "0_0").split("_")[0]),
        )
    return 2 * total


def pairs_along(
    n_in: int, n_kernel: int, n_out: int, *, stride: int, hole: int, spread: int, before: int
) -> int:
    """Counts the pairs (output, kernel element) that meet an input along a spatial axis.

    Args:
      n_in, n_kernel, n_out: the sizes of the axis.
      stride: the window stride.
      hole: the dilation of the input; 1 for none.
      spread: the dilation of the kernel; 1 for none.
      before: the padding before the first input.

    Returns:
      The number of pairs; padding and dilation holes are not inputs.
    """
    place = np.arange(n_out)[:, None] * stride + np.arange(n_kernel) * spread - before
    return int(np.sum((place >= 0) & (place % hole == 0) & (place < n_in * hole)))
