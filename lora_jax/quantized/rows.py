"""A TPU's kernel for products of few rows with codes, as decoding has them: xW.

It is given the whole stack of layers and the index of one. Of that layer it reads the codes tile by
tile, makes W of a tile in the chip's own memory, and multiplies: codes are read once, and no float
of a kernel's size is written. The elements of W are those of `Coded.as_array`, bit by bit.

Values of codes that are no numbers in a row (nf4) are looked up along the lanes of a register: by
the compiler's schedule, 3.8 cycles for 1,024 of them, where a tree of selects takes 8.7.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import Precision
from jax.typing import DTypeLike

from lora_jax.core.few_rows import KERNEL_ROWS
from lora_jax.core.types import EqnParams, Shaped
from lora_jax.quantized.formats import Format, from_unsigned

if TYPE_CHECKING:
    from lora_jax.quantized.coded import Coded

KERNEL_NAME = "coded_rows"  # in compiled programs, or its beginning
_LANES, _SUBLANES = 128, 8
_TILE = 1024  # elements of a tile along an axis
_PART = 512  # rows of a tile that become W at a time
_MOST = 2**14  # rows of a tile that cannot be cut into parts
_FLOATS = {"float32", "bfloat16"}
_PRECISIONS = {"float32": {None, Precision.DEFAULT, Precision.HIGHEST}}
_PRECISIONS["bfloat16"] = {None, Precision.DEFAULT}


class Tile(NamedTuple):
    """The part of W that a step of the grid multiplies."""

    n_in: int
    n_out: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsKernel:
    """The kernel of a stack of codes.

    Attributes:
      format: the format of the codes.
      tile: a tile of W.
      casts: dtypes that W is cast to, one after the other.
      params: `precision` and `preferred_element_type` of `lax.dot_general`.
      interpret: whether Python runs it, on any device.
    """

    format: Format
    tile: Tile
    casts: tuple[DTypeLike, ...]
    params: tuple[tuple[str, Any], ...]
    interpret: bool = False

    def __call__(self, stack: "Coded", index: jax.Array, x: jax.Array) -> jax.Array:
        """Returns x times a layer of the stack.

        Args:
          stack: codes of [layers, in, out].
          index: [] int32, the layer.
          x: [rows, in].
        """
        n_rows = x.shape[0]
        of_tile = -(-n_rows // _SUBLANES) * _SUBLANES
        x = jnp.pad(x, [(0, of_tile - n_rows), (0, 0)])
        out: jax.Array = _call(self, stack, index, x)
        return out[:n_rows]


def find_kernel(
    stack: "Coded", x: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
) -> RowsKernel | None:
    """Returns the kernel that multiplies rows by a layer of a stack; None where there is none.

    Args:
      stack: codes of [layers, in, out].
      x: [rows, in].
      casts: dtypes that W is cast to, one after the other.
      params: parameters of `lax.dot_general`.
    """
    floats = {np.dtype(dtype).name for dtype in (x.dtype, (stack.dtype, *casts)[-1])}
    if not 0 < x.shape[0] <= KERNEL_ROWS or len(floats) > 1 or not floats <= _FLOATS:
        return None
    if not _multiplies(floats.pop(), params):
        return None
    if stack.ndim != 3 or not _is_plain(stack):
        return None
    tile = _tile(stack.shape[1], stack.shape[2], stack.blocks[1])
    if tile is None:
        return None
    how = tuple((name, params.get(name)) for name in ("precision", "preferred_element_type"))
    return RowsKernel(format=stack.format, tile=tile, casts=(stack.dtype, *casts), params=how)


def _multiplies(dtype: str, params: EqnParams) -> bool:
    """Returns True if a kernel can multiply this dtype with such parameters of a product."""
    precision, wanted = params.get("precision"), params.get("preferred_element_type")
    both = precision if isinstance(precision, tuple) else (precision,)
    return set(both) <= _PRECISIONS[dtype] and (wanted is None or np.dtype(wanted).name in _FLOATS)


def _is_plain(stack: "Coded") -> bool:
    """Returns True if codes have scales that are numbers, for blocks of whole registers of rows."""
    arrays, format, blocks = stack.arrays, stack.format, stack.blocks
    if set(arrays) - {"codes", "scales", "mins"} or format.partial or format.scale_table:
        return False
    parts = [array for name, array in arrays.items() if name != "codes"]
    if any(p.dtype.name not in _FLOATS or p.shape != parts[0].shape for p in parts):
        return False
    kind, size = arrays["codes"].dtype.name, blocks[1]
    is_known = kind == "int4" or (kind == "int8" and _start(format) is not None)
    in_rows = blocks[0] == blocks[2] == 1 and size % _SUBLANES == 0 and size < stack.shape[1]
    return is_known and in_rows


def _tile(n_in: int, n_out: int, block: int) -> Tile | None:
    """Returns the sizes of a tile: of W's axes, whole registers of codes and of scales."""
    unit = math.lcm(_LANES, _SUBLANES * block)
    parts = [n for n in range(_TILE, 0, -_LANES) if n_in % n == 0 and n % unit == 0]
    rows = parts[0] if parts else n_in
    if rows > _MOST:
        return None
    most = max(_TILE * _TILE // rows // _LANES, 1) * _LANES
    columns = min(most, _TILE, -(-n_out // _LANES) * _LANES)
    even = [n for n in range(columns, 0, -_LANES) if n_out % n == 0]
    return Tile(rows, even[0] if even else columns)


def _start(format: Format) -> float | None:
    """Returns the number to add to a code for its value; None if the value stands in a table."""
    if format.to_values is None:
        return 0.0
    return 8.0 if format.to_values is from_unsigned else None


def _table(format: Format) -> jax.Array:
    """Returns the values of all codes of 4 bits, again and again along a register's lanes."""
    codes = jnp.asarray(np.arange(-8, 8, dtype=np.int8)).astype(format.code_dtype)
    return jnp.tile(format.values(codes), _LANES // 16)[None]


def _call(kernel: RowsKernel, stack: "Coded", index: jax.Array, x: jax.Array) -> jax.Array:
    """Runs the kernel over the tiles of a layer; along the in axis, sums stay on the chip."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    (n_rows, n_in), n_out, tile = x.shape, stack.shape[2], kernel.tile
    params = dict(kernel.params)
    n_steps, block = n_in // tile.n_in, stack.blocks[1]
    start = _start(kernel.format)
    tables = [_table(kernel.format)] if start is None else []
    of_layer = [stack.arrays[name] for name in ("codes", "scales", "mins") if name in stack.arrays]

    def stack_spec(n_rows: int) -> Any:
        return pl.BlockSpec((None, n_rows, tile.n_out), lambda j, k, at: (at[0], k, j))

    specs = [stack_spec(tile.n_in), *[stack_spec(tile.n_in // block)] * (len(of_layer) - 1)]
    wanted = params["preferred_element_type"] or x.dtype
    call = pl.pallas_call(
        functools.partial(_program, kernel, start, block, n_steps),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n_out, tile.n_out), n_steps),
            in_specs=[
                pl.BlockSpec((n_rows, tile.n_in), lambda j, k, at: (0, k)),
                *[pl.BlockSpec((1, _LANES), lambda j, k, at: (0, 0))] * len(tables),
                *specs,
            ],
            out_specs=pl.BlockSpec((n_rows, tile.n_out), lambda j, k, at: (0, j)),
            scratch_shapes=[tpu.VMEM((n_rows, tile.n_out), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((n_rows, n_out), wanted),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=kernel.interpret,
        name=f"{KERNEL_NAME}_by_table" if tables else KERNEL_NAME,
    )
    result: jax.Array = call(index.astype(jnp.int32)[None], x, *tables, *of_layer)
    return result


def _program(
    kernel: RowsKernel, start: float | None, block: int, n_steps: int, _: Any, *refs: Any
) -> None:
    """Multiplies x by a tile of W, and adds it to the sum.

    Args:
      kernel: the static facts.
      start: what is added to a code for its value; None if there is a table.
      block: the number of rows of W that share a scale.
      n_steps: the number of tiles in a sum.
      refs: x, the table if there is one, codes, scales, perhaps minima, the result, and the sum.
    """
    from jax.experimental import pallas as pl

    x, *others, out, total = refs
    table = others.pop(0)[...] if start is None else None
    codes, *scales = others
    step, n_in = pl.program_id(1), codes.shape[0]

    @pl.when(step == 0)
    def _zero() -> None:
        total[...] = jnp.zeros_like(total)

    def add(first: int, n: int) -> None:
        part_codes = codes[first : first + n, :]
        formed = _cast(part_codes, start) if table is None else _look_up(part_codes, table)
        parts = [part[first // block : (first + n) // block, :] for part in scales]
        blocks = formed.reshape(n // block, block, formed.shape[1])
        scale, *least = [part.astype(jnp.float32)[:, None, :] for part in parts]
        blocks = blocks * scale
        for minimum in least:
            blocks = blocks + minimum
        w = blocks.reshape(formed.shape)
        for dtype in kernel.casts:
            w = w.astype(dtype)
        precision = dict(kernel.params)["precision"]
        rows = x[:, first : first + n]
        dims = (((1,), (0,)), ((), ()))
        total[...] += lax.dot_general(rows, w, dims, precision, jnp.float32)

    if n_in % _PART == 0 and _PART % (_SUBLANES * block) == 0:
        for first in range(0, n_in, _PART):
            add(first, _PART)
    else:
        add(0, n_in)

    @pl.when(step == n_steps - 1)
    def _end() -> None:
        out[...] = total[...].astype(out.dtype)


def _cast(codes: jax.Array, start: float | None) -> jax.Array:
    numbers = codes.astype(jnp.float32)
    return numbers + start if start else numbers


def _look_up(codes: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the values of codes of 4 bits, register by register along the out axis."""
    places = codes.astype(jnp.int32) + 8
    lanes = jnp.broadcast_to(table, (codes.shape[0], _LANES))
    parts = [
        jnp.take_along_axis(lanes, places[:, at : at + _LANES], axis=1, mode="promise_in_bounds")
        for at in range(0, codes.shape[1], _LANES)
    ]
    return jnp.concatenate(parts, axis=1)
