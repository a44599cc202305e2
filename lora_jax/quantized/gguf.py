"""Reads the blocks of GGUF files as codes, scales and minima; W is bitwise equal to gguf's.

A tensor of a file is [out, in] (rows first, or of more axes), with blocks along its last axis.
Each reader below takes the bytes of blocks, uint8 [n_blocks, bytes], and returns the arrays of a
`Coded`, each [n_blocks, …].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.quantized.coded import Coded
from lora_jax.quantized.formats import Q4_0, Q4_1, Q4_K, Q6_K, Q8_0, Format

Arrays = dict[str, np.ndarray]


def _view_as_fp16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)


def _unpack_nibbles(raw: np.ndarray) -> np.ndarray:
    """Returns the low halves of the bytes of a block, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _as_int4_codes(codes: np.ndarray) -> np.ndarray:
    """Returns codes of 0 to 15 minus 8, as this package stores them."""
    return (codes.astype(np.int8) - np.int8(8)).astype(ml_dtypes.int4)


def _read_q4_0(blocks: np.ndarray) -> Arrays:
    return {
        "codes": _as_int4_codes(_unpack_nibbles(blocks[:, 2:])),
        "scales": _view_as_fp16(blocks[:, :2]),
    }


def _read_q4_1(blocks: np.ndarray) -> Arrays:
    scales, mins = _view_as_fp16(blocks[:, :2]), _view_as_fp16(blocks[:, 2:4])
    return {"codes": _as_int4_codes(_unpack_nibbles(blocks[:, 4:])), "scales": scales, "mins": mins}


def _read_q8_0(blocks: np.ndarray) -> Arrays:
    return {"codes": blocks[:, 2:].view(np.int8), "scales": _view_as_fp16(blocks[:, :2])}


def _read_q4_k(blocks: np.ndarray) -> Arrays:
    """Reads eight blocks of 32, whose scales and minima are 6-bit multiples of two fp16 numbers."""
    scale_unit = _view_as_fp16(blocks[:, :2]).astype(np.float32)
    min_unit = _view_as_fp16(blocks[:, 2:4]).astype(np.float32)
    # Of the last four blocks, the low four bits stand in `high`, and the upper two beside the
    # numbers of the first four blocks.
    scales, mins, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scales & 63, (high & 15) | (scales >> 6 << 4)], axis=-1)
    mins = np.concatenate([mins & 63, (high >> 4) | (mins >> 6 << 4)], axis=-1)
    codes = _unpack_nibbles(blocks[:, 16:].reshape(len(blocks), 4, 32)).reshape(len(blocks), 256)
    return {
        "codes": _as_int4_codes(codes),
        "scales": scale_unit * scales.astype(np.float32),
        "mins": -(min_unit * mins.astype(np.float32)),
    }


def _read_q6_k(blocks: np.ndarray) -> Arrays:
    """Reads sixteen blocks of 16, whose codes are split into four low and two high bits."""
    n_blocks = len(blocks)
    low_bits = _unpack_nibbles(blocks[:, :128].reshape(n_blocks, 2, 64))  # [n_blocks, 2, 128]
    packed_bits = blocks[:, 128:192].reshape(n_blocks, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high_bits = (packed_bits >> shifts & np.uint8(3)).reshape(n_blocks, 2, 128)
    codes = (low_bits | high_bits << 4).astype(np.int8).reshape(n_blocks, 256) - np.int8(32)
    scales = _view_as_fp16(blocks[:, 208:]).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return {"codes": codes, "scales": scales}


class _BlockType(NamedTuple):
    """A GGUF tensor type: its format, its block size, and the function that reads its bytes."""

    format: Format
    block_weights: int
    block_bytes: int
    read: Callable[[np.ndarray], Arrays]


_TYPES = {
    "Q4_0": _BlockType(format=Q4_0, block_weights=32, block_bytes=18, read=_read_q4_0),
    "Q4_1": _BlockType(format=Q4_1, block_weights=32, block_bytes=20, read=_read_q4_1),
    "Q8_0": _BlockType(format=Q8_0, block_weights=32, block_bytes=34, read=_read_q8_0),
    "Q4_K": _BlockType(format=Q4_K, block_weights=256, block_bytes=144, read=_read_q4_k),
    "Q6_K": _BlockType(format=Q6_K, block_weights=256, block_bytes=210, read=_read_q6_k),
}
TYPES = tuple(_TYPES)


def from_gguf(
    data: np.ndarray, kind: str, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Coded:
    """Returns a GGUF tensor as NumPy codes, in the file's order of axes.

    A loader may move the axes of all these arrays alike: ``jax.tree.map(lambda array: array.T,
    coded)``. It must not cut the last axis.

    Args:
      data: the tensor's bytes, as `gguf.GGUFReader` gives them: uint8, of any shape.
      kind: the name of its type, one of `TYPES`.
      shape: shape of the tensor, rows first: [out, in].
      dtype: dtype of W. For fp32, W is the array that `gguf.dequantize` returns.

    Raises:
      ValueError: the type is another one, or the bytes are not those of a tensor of this shape.
    """
    if kind not in _TYPES:
        raise ValueError(
            f"from_gguf: weights of type {kind} cannot stay quantized, only those of "
            f"{', '.join(TYPES)}. Dequantize them."
        )
    block_type = _TYPES[kind]
    n_blocks = int(np.prod(shape)) // block_type.block_weights
    if shape[-1] % block_type.block_weights or data.nbytes != n_blocks * block_type.block_bytes:
        raise ValueError(
            f"from_gguf: a {kind} tensor of shape {tuple(shape)} does not have {data.nbytes} "
            f"bytes. Its rows consist of blocks of {block_type.block_weights} weights in "
            f"{block_type.block_bytes} bytes."
        )
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(n_blocks, block_type.block_bytes)
    arrays = {
        name: np.ascontiguousarray(array).reshape(*shape[:-1], -1)
        for name, array in block_type.read(blocks).items()
    }
    return Coded(arrays, block_type.format, np.dtype(dtype))
