"""Formats: the conversion of scaled weights to codes, and of codes to values.

A block of weights w shares a scale s. Its codes c stand for the values v(c), and W = s·v(c) (+ m,
where a format has a minimum for each block). A format is an entry of the table below: to add one,
write a `Format` and give it to `quantize` or `encode`; one with powers of two as scales is

    def power_of_two(absmax):                              # of a block, for values up to 6
        return jnp.exp2(jnp.floor(jnp.log2(absmax)) - 2)

    own = Format("own", jnp.float4_e2m1fn, block=32, scale_of=power_of_two,
                 scale_dtype=jnp.float8_e8m0fnu)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# NormalFloat of 4 bits (Dettmers et al., arXiv 2305.14314, appendix E), as bitsandbytes has it.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BOUNDS = [  # halfway between neighbours, in fp32
    float((np.float32(low) + np.float32(high)) / np.float32(2))
    for low, high in zip(NF4_VALUES, NF4_VALUES[1:], strict=False)
]


def to_nf4(scaled: jax.Array) -> jax.Array:
    """Returns the index of the nearest of the 16 values, minus 8; ties take the lower value."""
    code = jnp.full(scaled.shape, -8, jnp.int8)
    for bound in _BOUNDS:
        code += (scaled > bound).astype(jnp.int8)
    return code.astype(jnp.int4)


def from_nf4(codes: jax.Array) -> jax.Array:
    """Returns the values of codes by a tree of selects, which XLA fuses."""
    codes = codes.astype(jnp.int8)
    values_by_bits = NF4_VALUES[8:] + NF4_VALUES[:8]  # 0…7, -8…-1
    candidates: list[jax.Array] = [jnp.float32(value) for value in values_by_bits]
    zero = jnp.int8(0)
    for bit in range(4):  # few operations: a TPU that decodes few rows waits for them
        is_set = codes & jnp.int8(1 << bit) != zero if bit < 3 else codes < zero
        pairs = zip(candidates[::2], candidates[1::2], strict=True)
        candidates = [jnp.where(is_set, high, low) for low, high in pairs]
    value: jax.Array = candidates[0]
    return value


def from_unsigned(codes: jax.Array) -> jax.Array:
    """Returns the values 0 to 15 of codes that are stored minus 8."""
    return codes.astype(jnp.float32) + 8


def from_bits(dtype: DTypeLike) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that converts the bits of 8-bit floats, uint8, to fp32.

    A compiler without such floats would cast a whole stack of them before its layers are read.

    Args:
      dtype: dtype of the 8-bit floats.
    """
    return lambda codes: codes.view(dtype).astype(jnp.float32)


def from_e2m1(codes: jax.Array) -> jax.Array:
    """Returns the values of E2M1's bits, kept as int4: ±0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class Format:
    """The definition of a quantized format.

    Attributes:
      name: its name.
      code_dtype: dtype of the codes; one of 4 bits is packed on accelerators, and sliced along any
        axis (int4 rather than uint4, which Orbax cannot save).
      block: the number of weights along the contracted axis that share a scale.
      top: the largest value of a code, which the largest weight of a block gets.
      to_codes: scaled weights, fp32 in [-top, top] -> codes; by default rounds to the dtype's.
      to_values: codes -> values, fp32; by default a cast.
      scale_of: the largest magnitude of a block -> its scale; by default divides by `top`.
      scale_dtype: dtype of the scales.
      scale_table: the fp32 values of scales that are codes, uint8; None for other scales.
      double: whether the scales themselves are stored as int8 (double quantisation): steps from
        the mean of their column, a step for each 256 of them.
      partial: whether blocks have this size along every axis that has several, the last block of an
        axis perhaps fewer weights; otherwise, all blocks of an axis are of one size.
    """

    name: str
    code_dtype: DTypeLike
    block: int = 64
    top: float = 1.0
    to_codes: Callable[[jax.Array], jax.Array] | None = None
    to_values: Callable[[jax.Array], jax.Array] | None = None
    scale_of: Callable[[jax.Array], jax.Array] | None = None
    scale_dtype: DTypeLike = jnp.float32
    double: bool = False
    partial: bool = False
    scale_table: tuple[float, ...] | None = None

    def span(self, size: int, n_blocks: int) -> int:
        """Returns the block size along an axis, given the sizes of W and of its scales.

        >>> lj.quantized.FORMATS["fp8"].span(576, 5)
        128
        """
        if self.partial and 1 < n_blocks < size:
            return self.block
        return size // n_blocks if n_blocks else 1

    def codes(self, scaled: jax.Array) -> jax.Array:
        """Returns the codes of scaled fp32 weights."""
        if self.to_codes is not None:
            return self.to_codes(scaled)
        if jnp.issubdtype(self.code_dtype, jnp.integer):
            scaled = jnp.clip(jnp.round(scaled), -self.top, self.top).astype(jnp.int8)
        return scaled.astype(self.code_dtype)

    def values(self, codes: jax.Array) -> jax.Array:
        """Returns the fp32 values that codes stand for."""
        return codes.astype(jnp.float32) if self.to_values is None else self.to_values(codes)

    def scales(self, absmax: jax.Array) -> jax.Array:
        """Returns the fp32 scales of blocks from their largest magnitudes."""
        if self.scale_of is None:
            scales = absmax / jnp.float32(self.top)
        else:
            scales = self.scale_of(absmax)
        scales_fp32: jax.Array = scales.astype(jnp.float32)
        return scales_fp32

    def __repr__(self) -> str:
        return f"Format({self.name!r})"


INT8 = Format("int8", jnp.int8, top=127)
INT4 = Format("int4", jnp.int4, top=7)
NF4 = Format("nf4", jnp.int4, to_codes=to_nf4, to_values=from_nf4)
NF4_DOUBLE = dataclasses.replace(NF4, name="nf4-double", double=True)

# Blocks of GGUF files, read by `lora_jax.quantized.gguf`; q4_1 and q4_k have minima, too.
Q8_0 = Format("q8_0", jnp.int8, block=32, top=127, scale_dtype=jnp.float16)
Q4_0 = Format("q4_0", jnp.int4, block=32, top=7, scale_dtype=jnp.float16)
Q4_1 = Format("q4_1", jnp.int4, block=32, to_values=from_unsigned, scale_dtype=jnp.float16)
Q4_K = Format("q4_k", jnp.int4, block=32, to_values=from_unsigned)
Q6_K = Format("q6_k", jnp.int8, block=16, top=31)

# Codes of published checkpoints, read by `lora_jax.hf.stored`. Files bring nf4-nested's table.
NF4_NESTED = dataclasses.replace(NF4, name="nf4-nested", scale_dtype=jnp.uint8)
FP8 = Format("fp8", jnp.uint8, 128, 448, to_values=from_bits(jnp.float8_e4m3fn), partial=True)
FP8_E5M2 = dataclasses.replace(
    FP8, name="fp8-e5m2", top=57344, to_values=from_bits(jnp.float8_e5m2)
)
MXFP4 = Format("mxfp4", jnp.int4, 32, 6, to_values=from_e2m1, scale_dtype=jnp.uint8)
NVFP4 = Format("nvfp4", jnp.int4, 16, 6, to_values=from_e2m1, scale_dtype=jnp.float8_e4m3fn)

_ENCODED = (INT8, INT4, NF4, NF4_DOUBLE, Q8_0, Q4_0, Q6_K)
_READ = (Q4_1, Q4_K, NF4_NESTED, FP8, FP8_E5M2, MXFP4, NVFP4)
FORMATS = {f.name: f for f in (*_ENCODED, *_READ)}


def format_of(format: "str | Format") -> Format:
    """Returns the format of this name, after a check that weights can be encoded in it.

    Raises:
      ValueError: there is none of that name, or it is only read from files.
    """
    if isinstance(format, str):
        names = [encoded.name for encoded in _ENCODED]
        if format not in names:
            raise ValueError(
                f"format={format!r} is unknown. Choose one of {', '.join(map(repr, names))}, "
                "or give a lora_jax.quantized.Format."
            )
        return FORMATS[format]
    if not isinstance(format, Format):
        raise TypeError(
            f"format={format!r} must be the name of a format or a lora_jax.quantized.Format."
        )
    if format.partial or format in _READ:
        raise ValueError(
            f"format={format!r} can be read from files, but arrays cannot be encoded in it."
        )
    return format
