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
    _, left_shape = computation[op.operands[0]].shapes[0]
    _, right_shape = computation[op.operands[1]].shapes[0]
    if op.opcode == "convolution":
        return _convolution_flops(op, left_shape, right_shape)
    contracted_axes = op.attribute("lhs_contracting_dims")
    if op.opcode == "custom-call":
        match = _CONTRACTED.search(op.text)
        if match is None:
            raise NotUnderstood(f"a call of cuBLAS has no contracted axes: {op.text[:200]}")
        contracted_axes = [int(digits) for digits in re.findall(r"\d+", match[1])]
    _, result_shape = op.shapes[0]
    contracted_size = math.prod(left_shape[axis] for axis in contracted_axes)
    return 2 * math.prod(result_shape) * contracted_size


def _convolution_flops(op: Instruction, input_shape: Shape, kernel_shape: Shape) -> int:
    """Counts two FLOPs for each pair of a kernel element and an input element that it multiplies.

    The TPU compiler writes matrix products as convolutions, and batch axes as spatial axes dilated
    so that each output meets one input. Padding and dilation holes are no work.
    """
    labels = _LABELS.search(op.text)
    if labels is None:
        raise NotUnderstood(f"a convolution has no dim_labels: {op.text[:200]}")
    input_labels, kernel_labels, result_labels = labels.groups()
    _, result_shape = op.shapes[0]
    window = _WINDOW.search(op.text)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    n_pairs = result_shape[result_labels.index("b")] * result_shape[result_labels.index("f")]
    n_pairs *= kernel_shape[kernel_labels.index("i")]
    spatial_labels = sorted(label for label in input_labels if label.isdigit())
    for axis, label in enumerate(spatial_labels):
        # A field has one value for each axis, such as 3x3, or one value for all of them.
        window_axis = {
            name: value.split("x")[axis] if "x" in value else value
            for name, value in fields.items()
        }
        n_pairs *= pairs_along(
            input_shape[input_labels.index(label)],
            kernel_shape[kernel_labels.index(label)],
            result_shape[result_labels.index(label)],
            stride=int(window_axis.get("stride", 1)),
            input_dilation=int(window_axis.get("lhs_dilate", 1)),
            kernel_dilation=int(window_axis.get("rhs_dilate", 1)),
            padding=int(window_axis.get("pad", "0_0").split("_")[0]),
        )
    return 2 * n_pairs


def pairs_along(
    n_in: int,
    n_kernel: int,
    n_out: int,
    *,
    stride: int,
    input_dilation: int,
    kernel_dilation: int,
    padding: int,
) -> int:
    """Counts the pairs (output, kernel element) that meet an input along a spatial axis.

    Args:
      n_in, n_kernel, n_out: the sizes of the axis.
      stride: the window stride.
      input_dilation, kernel_dilation: dilations; 1 for none.
      padding: the padding before the first input.

    Returns:
      The number of pairs; padding and dilation holes are not inputs.
    """
    window_starts = np.arange(n_out)[:, None] * stride - padding
    positions = window_starts + np.arange(n_kernel) * kernel_dilation  # [out, kernel]
    is_inside = (positions >= 0) & (positions < n_in * input_dilation)
    is_input = positions % input_dilation == 0
    return int(np.sum(is_inside & is_input))
