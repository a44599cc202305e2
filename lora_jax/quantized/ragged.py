"""A TPU kernel for ragged products of sorted rows with the quantized kernels of experts.

The rows of each expert follow one another. The kernel reads the codes of an expert tile by tile,
decodes a tile of W into the chip's own memory once, and multiplies all rows of the expert by it. So
no float of a kernel's size is written to the main memory. The elements of W are those of
`Coded.as_array`, bit by bit. Sums are in fp32.

The grid takes the tiles of W one after the other. For each tile it makes **visits**: a visit is a
tile of rows together with an expert that has some of these rows. The visits of an expert follow one
another. The rows that belong to no expert are visited, too, and get zeros.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import Precision
from jax.typing import DTypeLike

from lora_jax.core.base import StackMember
from lora_jax.core.types import EqnParams, Shaped
from lora_jax.quantized.formats import Format, from_e2m1, from_nf4, from_unsigned
from lora_jax.quantized.rows import look_up, value_table

if TYPE_CHECKING:
    from lora_jax.quantized.coded import Coded

KERNEL_NAME = "coded_ragged"  # in compiled programs
_LANES = 128
_CODE_ROWS = 64  # rows of W that are decoded at a time: a register's rows of 4-bit codes
_TILE_ROWS = 128  # rows of x in a visit
_BLOCK_ROWS = 64  # rows of x that are multiplied at a time
_MAX_TILE_ELEMENTS = 9 * 2**18  # of W, decoded: 4.5 MiB


@dataclasses.dataclass(frozen=True)
class RaggedKernel:
    """The kernel of quantized experts, [experts, in, out].

    Attributes:
      format: the format of the codes.
      casts: dtypes that W is cast to, one after the other.
      out_dtype: dtype of the result.
      interpret: whether Python runs it, on any device.
    """

    format: Format
    casts: tuple[DTypeLike, ...]
    out_dtype: DTypeLike
    interpret: bool = False

    def __call__(
        self,
        layer: "Coded",
        member: StackMember | None,
        x: jax.Array,
        group_sizes: jax.Array,
        transposed: bool,
    ) -> jax.Array:
        """Returns the product of each row with the kernel of its expert.

        Args:
          layer: the experts' kernels, [experts, in, out].
          member: the stack that the layer belongs to, whose codes are read in place; None if it
            belongs to none.
          x: [rows, in], or [rows, out] for the transposed product, sorted by expert.
          group_sizes: [experts] int32, the number of rows of each expert.
          transposed: whether rows are multiplied by the transposed kernels.

        Returns:
          [rows, out], or [rows, in] for the transposed product. Rows of no expert are zeros.
        """
        scales = layer.arrays["scales"]
        codes = layer.arrays["codes"][None]
        index = jnp.zeros((), jnp.int32)
        if member is not None:
            codes = member.stack.arrays["codes"]
            index = member.index.astype(jnp.int32)
        return _run_over_tiles(self, index, codes, scales, x, group_sizes, transposed)


class _Visits(NamedTuple):
    """The visits of a tile of W, in order.

    Attributes:
      experts: [visits] int32; the number of experts stands for rows of no expert.
      row_tiles: [visits] int32.
      starts, ends: [experts + 1] int32, the first row of each expert and the row behind its last.
      n_visits: [1] int32; later visits repeat the last one and do nothing.
    """

    experts: jax.Array
    row_tiles: jax.Array
    starts: jax.Array
    ends: jax.Array
    n_visits: jax.Array


def find_ragged_kernel(
    layer: "Coded", x: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
) -> RaggedKernel | None:
    """Returns the kernel that multiplies sorted rows by quantized experts, or None.

    Args:
      layer: the experts' kernels, [experts, in, out].
      x: [rows, in].
      casts: dtypes that W is cast to, one after the other.
      params: parameters of `lax.ragged_dot_general`.
    """
    dtypes = (layer.dtype, *casts)
    out_dtype = np.dtype(params.get("preferred_element_type") or x.dtype)
    is_bf16 = np.dtype(x.dtype) == np.dtype(dtypes[-1]) == jnp.bfloat16
    is_supported = is_bf16 and out_dtype.name in ("bfloat16", "float32")
    is_default = params.get("precision") in (None, Precision.DEFAULT)
    if not (is_supported and is_default) or x.shape[0] < _TILE_ROWS:
        return None
    if layer.ndim != 3 or not _is_decodable(layer):
        return None
    _, n_in, n_out = layer.shape
    if _tile_size(n_in, n_out) is None or _tile_size(n_out, n_in) is None:
        return None
    return RaggedKernel(format=layer.format, casts=dtypes, out_dtype=out_dtype)


def _is_decodable(coded: "Coded") -> bool:
    """Returns True if the kernel can decode these codes: scales are floats, or powers of two."""
    arrays, format = coded.arrays, coded.format
    if set(arrays) != {"codes", "scales"} or format.partial or format.scale_table is not None:
        return False
    is_narrow = arrays["codes"].dtype.name in ("int4", "int8")
    is_known = format.to_values in (None, from_unsigned, from_e2m1)
    if _has_table(format):  # its values are looked up by whole registers
        is_known = coded.shape[2] % _LANES == 0
    has_float_scales = arrays["scales"].dtype.name in ("uint8", "bfloat16", "float32")
    experts, rows, columns = coded.blocks
    has_whole_blocks = experts == columns == 1 and _CODE_ROWS % rows == 0
    is_whole = coded.shape[1] % _CODE_ROWS == 0
    return is_narrow and is_known and has_float_scales and has_whole_blocks and is_whole


def _has_table(format: Format) -> bool:
    """Returns True if the values of codes are looked up in a table, along a register's lanes."""
    return format.to_values is from_nf4


def _tile_size(n_contracted: int, n_out: int) -> int | None:
    """Returns the size of a tile of W along the axis that comes out, in whole registers.

    The tile has all of the contracted axis. Of the sizes down to half of the largest possible, the
    one is chosen with the least padding behind the last tile. None if no tile is small enough.
    """
    largest = min(_MAX_TILE_ELEMENTS // n_contracted, n_out + _LANES - 1) // _LANES
    sizes = [_LANES * n for n in range(largest, largest // 2, -1)]
    return min(sizes, key=lambda size: -(-n_out // size) * size, default=None)


def _plan_visits(group_sizes: jax.Array, n_rows: int) -> _Visits:
    """Returns the visits of rows that are sorted by expert."""
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, n_rows - jnp.sum(sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first_tiles = starts // _TILE_ROWS
    n_tiles = jnp.where(sizes > 0, (ends - 1) // _TILE_ROWS - first_tiles + 1, 0)
    visit_ends = jnp.cumsum(n_tiles)
    max_visits = -(-n_rows // _TILE_ROWS) + group_sizes.size
    visits = jnp.minimum(jnp.arange(max_visits, dtype=jnp.int32), visit_ends[-1] - 1)
    experts = jnp.sum(visit_ends[None, :] <= visits[:, None], axis=1, dtype=jnp.int32)
    row_tiles = first_tiles[experts] + visits - (visit_ends - n_tiles)[experts]
    return _Visits(
        experts=experts, row_tiles=row_tiles, starts=starts, ends=ends, n_visits=visit_ends[-1:]
    )


def _run_over_tiles(
    kernel: RaggedKernel,
    index: jax.Array,
    stack_codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    group_sizes: jax.Array,
    transposed: bool,
) -> jax.Array:
    """Runs the kernel over the tiles of W and their visits.

    Args:
      kernel: the kernel.
      index: [] int32, the layer in the stack.
      stack_codes: [layers, experts, in, out].
      scales: [experts, blocks, out], those of the layer.
      x, group_sizes, transposed: see `RaggedKernel`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    _, n_experts, n_in, n_out = stack_codes.shape
    n_blocks = scales.shape[1]
    n_rows = x.shape[0]
    n_contracted, n_result = (n_out, n_in) if transposed else (n_in, n_out)
    size = _tile_size(n_contracted, n_result)
    assert size is not None, "find_ragged_kernel has checked the sizes"
    n_tiles = pl.cdiv(n_result, size)

    def expert_of(visit: Any, experts: Any) -> Any:
        return jnp.minimum(experts[visit], n_experts - 1)

    if transposed:  # a tile has rows of W, and the scales of all rows
        tile_shape = (size, n_out)
        code_spec = pl.BlockSpec(
            (None, None, size, n_out), lambda n, v, layer, e, *_: (layer[0], expert_of(v, e), n, 0)
        )
        scale_spec = pl.BlockSpec(
            (None, n_blocks, n_out), lambda n, v, layer, e, *_: (expert_of(v, e), 0, 0)
        )
        n_tile_blocks = n_tiles * size // (n_in // n_blocks)
    else:
        tile_shape = (n_in, size)
        code_spec = pl.BlockSpec(
            (None, None, n_in, size), lambda n, v, layer, e, *_: (layer[0], expert_of(v, e), 0, n)
        )
        scale_spec = pl.BlockSpec(
            (None, n_blocks, size), lambda n, v, layer, e, *_: (expert_of(v, e), 0, n)
        )
        n_tile_blocks = n_blocks
    tables = [value_table(kernel.format)] if _has_table(kernel.format) else []
    call = pl.pallas_call(
        functools.partial(_visit_rows, kernel, n_experts, n_in // n_blocks, transposed),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(n_tiles, n_experts + pl.cdiv(n_rows, _TILE_ROWS)),
            in_specs=[
                pl.BlockSpec((_TILE_ROWS, n_contracted), lambda n, v, layer, e, t, *_: (t[v], 0)),
                code_spec,
                scale_spec,
                *[pl.BlockSpec((1, _LANES), lambda *_: (0, 0))] * len(tables),
            ],
            out_specs=pl.BlockSpec((_TILE_ROWS, size), lambda n, v, layer, e, t, *_: (t[v], n)),
            scratch_shapes=[
                tpu.VMEM(tile_shape, x.dtype),
                tpu.VMEM((n_tile_blocks, tile_shape[1]), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((n_rows, n_result), kernel.out_dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=kernel.interpret,
        name=f"{KERNEL_NAME}_by_table" if tables else KERNEL_NAME,
    )
    visits = _plan_visits(group_sizes, n_rows)
    result: jax.Array = call(index[None], *visits, x, stack_codes, scales, *tables)
    return result


def _visit_rows(
    kernel: RaggedKernel, n_experts: int, block: int, transposed: bool, _: Any, *refs: Any
) -> None:
    """Multiplies the rows of one visit by a tile of W, which the first visit of an expert decodes.

    Args:
      kernel: the static facts.
      n_experts: the number of experts.
      block: the number of rows of W that share a scale.
      transposed: whether rows are multiplied by the transposed tile.
      refs: the fields of `_Visits`, rows, codes, scales, a table of values if there is one, the
        result, W, and its scales in fp32.
    """
    from jax.experimental import pallas as pl

    experts, row_tiles, starts, ends, n_visits, x, codes, scales, *tables, out, w, wide_scales = (
        refs
    )
    tile, visit = pl.program_id(0), pl.program_id(1)
    expert, row_tile = experts[visit], row_tiles[visit]
    previous = jnp.maximum(visit - 1, 0)
    is_first = visit == 0
    has_expert = expert < n_experts
    n_rows_of_w = codes.shape[0]

    @pl.when((is_first | (expert != experts[previous])) & has_expert)
    def _decode_tile() -> None:
        all_scales = _scales_to_float(scales[...])
        wide_scales[: all_scales.shape[0], :] = all_scales
        first_block = tile * (n_rows_of_w // block) if transposed else 0

        def decode_rows(index: jax.Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(index * _CODE_ROWS, _CODE_ROWS), _CODE_ROWS)
            if tables:
                values = look_up(codes[rows, :], tables[0][...])
            else:
                values = _values_of(codes[rows, :], kernel.format)
            n_blocks = _CODE_ROWS // block
            blocks: list[jax.Array] = []
            for n in range(n_blocks):
                scale = wide_scales[pl.ds(first_block + index * n_blocks + n, 1), :]
                blocks.append(values[n * block : (n + 1) * block] * scale)
            decoded = jnp.concatenate(blocks)
            for dtype in kernel.casts:  # W is rounded as `Coded.as_array` rounds it
                decoded = decoded.astype(dtype)
            w[rows, :] = decoded

        lax.fori_loop(0, n_rows_of_w // _CODE_ROWS, decode_rows, None)

    @pl.when(is_first | (row_tile != row_tiles[previous]))
    def _clear_rows() -> None:
        out[...] = jnp.zeros_like(out)

    first_row = row_tile * _TILE_ROWS
    start = jnp.maximum(starts[expert] - first_row, 0)
    end = jnp.minimum(ends[expert] - first_row, _TILE_ROWS)

    def multiply_rows(index: jax.Array, _: None) -> None:
        block_start = pl.multiple_of(index * _BLOCK_ROWS, _BLOCK_ROWS)
        rows = pl.ds(block_start, _BLOCK_ROWS)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        product = lax.dot_general(x[rows, :], w[...], dims, preferred_element_type=jnp.float32)
        row = block_start + lax.broadcasted_iota(jnp.int32, product.shape, 0)
        is_own = (start <= row) & (row < end)  # others belong to the experts before and after
        out[rows, :] = jnp.where(is_own, product.astype(out.dtype), out[rows, :])

    @pl.when(has_expert & (visit < n_visits[0]))
    def _multiply_visit() -> None:
        last_block = lax.div(end + _BLOCK_ROWS - 1, _BLOCK_ROWS)
        lax.fori_loop(lax.div(start, _BLOCK_ROWS), last_block, multiply_rows, None)


def _scales_to_float(scales: jax.Array) -> jax.Array:
    """Returns scales in fp32; uint8 holds the exponents of powers of two (E8M0)."""
    if scales.dtype != jnp.uint8:
        return scales.astype(jnp.float32)
    exponents = scales.astype(jnp.int32)
    powers = lax.bitcast_convert_type(exponents << 23, jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, powers)


def _values_of(codes: jax.Array, format: Format) -> jax.Array:
    """Returns the values of codes, fp32."""
    if format.to_values is not from_e2m1:
        values = codes.astype(jnp.float32)
        return values + 8 if format.to_values is from_unsigned else values
    # The magnitudes 1 to 6 have the codes 2 to 7: one bit of a fraction, behind two of an exponent
    # from 2⁰ on. As bits of fp32, the codes 0 and 1 then stand for 0.5 and 0.75.
    bits = codes.astype(jnp.int32)
    magnitude = lax.bitcast_convert_type(((bits & 7) << 22) + (126 << 23), jnp.float32)
    magnitude = jnp.minimum(magnitude, 2 * magnitude - 1)  # 0.5, 0.75 -> 0, 0.5
    sign = bits & jnp.int32(-(2**31))
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(magnitude, jnp.int32) | sign, jnp.float32
    )
