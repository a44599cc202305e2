"""Blocks of GGUF files as they are: codes, scales and minima, whose W is bitwise what gguf gives.

A tensor of a file is [out, in] (rows first, or of more axes), with blocks along its last axis.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.quantized.coded import Coded
from lora_jax.quantized.formats import Q4_0, Q4_1, Q4_K, Q6_K, Q8_0, Format

Arrays = dict[str, np.ndarray]


def _fp16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Returns the low halves of the bytes of a block, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _int4(codes: np.ndarray) -> np.ndarray:
    """Returns codes of 0 to 15 less 8, as this package keeps them."""
    return (codes.astype(np.int8) - np.int8(8)).astype(ml_dtypes.int4)


def _q4_0(blocks: np.ndarray) -> Arrays:
    return {"codes": _int4(_nibbles(blocks[:, 2:])), "scales": _fp16(blocks[:, :2])}


def _q4_1(blocks: np.ndarray) -> Arrays:
    scales, mins = _fp16(blocks[:, :2]), _fp16(blocks[:, 2:4])
    return {"codes": _int4(_nibbles(blocks[:, 4:])), "scales": scales, "mins": mins}


def _q8_0(blocks: np.ndarray) -> Arrays:
    return {"codes": blocks[:, 2:].view(np.int8), "scales": _fp16(blocks[:, :2])}


def _q4_k(blocks: np.ndarray) -> Arrays:
    """Eight blocks of 32, whose scales and minima are 6-bit multiples of two fp16 numbers."""
    d, smallest = (_fp16(blocks[:, at : at + 2]).astype(np.float32) for at in (0, 2))
    packed, raw = blocks[:, 4:16], blocks[:, 16:]
    scales, mins, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scales & 63, (high & 15) | (scales >> 6 << 4)], axis=-1)
    mins = np.concatenate([mins & 63, (high >> 4) | (mins >> 6 << 4)], axis=-1)
    codes = _nibbles(raw.reshape(len(blocks), 4, 32)).reshape(len(blocks), 256)
    return {
        "codes": _int4(codes),
        "scales": d * scales.astype(np.float32),
        "mins": -(smallest * mins.astype(np.float32)),
    }


def _q6_k(blocks: np.ndarray) -> Arrays:
    """Sixteen blocks of 16; four low bits of each code, and two high ones elsewhere."""
    n = len(blocks)
    low, high = blocks[:, :128].reshape(n, 2, 64), blocks[:, 128:192].reshape(n, 2, 1, 32)
    low = _nibbles(low)  # [n, 2, 128]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = (high >> shifts & np.uint8(3)).reshape(n, 2, 128)
    codes = (low | upper << 4).astype(np.int8).reshape(n, 256) - np.int8(32)
    scales = _fp16(blocks[:, 208:]).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return {"codes": codes, "scales": scales}


# By the name of a GGUF type: its format, the weights and the bytes of a block, and how it is read.
_Reader = tuple[Format, int, int, Callable[[np.ndarray], Arrays]]
_TYPES: dict[str, _Reader] = {
    "Q4_0": (Q4_0, 32, 18, _q4_0),
    "Q4_1": (Q4_1, 32, 20, _q4_1),
    "Q8_0": (Q8_0, 32, 34, _q8_0),
    "Q4_K": (Q4_K, 256, 144, _q4_k),
    "Q6_K": (Q6_K, 256, 210, _q6_k),
}
TYPES = tuple(_TYPES)


def from_gguf(
    data: np.ndarray, kind: str, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Coded:
    """Returns a tensor of a GGUF file as codes, of NumPy arrays, in the file's order of axes.

    What a loader does to the axes of an array it does to each of these: ``jax.tree.map(lambda
    array: array.T, coded)``; only the last axis has to stay whole.

    Args:
      data: the tensor's bytes, as `gguf.GGUFReader` gives them: uint8, of any shape.
      kind: the name of its type, one of `TYPES`.
      shape: shape of the tensor, rows first: [out, in].
      dtype: that the codes stand for an array of. Of fp32, it is what `gguf.dequantize` returns.

    Raises:
      ValueError: the type is another one, or the bytes are not those of a tensor of this shape.
    """
    if kind not in _TYPES:
        raise ValueError(
            f"from_gguf: {kind} is not kept in codes, only {', '.join(TYPES)}: dequantise it"
        )
    format, weights, size, read = _TYPES[kind]
    n = int(np.prod(shape)) // weights
    if shape[-1] % weights or data.nbytes != n * size:
        raise ValueError(
            f"from_gguf: {data.nbytes} bytes are no {kind} of shape {tuple(shape)}, whose rows are "
            f"blocks of {weights} weights in {size} bytes"
        )
    arrays = read(np.ascontiguousarray(data).view(np.uint8).reshape(n, size))
    lead = tuple(shape[:-1])
    rows = {name: np.ascontiguousarray(array).reshape(*lead, -1) for name, array in arrays.items()}
    return Coded(rows, format, np.dtype(dtype))
