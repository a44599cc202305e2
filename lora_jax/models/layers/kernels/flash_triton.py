"""The programs of flash attention in Triton: each computes one block, and visits others.

A program is given the first block to visit and the one behind the last, then the arrays of
`FlashTokens`, then its own arrays and its results. The packages `triton` and `jax_triton` are
needed (extra `gpu-kernels`).
"""

# Triton's language is not Python's: its functions have no types that Python knows.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import jax
import jax_triton
import triton
import triton.language as tl

from lora_jax.models.layers.kernels.flash_call import FlashOptions
from lora_jax.models.layers.masks import MAX_BRANCHES

_HIDDEN_SCORE = tl.constexpr(-1e30)  # the score of a key that is not seen
_PROMPT_BITS = tl.constexpr(-MAX_BRANCHES)
_LOG2_E = tl.constexpr(1.4426950408889634)
# The PTX of CUDA 12.7: the first that knows Blackwell. Triton would write that of its own, newest
# assembler, which the one beside JAX refuses.
_PTX_VERSION = 86


def run_triton(
    *operands: jax.Array, name: str, options: FlashOptions, results: list[jax.ShapeDtypeStruct]
) -> Any:
    """Runs a program; see ``flash_call.run_program`` for its operands and results."""
    kernel, grid, sizes = program_of(name, options, operands)
    with jax.named_scope(name):
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            out_type=results,
            grid=grid,
            name=name,
            num_warps=4 if sizes["WIDTH"] <= 64 else 8,
            num_stages=2,
            backend_options={"ptx_version": _PTX_VERSION, "enable_fp_fusion": True},
            **sizes,
        )


def program_of(name: str, options: FlashOptions, operands: Any) -> tuple[Any, tuple[int, ...], Any]:
    """Returns a program with its grid and constants."""
    q, k = operands[6:8]
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    sizes = {
        "QUERIES": queries,
        "KEYS": keys,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": options.queries,
        "BLOCK_K": options.keys,
        "CAUSAL": options.causal,
        "BRANCHED": options.branched,
        "SCALE": options.scale,
        "CAP": options.cap or 0.0,
    }
    if name == "flash_dkv":
        return flash_dkv, (keys // options.keys, kv_heads, batch), sizes
    kernel = flash_fwd if name == "flash_fwd" else flash_dq
    return kernel, (queries // options.queries, heads, batch), sizes


@triton.jit
def _load_rows(array, rows, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows of a head, [rows, WIDTH], with zeros beyond the head's size."""
    columns = tl.arange(0, WIDTH)
    pointers = array + rows[:, None] * stride + columns[None, :]
    if HEAD_DIM == WIDTH:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return block


@triton.jit
def _store_rows(array, rows, stride, block, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Stores rows of a head, [rows, WIDTH], without the padding columns."""
    columns = tl.arange(0, WIDTH)
    pointers = array + rows[:, None] * stride + columns[None, :]
    block = block.to(array.dtype.element_ty)
    if HEAD_DIM == WIDTH:
        tl.store(pointers, block)
    else:
        tl.store(pointers, block, mask=columns[None, :] < HEAD_DIM)


@triton.jit
def _visible_keys(
    query_slots,
    key_slots,
    query_segments,
    key_segments,
    window,
    CAUSAL: tl.constexpr,
    BRANCHED: tl.constexpr,
):
    """Returns [queries, keys]: whether a query may see a key, by slots and segments."""
    distance = query_slots[:, None] - key_slots[None, :]
    visible = query_segments[:, None] == key_segments[None, :]
    if BRANCHED:
        visible = visible | ((query_segments & _PROMPT_BITS)[:, None] == key_segments[None, :])
    visible = visible & (distance < window)
    if CAUSAL:
        visible = visible & (distance >= 0)
    return visible


@triton.jit
def _compute_scores(q, k, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Returns the scores of a block, [queries, keys] in fp32."""
    scores = tl.dot(q, tl.trans(k)) * SCALE
    if CAP > 0.0:
        scores = CAP * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2_E / CAP)) + 1.0))
    return scores


@triton.jit
def _weights_and_slopes(q, k, v, visible, out, lse, mean, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Returns a block's softmax weights, and the gradient of its unscaled scores."""
    scores = _compute_scores(q, k, SCALE, CAP)
    weights = tl.where(visible, tl.exp2(scores * _LOG2_E - lse[:, None]), 0.0)
    slopes = weights * (tl.dot(out, tl.trans(v)) - mean[:, None])
    if CAP > 0.0:
        slopes = slopes * (1.0 - (scores / CAP) * (scores / CAP))
    return weights, slopes


@triton.jit
def flash_fwd(
    start,
    stop,
    slots,
    segments,
    key_segments,
    window,
    q,
    k,
    v,
    out,
    lse,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    BRANCHED: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
):
    """Computes the output of a block of queries, by the online softmax."""
    # The program's block of queries, head and row of the batch.
    i, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_slots = tl.load(slots + rows)
    query_segments = tl.load(segments + row * QUERIES + rows)
    window_size = tl.load(window)
    # Pointers to the row's first token of this head.
    q += (row * QUERIES * HEADS + head) * HEAD_DIM
    k += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    v += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    out += (row * QUERIES * HEADS + head) * HEAD_DIM
    queries = _load_rows(q, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    # The running sum of values, the running maximum, and the running sum of weights.
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    largest = tl.full((BLOCK_Q,), _HIDDEN_SCORE, tl.float32)
    weight_sum = tl.zeros((BLOCK_Q,), tl.float32)
    bounds_index = row * (QUERIES // BLOCK_Q) + i
    for j in range(tl.load(start + bounds_index), tl.load(stop + bounds_index)):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        block_segments = tl.load(key_segments + row * KEYS + keys)
        visible = _visible_keys(
            query_slots, keys, query_segments, block_segments, window_size, CAUSAL, BRANCHED
        )
        block_keys = _load_rows(k, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        scores = tl.where(
            visible, _compute_scores(queries, block_keys, SCALE, CAP) * _LOG2_E, _HIDDEN_SCORE
        )
        # A new maximum rescales the sums so far.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        values = _load_rows(v, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        total = total * rescale[:, None] + tl.dot(weights.to(values.dtype), values)
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
        largest = new_largest
    weight_sum = tl.maximum(weight_sum, 1.1754943508222875e-38)  # padding's, if it visits nothing
    _store_rows(out, rows, HEADS * HEAD_DIM, total / weight_sum[:, None], HEAD_DIM, WIDTH)
    tl.store(lse + (row * HEADS + head) * QUERIES + rows, largest + tl.log2(weight_sum))


@triton.jit
def flash_dq(
    start,
    stop,
    slots,
    segments,
    key_segments,
    window,
    q,
    k,
    v,
    cotangent,
    lse,
    mean,
    dq,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    BRANCHED: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
):
    """Computes the gradient of a block of queries."""
    i, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_slots = tl.load(slots + rows)
    query_segments = tl.load(segments + row * QUERIES + rows)
    window_size = tl.load(window)
    head_offset = (row * QUERIES * HEADS + head) * HEAD_DIM
    k += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    v += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    queries = _load_rows(q + head_offset, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    out = _load_rows(cotangent + head_offset, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    sums = tl.load(lse + (row * HEADS + head) * QUERIES + rows)
    means = tl.load(mean + (row * HEADS + head) * QUERIES + rows)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    bounds_index = row * (QUERIES // BLOCK_Q) + i
    for j in range(tl.load(start + bounds_index), tl.load(stop + bounds_index)):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        block_segments = tl.load(key_segments + row * KEYS + keys)
        visible = _visible_keys(
            query_slots, keys, query_segments, block_segments, window_size, CAUSAL, BRANCHED
        )
        block_keys = _load_rows(k, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        values = _load_rows(v, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        _, slopes = _weights_and_slopes(
            queries, block_keys, values, visible, out, sums, means, SCALE, CAP
        )
        total += tl.dot(slopes.to(block_keys.dtype), block_keys)
    _store_rows(dq + head_offset, rows, HEADS * HEAD_DIM, total * SCALE, HEAD_DIM, WIDTH)


@triton.jit
def flash_dkv(
    start,
    stop,
    slots,
    segments,
    key_segment_array,
    window,
    q,
    k,
    v,
    cotangent,
    lse,
    mean,
    dk,
    dv,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    BRANCHED: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
):
    """Computes the gradients of a block of keys and values, over the heads that use them."""
    i, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    rows = i * BLOCK_K + tl.arange(0, BLOCK_K)
    key_segments = tl.load(key_segment_array + row * KEYS + rows)
    window_size = tl.load(window)
    head_offset = (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    keys = _load_rows(k + head_offset, rows, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    values = _load_rows(v + head_offset, rows, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    dk_sum = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    dv_sum = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    bounds_index = row * (KEYS // BLOCK_K) + i
    first_block, stop_block = tl.load(start + bounds_index), tl.load(stop + bounds_index)
    # All query heads of the group, and in each all blocks of queries that see these keys.
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        query_offset = (row * QUERIES * HEADS + head) * HEAD_DIM
        row_offset = (row * HEADS + head) * QUERIES
        for j in range(first_block, stop_block):
            query_rows = j * BLOCK_K + tl.arange(0, BLOCK_K)
            query_segments = tl.load(segments + row * QUERIES + query_rows)
            visible = _visible_keys(
                tl.load(slots + query_rows),
                rows,
                query_segments,
                key_segments,
                window_size,
                CAUSAL,
                BRANCHED,
            )
            queries = _load_rows(q + query_offset, query_rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
            out = _load_rows(
                cotangent + query_offset, query_rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH
            )
            sums = tl.load(lse + row_offset + query_rows)
            means = tl.load(mean + row_offset + query_rows)
            weights, slopes = _weights_and_slopes(
                queries, keys, values, visible, out, sums, means, SCALE, CAP
            )
            dk_sum += tl.dot(tl.trans(slopes.to(queries.dtype)), queries)
            dv_sum += tl.dot(tl.trans(weights.to(out.dtype)), out)
    _store_rows(dk + head_offset, rows, KV_HEADS * HEAD_DIM, dk_sum * SCALE, HEAD_DIM, WIDTH)
    _store_rows(dv + head_offset, rows, KV_HEADS * HEAD_DIM, dv_sum, HEAD_DIM, WIDTH)
