"""The programs of flash attention in Triton's language: each computes a block, and visits others.

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
from lora_jax.models.layers.masks import BRANCHES

_HIDDEN = tl.constexpr(-1e30)  # the score of a key that is not seen
_ROOT = tl.constexpr(-BRANCHES)
_LOG2_E = tl.constexpr(1.4426950408889634)
# The PTX of CUDA 12.7: the first that knows Blackwell. Triton would write that of its own, newest
# assembler, which the one beside JAX refuses.
_PTX = 86


def run_triton(
    *operands: jax.Array, name: str, how: FlashOptions, results: list[jax.ShapeDtypeStruct]
) -> Any:
    """Runs a program; see ``flash_call.run`` for its operands and results."""
    kernel, grid, sizes = program_of(name, how, operands)
    with jax.named_scope(name):
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            out_type=results,
            grid=grid,
            name=name,
            num_warps=4 if sizes["WIDTH"] <= 64 else 8,
            num_stages=2,
            backend_options={"ptx_version": _PTX, "enable_fp_fusion": True},
            **sizes,
        )


def program_of(name: str, how: FlashOptions, operands: Any) -> tuple[Any, tuple[int, ...], Any]:
    """Returns a program, its grid, and its constants."""
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
        "BLOCK_Q": how.queries,
        "BLOCK_K": how.keys,
        "CAUSAL": how.causal,
        "BRANCHED": how.branched,
        "SCALE": how.scale,
        "CAP": how.cap or 0.0,
    }
    if name == "flash_dkv":
        return flash_dkv, (keys // how.keys, kv_heads, batch), sizes
    kernel = flash_fwd if name == "flash_fwd" else flash_dq
    return kernel, (queries // how.queries, heads, batch), sizes


@triton.jit
def _load(array, rows, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Returns rows of a head, [rows, WIDTH], zero behind the head's own numbers."""
    columns = tl.arange(0, WIDTH)
    at = array + rows[:, None] * stride + columns[None, :]
    if HEAD_DIM == WIDTH:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return block


@triton.jit
def _store(array, rows, stride, block, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    at = array + rows[:, None] * stride + columns[None, :]
    block = block.to(array.dtype.element_ty)
    if HEAD_DIM == WIDTH:
        tl.store(at, block)
    else:
        tl.store(at, block, mask=columns[None, :] < HEAD_DIM)


@triton.jit
def _see(slots, other, segments, others, window, CAUSAL: tl.constexpr, BRANCHED: tl.constexpr):
    """Returns [queries, keys]: whether a query of these slots may look."""
    distance = slots[:, None] - other[None, :]
    same = segments[:, None] == others[None, :]
    if BRANCHED:
        same = same | ((segments & _ROOT)[:, None] == others[None, :])
    seen = same & (distance < window)
    if CAUSAL:
        seen = seen & (distance >= 0)
    return seen


@triton.jit
def _score(q, k, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Returns the scores of a block, [queries, keys] in fp32."""
    scores = tl.dot(q, tl.trans(k)) * SCALE
    if CAP > 0.0:
        scores = CAP * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2_E / CAP)) + 1.0))
    return scores


@triton.jit
def _weigh(q, k, v, seen, out, lse, mean, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Returns a block's weights, and the gradient of its scores without their scale."""
    scores = _score(q, k, SCALE, CAP)
    weights = tl.where(seen, tl.exp2(scores * _LOG2_E - lse[:, None]), 0.0)
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
    others,
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
    """Computes a block of queries: a running maximum, a running sum, and the sum of values."""
    i, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mine = tl.load(slots + rows)
    of_mine = tl.load(segments + row * QUERIES + rows)
    near = tl.load(window)
    q += (row * QUERIES * HEADS + head) * HEAD_DIM
    k += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    v += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    out += (row * QUERIES * HEADS + head) * HEAD_DIM
    queries = _load(q, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    largest = tl.full((BLOCK_Q,), _HIDDEN, tl.float32)
    summed = tl.zeros((BLOCK_Q,), tl.float32)
    at = row * (QUERIES // BLOCK_Q) + i
    for j in range(tl.load(start + at), tl.load(stop + at)):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        of_keys = tl.load(others + row * KEYS + keys)
        seen = _see(mine, keys, of_mine, of_keys, near, CAUSAL, BRANCHED)
        block = _load(k, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        scores = tl.where(seen, _score(queries, block, SCALE, CAP) * _LOG2_E, _HIDDEN)
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now[:, None])
        shrunk = tl.exp2(largest - now)
        values = _load(v, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        total = total * shrunk[:, None] + tl.dot(weights.to(values.dtype), values)
        summed = summed * shrunk + tl.sum(weights, 1)
        largest = now
    summed = tl.maximum(summed, 1.1754943508222875e-38)  # padding's, if it visits nothing
    _store(out, rows, HEADS * HEAD_DIM, total / summed[:, None], HEAD_DIM, WIDTH)
    tl.store(lse + (row * HEADS + head) * QUERIES + rows, largest + tl.log2(summed))


@triton.jit
def flash_dq(
    start,
    stop,
    slots,
    segments,
    others,
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
    mine = tl.load(slots + rows)
    of_mine = tl.load(segments + row * QUERIES + rows)
    near = tl.load(window)
    of_head = (row * QUERIES * HEADS + head) * HEAD_DIM
    k += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    v += (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    queries = _load(q + of_head, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    out = _load(cotangent + of_head, rows, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    sums = tl.load(lse + (row * HEADS + head) * QUERIES + rows)
    means = tl.load(mean + (row * HEADS + head) * QUERIES + rows)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    at = row * (QUERIES // BLOCK_Q) + i
    for j in range(tl.load(start + at), tl.load(stop + at)):
        keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
        of_keys = tl.load(others + row * KEYS + keys)
        seen = _see(mine, keys, of_mine, of_keys, near, CAUSAL, BRANCHED)
        block = _load(k, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        values = _load(v, keys, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
        _, slopes = _weigh(queries, block, values, seen, out, sums, means, SCALE, CAP)
        total += tl.dot(slopes.to(block.dtype), block)
    _store(dq + of_head, rows, HEADS * HEAD_DIM, total * SCALE, HEAD_DIM, WIDTH)


@triton.jit
def flash_dkv(
    start,
    stop,
    slots,
    segments,
    others,
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
    """Computes the gradients of a block of keys and of values, over the heads that look at them."""
    i, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    rows = i * BLOCK_K + tl.arange(0, BLOCK_K)
    of_mine = tl.load(others + row * KEYS + rows)
    near = tl.load(window)
    of_head = (row * KEYS * KV_HEADS + kv_head) * HEAD_DIM
    keys = _load(k + of_head, rows, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    values = _load(v + of_head, rows, KV_HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
    of_keys = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    of_values = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    at = row * (KEYS // BLOCK_K) + i
    first, last = tl.load(start + at), tl.load(stop + at)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        looking = (row * QUERIES * HEADS + head) * HEAD_DIM
        numbers = (row * HEADS + head) * QUERIES
        for j in range(first, last):
            at_queries = j * BLOCK_K + tl.arange(0, BLOCK_K)
            of_queries = tl.load(segments + row * QUERIES + at_queries)
            seen = _see(
                tl.load(slots + at_queries), rows, of_queries, of_mine, near, CAUSAL, BRANCHED
            )
            queries = _load(q + looking, at_queries, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
            out = _load(cotangent + looking, at_queries, HEADS * HEAD_DIM, HEAD_DIM, WIDTH)
            sums = tl.load(lse + numbers + at_queries)
            means = tl.load(mean + numbers + at_queries)
            weights, slopes = _weigh(queries, keys, values, seen, out, sums, means, SCALE, CAP)
            of_keys += tl.dot(tl.trans(slopes.to(queries.dtype)), queries)
            of_values += tl.dot(tl.trans(weights.to(out.dtype)), out)
    _store(dk + of_head, rows, KV_HEADS * HEAD_DIM, of_keys * SCALE, HEAD_DIM, WIDTH)
    _store(dv + of_head, rows, KV_HEADS * HEAD_DIM, of_values, HEAD_DIM, WIDTH)
