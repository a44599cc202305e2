"""The backward pass of splash attention as one kernel.

JAX's backward pass is two kernels, which both compute the scores: seven products for a block of
scores. This kernel computes the scores once, with five products. It holds the gradients of all keys
and values of a head in fp32 in the chip's own memory, so that it writes each gradient once. JAX's
own fused kernel writes a copy of the queries' gradient for each block of keys, in the queries'
dtype, and XLA adds the copies.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from lora_jax.models.layers.attention import KERNEL_OUTPUT

KERNEL_NAME = "splash_gradients"  # in compiled programs
LANES = 128  # of a TPU: the kernel's blocks are multiples of it
# The chip's own memory is 128 MiB on v5e and v6e, 64 MiB on v5p and v7, and 16 MiB before v5. A
# kernel may use 16 MiB by default. This kernel may use as much for its blocks, and beside them the
# gradients of keys and values.
_BLOCK_BYTES = 16 * 2**20
_MAX_GRADIENT_BYTES = 32 * 2**20
_SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")


class Operands(NamedTuple):
    """The arrays of one row that the backward pass reads.

    Attributes:
      q: [heads, queries, head_dim], scaled.
      k: [kv_heads, keys, head_dim].
      v: [kv_heads, keys, value_dim].
      segments: the segments of queries and of keys.
      logsumexp: [heads, queries] fp32, the logarithms of the softmax's sums.
      cotangent: [heads, queries, value_dim], the gradient of attention.
      products: [heads, queries] fp32, the sums of attention times its gradient.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: kernels.SegmentIds
    logsumexp: jax.Array
    cotangent: jax.Array
    products: jax.Array


def fits_chip(keys: int, head_dim: int, value_dim: int, dtype: Any) -> bool:
    """Returns True if the chip's own memory can hold the gradients of a head's keys and values."""
    if jax.devices()[0].device_kind in _SMALL_CHIPS:
        return False
    return _bytes_of_gradients(keys, head_dim, value_dim, dtype) <= _MAX_GRADIENT_BYTES


def _bytes_of_gradients(keys: int, head_dim: int, value_dim: int, dtype: Any) -> int:
    """Returns the bytes that the gradients of a head's keys and values take on the chip.

    The sums are fp32. Two buffers in the dtype of the keys hold what is written to main memory.
    """
    lanes = sum(size + -size % LANES for size in (head_dim, value_dim))
    itemsize: int = jnp.dtype(dtype).itemsize
    return keys * lanes * (4 + 2 * itemsize)


def attend_fused(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: kernels.SegmentIds,
    sinks: jax.Array | None,
) -> jax.Array:
    """Computes attention by JAX's kernel, and its gradients by the kernel of this file.

    Args:
      kernel: JAX's kernel, [heads, queries] by [heads, keys].
      q, k, v, segments: see `Operands`.
      sinks: [heads], or None.

    Returns:
      [heads, queries, value_dim], in the dtype of q.
    """
    options = {**kernel.kwargs, "residual_checkpoint_name": None}

    @jax.custom_vjp
    def attention(tables: Any, *arrays: Any) -> Any:
        return type(kernel)(tables, None, None, **options)(*arrays)

    def forward(tables: Any, *arrays: Any) -> Any:
        """Returns attention and the residuals of its gradient."""
        forward_kernel = type(kernel)(tables, None, None, **{**options, "save_residuals": True})
        out, (logsumexp,) = forward_kernel(*arrays)
        out = checkpoint_name(out, KERNEL_OUTPUT)
        logsumexp = checkpoint_name(logsumexp, KERNEL_OUTPUT)
        return out, (tables, arrays, out, logsumexp)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        """Returns the gradients of q, k, v and sinks."""
        tables, (q, k, v, segments, sinks), out, logsumexp = residuals
        products = sum_products(out, cotangent)
        operands = Operands(
            q=q,
            k=k,
            v=v,
            segments=segments,
            logsumexp=logsumexp,
            cotangent=cotangent,
            products=products,
        )
        dq, dk, dv = compute_gradients(tables, options, operands)
        sink_gradient = None
        if sinks is not None:
            weights = jnp.exp(sinks.astype(jnp.float32)[:, None] - logsumexp)
            sink_gradient = -jnp.sum(weights * products, axis=1).astype(sinks.dtype)
        return None, dq, dk, dv, None, sink_gradient

    attention.defvjp(forward, backward)
    result: jax.Array = attention(kernel.fwd_mask_info, q, k, v, segments, sinks)
    return result


def sum_products(out: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the sums of attention times its gradient, [heads, queries] fp32."""
    return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)


def compute_gradients(
    tables: Any, options: dict[str, Any], operands: Operands
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v.

    Args:
      tables: the mask's tables of JAX's forward kernel.
      options: the options of JAX's kernel.
      operands: the arrays.
    """
    q, k, v, segments, logsumexp, cotangent, products = operands
    query_size = options["block_sizes"].block_q
    key_size = options["block_sizes"].block_kv
    heads, n_queries, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape
    group = heads // kv_heads
    visits = []
    n_steps = n_keys // key_size
    if tables.data_next is not None:
        visits = [tables.data_next, tables.block_mask]
        n_steps = tables.data_next.shape[-1]
    slots = [] if tables.q_sequence is None else [tables.q_sequence[None]]

    # The grid: heads of keys, their heads of queries, blocks of queries, visited blocks of keys.
    def key_block(query_block: Any, step: Any, visits: Any) -> Any:
        return visits[0][0, query_block, step].astype(jnp.int32) if visits else step

    query_spec = pl.BlockSpec(
        (None, query_size, head_dim), lambda head, member, i, *_: (head * group + member, i, 0)
    )
    row_spec = pl.BlockSpec(
        (None, 1, query_size), lambda head, member, i, *_: (head * group + member, 0, i)
    )
    slot_spec = pl.BlockSpec((1, query_size), lambda head, member, i, *_: (0, i))
    key_spec, value_spec = (
        pl.BlockSpec(
            (None, key_size, size),
            lambda head, member, i, step, *visits: (head, key_block(i, step, visits), 0),
        )
        for size in (head_dim, value_dim)
    )
    gradient_specs = [
        pl.BlockSpec((None, n_keys, size), lambda head, *_: (head, 0, 0))
        for size in (head_dim, value_dim)
    ]
    call = pl.pallas_call(
        functools.partial(
            _add_block,
            n_tables=len(visits),
            mask_function=options["mask_function"],
            cap=options["attn_logits_soft_cap"],
        ),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(kv_heads, group, n_queries // query_size, n_steps),
            in_specs=[
                query_spec,
                key_spec,
                value_spec,
                pl.BlockSpec((None, query_size, value_dim), query_spec.index_map),
                row_spec,
                row_spec,
                slot_spec,
                pl.BlockSpec(
                    (key_size, 1),
                    lambda head, member, i, step, *visits: (key_block(i, step, visits), 0),
                ),
                *[slot_spec for _ in slots],
            ],
            out_specs=[query_spec, *gradient_specs],
            scratch_shapes=[
                tpu.VMEM((query_size, head_dim), jnp.float32),
                tpu.VMEM((n_keys, head_dim), jnp.float32),
                tpu.VMEM((n_keys, value_dim), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct.like(x) for x in (q, k, v)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4,
            vmem_limit_bytes=_BLOCK_BYTES
            + _bytes_of_gradients(n_keys, head_dim, value_dim, k.dtype),
        ),
        interpret=options["interpret"],
        name=KERNEL_NAME,
    )
    dq, dk, dv = call(
        *visits,
        q,
        k,
        v,
        cotangent,
        logsumexp[:, None],
        products[:, None],
        segments.q[None],
        segments.kv[:, None],
        *slots,
    )
    return dq, dk, dv


def _add_block(*refs: Any, n_tables: int, mask_function: Any, cap: float | None) -> None:
    """Adds the terms of a block of scores to the gradients.

    Args:
      refs: the tables of visits, the arrays, the gradients, and their sums.
      n_tables: the number of tables; 0 if all blocks are visited.
      mask_function: tells which slots of queries see which slots of keys; None if all do.
      cap: the cap of scores.
    """
    tables = refs[:n_tables]
    q, k, v, cotangent, logsumexp, products, query_segments, key_segments, *rest = refs[n_tables:]
    *slots, dq, dk, dv, dq_sum, dk_sum, dv_sum = rest
    _, member, query_block, step = (pl.program_id(axis) for axis in range(4))
    n_members, n_query_blocks, n_steps = (pl.num_programs(axis) for axis in (1, 2, 3))
    key_size = k.shape[0]
    key_block, is_visited = step, True
    if tables:
        key_block, is_visited = (table[0, query_block, step].astype(jnp.int32) for table in tables)
        is_visited = is_visited > 0
    is_first = step == 0
    is_last = step == n_steps - 1

    @pl.when(is_first)
    def _clear_queries() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(is_first & (query_block == 0) & (member == 0))
    def _clear_keys() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(is_visited)
    def _add() -> None:
        start = pl.multiple_of(key_block * key_size, key_size)
        scores = _multiply(k[...], q[...], 1, 1)  # [keys, queries]
        slope = None
        if cap is not None:
            bounded = jnp.tanh(scores / cap)
            scores = cap * bounded
            slope = 1.0 - bounded * bounded
        visible = key_segments[...] == query_segments[...]
        for query_slots in slots:
            key_slots = start + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            query_slots = jnp.broadcast_to(query_slots[...], scores.shape)
            visible = visible & mask_function(query_slots, key_slots)
        weights = jnp.where(visible, jnp.exp(scores - logsumexp[...]), 0.0)
        gradient = weights * (_multiply(v[...], cotangent[...], 1, 1) - products[...])
        if slope is not None:
            gradient = gradient * slope
        weights, gradient = weights.astype(v.dtype), gradient.astype(k.dtype)
        keys = pl.ds(start, key_size)
        dv_sum[keys, :] += _multiply(weights, cotangent[...], 1, 0)
        dk_sum[keys, :] += _multiply(gradient, q[...], 1, 0)
        dq_sum[...] += _multiply(gradient, k[...], 0, 0)

    @pl.when(is_last)
    def _write_queries() -> None:
        dq[...] = dq_sum[...].astype(dq.dtype)

    @pl.when(is_last & (query_block == n_query_blocks - 1) & (member == n_members - 1))
    def _write_keys() -> None:
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _multiply(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Returns the fp32 sum of products over an axis of x and an axis of y."""
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
