"""A TPU kernel for products of few rows of x, as in decoding, with a quantized W.

It is given the whole stack of layers and the index of one. Of that layer it reads the codes tile by
tile, decodes a tile of W in the chip's own memory, and multiplies: codes are read once, and no
float of a kernel's size is written. The elements of W are those of `Coded.as_array`, bit by bit. A
tile is the part of W that one step of the grid multiplies; it is decoded in pieces of `_PIECE_ROWS`
rows where blocks allow it.

If the values of codes are not consecutive numbers (nf4), they are looked up along the lanes of a
register: by the compiler's schedule, 3.8 cycles for 1,024 of them, where a tree of selects takes
8.7.
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

from lora_jax.core.few_rows import MAX_KERNEL_ROWS
from lora_jax.core.types import EqnParams, Shaped
from lora_jax.quantized.formats import Format, from_unsigned

if TYPE_CHECKING:
    from lora_jax.quantized.coded import Coded

KERNEL_NAME = "coded_rows"  # in compiled programs, or its beginning
_LANES, _SUBLANES = 128, 8
_TILE = 1024  # elements of a tile along an axis
_PIECE_ROWS = 512  # rows of a tile that are decoded at a time
_MAX_TILE_ROWS = 2**14  # rows of a tile, at most
_FLOATS = {"float32", "bfloat16"}
_PRECISIONS = {"float32": {None, Precision.DEFAULT, Precision.HIGHEST}}
_PRECISIONS["bfloat16"] = {None, Precision.DEFAULT}


class Tile(NamedTuple):
    """The part of W that one step of the kernel's grid multiplies."""

    n_in: int
    n_out: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsKernel:
    """The kernel of a quantized stack.

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
        """Returns x times one layer of the stack.

        Args:
          stack: codes of [layers, in, out].
          index: [] int32, the layer.
          x: [rows, in].
        """
        n_rows = x.shape[0]
        n_padded_rows = -(-n_rows // _SUBLANES) * _SUBLANES
        x = jnp.pad(x, [(0, n_padded_rows - n_rows), (0, 0)])
        out: jax.Array = _run_over_tiles(self, stack, index, x)
        return out[:n_rows]


def find_kernel(
    stack: "Coded", x: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
) -> RowsKernel | None:
    """Returns the kernel that multiplies few rows by a layer of a stack, or None.

    Args:
      stack: codes of [layers, in, out].
      x: [rows, in].
      casts: dtypes that W is cast to, one after the other.
      params: parameters of `lax.dot_general`.
    """
    x_dtype = np.dtype(x.dtype).name
    weight_dtype = np.dtype((stack.dtype, *casts)[-1]).name
    if not 0 < x.shape[0] <= MAX_KERNEL_ROWS or x_dtype != weight_dtype or x_dtype not in _FLOATS:
        return None
    if not _supports_product(x_dtype, params):
        return None
    if stack.ndim != 3 or not _supports_blocks(stack):
        return None
    tile = _find_tile(stack.shape[1], stack.shape[2], stack.blocks[1])
    if tile is None:
        return None
    names = ("precision", "preferred_element_type")
    return RowsKernel(
        format=stack.format,
        tile=tile,
        casts=(stack.dtype, *casts),
        params=tuple((name, params.get(name)) for name in names),
    )


def _supports_product(dtype: str, params: EqnParams) -> bool:
    """Returns True if a kernel supports this dtype and these parameters of a product."""
    precision = params.get("precision")
    precisions = set(precision) if isinstance(precision, tuple) else {precision}
    out_dtype = params.get("preferred_element_type")
    is_float = out_dtype is None or np.dtype(out_dtype).name in _FLOATS
    return precisions <= _PRECISIONS[dtype] and is_float


def _supports_blocks(stack: "Coded") -> bool:
    """Returns True if scales are numbers, and blocks fill whole registers along the in axis.

    Formats that a kernel cannot decode, and layers that are a single block, get False.
    """
    arrays, format = stack.arrays, stack.format
    if set(arrays) - {"codes", "scales", "mins"} or format.partial or format.scale_table:
        return False
    block_arrays = [array for name, array in arrays.items() if name != "codes"]
    if any(array.dtype.name not in _FLOATS for array in block_arrays):
        return False
    if any(array.shape != block_arrays[0].shape for array in block_arrays):
        return False
    code_dtype = arrays["codes"].dtype.name
    is_int8 = code_dtype == "int8" and _code_offset(format) is not None
    layers, rows, columns = stack.blocks
    fills_registers = layers == columns == 1 and rows % _SUBLANES == 0 and rows < stack.shape[1]
    return (code_dtype == "int4" or is_int8) and fills_registers


def _find_tile(n_in: int, n_out: int, block: int) -> Tile | None:
    """Returns the tile size of W: whole registers of codes and scales along each axis.

    None if the in axis has no such divisor and is too long for one tile.
    """
    # The rows of W in a tile fill lanes with x's columns, and sublanes with scales.
    unit = math.lcm(_LANES, _SUBLANES * block)
    divisors = [n for n in range(_TILE, 0, -_LANES) if n_in % n == 0 and n % unit == 0]
    rows = divisors[0] if divisors else n_in
    if rows > _MAX_TILE_ROWS:
        return None
    max_columns = max(_TILE * _TILE // rows // _LANES, 1) * _LANES
    columns = min(max_columns, _TILE, -(-n_out // _LANES) * _LANES)
    divisors = [n for n in range(columns, 0, -_LANES) if n_out % n == 0]
    return Tile(rows, divisors[0] if divisors else columns)


def _code_offset(format: Format) -> float | None:
    """Returns the number that is added to a code for its value; None if a table has the values."""
    if format.to_values is None:
        return 0.0
    return 8.0 if format.to_values is from_unsigned else None


def value_table(format: Format) -> jax.Array:
    """Returns the 16 values of 4-bit codes, repeated along a register's lanes, [1, lanes]."""
    codes = jnp.asarray(np.arange(-8, 8, dtype=np.int8)).astype(format.code_dtype)
    return jnp.tile(format.values(codes), _LANES // 16)[None]


def _run_over_tiles(
    kernel: RowsKernel, stack: "Coded", index: jax.Array, x: jax.Array
) -> jax.Array:
    """Runs the kernel over a layer's tiles; sums along the in axis stay on the chip."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    n_rows, n_in = x.shape
    n_out = stack.shape[2]
    tile = kernel.tile
    params = dict(kernel.params)
    n_steps = n_in // tile.n_in
    block = stack.blocks[1]
    offset = _code_offset(kernel.format)
    tables = [value_table(kernel.format)] if offset is None else []
    arrays = [stack.arrays[name] for name in ("codes", "scales", "mins") if name in stack.arrays]

    def stack_spec(n_rows: int) -> Any:
        return pl.BlockSpec((None, n_rows, tile.n_out), lambda j, k, layer: (layer[0], k, j))

    array_specs = [stack_spec(tile.n_in), *[stack_spec(tile.n_in // block)] * (len(arrays) - 1)]
    call = pl.pallas_call(
        functools.partial(_multiply_tile, kernel, offset, block, n_steps),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n_out, tile.n_out), n_steps),
            in_specs=[
                pl.BlockSpec((n_rows, tile.n_in), lambda j, k, layer: (0, k)),
                *[pl.BlockSpec((1, _LANES), lambda j, k, layer: (0, 0))] * len(tables),
                *array_specs,
            ],
            out_specs=pl.BlockSpec((n_rows, tile.n_out), lambda j, k, layer: (0, j)),
            scratch_shapes=[tpu.VMEM((n_rows, tile.n_out), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (n_rows, n_out), params["preferred_element_type"] or x.dtype
        ),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=kernel.interpret,
        name=f"{KERNEL_NAME}_by_table" if tables else KERNEL_NAME,
    )
    result: jax.Array = call(index.astype(jnp.int32)[None], x, *tables, *arrays)
    return result


def _multiply_tile(
    kernel: RowsKernel, offset: float | None, block: int, n_steps: int, _: Any, *refs: Any
) -> None:
    """Multiplies x by a tile of W, and adds the product to the running sum.

    Args:
      kernel: the static facts.
      offset: number to add to a code for its value; None if there is a table.
      block: the number of rows of W that share a scale.
      n_steps: the number of tiles in a sum.
      refs: x, the table if there is one, codes, scales, perhaps minima, the result, and the sum.
    """
    from jax.experimental import pallas as pl

    x, *array_refs, out, total = refs
    table = None
    if offset is None:
        table = array_refs.pop(0)[...]
    codes, *block_refs = array_refs  # of scales, and of minima if there are any
    step = pl.program_id(1)
    n_in = codes.shape[0]

    @pl.when(step == 0)
    def _clear_sum() -> None:
        total[...] = jnp.zeros_like(total)

    def add_rows(start: int, n_rows: int) -> None:
        """Decodes some rows of the tile, and adds x times these rows to the sum."""
        stop = start + n_rows
        piece = codes[start:stop, :]
        values = _add_offset(piece, offset) if table is None else look_up(piece, table)
        block_arrays = [ref[start // block : stop // block, :] for ref in block_refs]
        blocks = values.reshape(n_rows // block, block, values.shape[1])
        scales, *mins = [array.astype(jnp.float32)[:, None, :] for array in block_arrays]
        blocks = blocks * scales
        for minimum in mins:
            blocks = blocks + minimum
        # W is rounded as `Coded.as_array` rounds it.
        w = blocks.reshape(values.shape)
        for dtype in kernel.casts:
            w = w.astype(dtype)
        precision = dict(kernel.params)["precision"]
        dims = (((1,), (0,)), ((), ()))
        total[...] += lax.dot_general(x[:, start:stop], w, dims, precision, jnp.float32)

    if n_in % _PIECE_ROWS == 0 and _PIECE_ROWS % (_SUBLANES * block) == 0:
        for start in range(0, n_in, _PIECE_ROWS):
            add_rows(start, _PIECE_ROWS)
    else:
        add_rows(0, n_in)

    @pl.when(step == n_steps - 1)
    def _write_result() -> None:
        out[...] = total[...].astype(out.dtype)


def _add_offset(codes: jax.Array, offset: float | None) -> jax.Array:
    values = codes.astype(jnp.float32)
    return values + offset if offset else values


def look_up(codes: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the values of 4-bit codes, one register at a time along the out axis."""
    indices = codes.astype(jnp.int32) + 8
    lanes = jnp.broadcast_to(table, (codes.shape[0], _LANES))
    registers = [
        jnp.take_along_axis(
            lanes, indices[:, start : start + _LANES], axis=1, mode="promise_in_bounds"
        )
        for start in range(0, codes.shape[1], _LANES)
    ]
    return jnp.concatenate(registers, axis=1)
