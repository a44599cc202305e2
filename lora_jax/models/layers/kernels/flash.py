"""Attention by a Triton kernel for NVIDIA GPUs, without scores in memory.

FlashAttention-2 (Dao 2023), compiled by Triton (see `flash_call`), under the masks of this package:
a kernel visits blocks of queries and keys, and leaves out those in front of the first and behind
the last that sees anything. Which these are follows from the slots and the segments of the blocks,
so that packed rows cost what their texts cost. Within a block, the mask is computed from slots and
segments. Padding is a segment of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.layers.attention import (
    KERNEL_OUTPUT,
    AttentionCall,
    AttentionInputs,
    Implementation,
)
from lora_jax.models.layers.blockwise import ON_GPU, Blockwise
from lora_jax.models.layers.kernels.flash_call import (
    FlashOptions,
    FlashTokens,
    missing_compiler,
    run_program,
)
from lora_jax.models.layers.masks import Mask, Split, prompt_segments, visited_blocks, visits_scope

_NO_WINDOW = 1 << 30  # a window that hides nothing


@dataclasses.dataclass(frozen=True)
class Flash(Implementation):
    """Computes attention by the kernel; see ``attend`` for the arguments.

    A row whose length is no multiple of a block is padded. Calls that the kernel does not support
    (see ``refusal``) go block by block in plain JAX. Scores and softmax are fp32. There is no
    forward mode.

    Attributes:
      queries: queries per block, forward and in the gradient of queries; a power of 2.
      keys: keys per block, and queries per block in the gradient of keys; a power of 2.
      fallback: computes what the kernel refuses.

    >>> from lora_jax.models.layers.kernels.flash import Flash
    >>> Flash(queries=64, keys=64).pairs(128) / 128**2  # causal: three of four blocks
    0.75
    """

    queries: int = 128
    keys: int = 64
    fallback: Blockwise = ON_GPU

    def __post_init__(self) -> None:
        if any(n < 16 or n & (n - 1) for n in (self.queries, self.keys)):
            raise ValueError(
                f"{self} is not valid. Pass powers of 2, of at least 16, for queries and keys."
            )

    def refusal(self, call: AttentionCall) -> str | None:
        """Returns the reason why the kernel cannot run a call; None if it can."""
        reason = call.kernel_refusal((jnp.bfloat16, jnp.float16, jnp.float32))
        if reason is not None:
            return reason
        if call.head_dim > 256:
            return f"the kernel's heads have 256 numbers at most, not {call.head_dim}"
        block = max(self.queries, self.keys)
        if call.split and call.queries % block:
            return f"a device has {call.queries} tokens of a row, no multiple of {block}"
        return missing_compiler()

    def pairs(
        self,
        seq: int,
        split: Split | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> int:
        """Returns the number of scores per head for a row with one text.

        Args:
          seq: the number of tokens.
          split: options they are split over devices; the number counts all devices together.
          causal, window: the mask's.
        """
        seq += -seq % max(self.queries, self.keys)
        slots = np.arange(seq) if split is None else split.slots(seq).reshape(-1)
        sizes = (self.queries, self.keys)
        visits = visited_blocks(slots, np.arange(seq), sizes, causal=causal, window=window)
        return int(np.sum(visits)) * math.prod(sizes)

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        if self.refusal(inputs.call):
            return self.fallback(*inputs)
        return self.compute_with_sums(inputs)[0]

    def compute_with_sums(self, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """Computes attention and the log of its softmax sums, both differentiable.

        Results over parts of the keys are joined by them.

        Args:
          inputs: a call that the kernel supports.

        Returns:
          The attention, [batch, seq, heads, head_dim]; and log(sum(exp(scores))) over the keys
          that each query sees, [batch, seq, heads] in fp32. Sinks are no part of it.
        """
        _, _, _, mask, scale, cap, sinks = inputs
        _, seq, _, head_dim = inputs.q.shape
        if isinstance(scale, jax.Array):  # the kernel takes no traced factor
            inputs = inputs._replace(q=inputs.scaled_queries)
            scale = 1.0
        q, k, v, *segments = inputs.padded(max(self.queries, self.keys))
        query_slots = mask.queries.slots
        if mask.split is None:
            query_slots = jnp.arange(q.shape[1], dtype=jnp.int32)
        window = _NO_WINDOW if mask.window is None else mask.window
        has_window = True if mask.windowed is None else mask.windowed
        tokens = FlashTokens(
            slots=query_slots,
            queries=segments[0],
            keys=segments[1],
            window=jnp.where(has_window, window, _NO_WINDOW)[None],
        )
        # Shared memory is small: 99 KiB on Ada. Wide heads and fp32 take smaller blocks.
        width = 1 << (head_dim - 1).bit_length()
        if width * q.dtype.itemsize <= 256:
            divisor = 1
        else:
            divisor = 2 if width <= 128 else 4
        options = FlashOptions(
            causal=mask.causal,
            branched=inputs.call.branched,
            scale=head_dim**-0.5 if scale is None else float(scale),
            cap=cap,
            queries=max(16, self.queries // divisor),
            keys=max(16, self.keys // divisor),
        )
        with jax.named_scope(self._visited(q.shape[1], k.shape[1], mask)):
            out, lse = _attention(options, q, k, v, tokens)
        sums = lse.swapaxes(1, 2) * math.log(2)  # [batch, queries, heads]
        if sinks is not None:
            # The sum of weights is exp(sums) without sinks, and exp(sums) + exp(sink) with them.
            share = jax.nn.sigmoid(sums - sinks.astype(sums.dtype))
            out = (out.astype(share.dtype) * share[..., None]).astype(q.dtype)
        return out[:, :seq], sums[:, :seq]

    def _visited(self, queries: int, keys: int, mask: Mask) -> str:
        """Returns the number of visited blocks for a row with one text; see ``Splash``."""
        parts = mask.split.parts if mask.split else 1
        block_scores = self.queries * self.keys
        windows = [mask.window]
        if mask.windowed is not None and mask.window is not None:
            windows.insert(0, None)
        n_visited = []
        for window in windows:
            n_scores = self.pairs(keys, mask.split, causal=mask.causal, window=window)
            n_visited.append(n_scores // block_scores)
        return visits_scope(n_visited, parts * queries * keys // block_scores)


def _block_bounds(
    options: FlashOptions, tokens: FlashTokens, sizes: tuple[int, int], axis: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the first block to visit and the end of the range, [batch, blocks] int32.

    Args:
      options: the mask's facts.
      tokens: the mask's tokens.
      sizes: queries and keys per block.
      axis: 1 for the keys that a block of queries visits, 0 for the opposite.
    """
    # Blocks that the causal mask and the window leave: [blocks of queries, blocks of keys].
    key_slots = jnp.arange(tokens.keys.shape[1], dtype=jnp.int32)
    visits = visited_blocks(
        tokens.slots, key_slots, sizes, causal=options.causal, window=tokens.window[0]
    )
    query_size, key_size = sizes
    # Of these, blocks whose ranges of segments overlap.
    query_segments = tokens.queries.reshape(tokens.queries.shape[0], -1, query_size)
    key_segments = tokens.keys.reshape(tokens.keys.shape[0], -1, key_size)
    query_min, query_max = query_segments.min(2)[:, :, None], query_segments.max(2)[:, :, None]
    key_min, key_max = key_segments.min(2)[:, None], key_segments.max(2)[:, None]
    if options.branched:  # completions see their prompts
        query_min = prompt_segments(query_segments).min(2)[:, :, None]
    segments_overlap = (query_min <= key_max) & (key_min <= query_max)
    visits = visits & segments_overlap
    if axis == 0:
        visits = visits.swapaxes(1, 2)
    n_blocks = visits.shape[2]
    start = jnp.argmax(visits, axis=2)
    stop = n_blocks - jnp.argmax(visits[..., ::-1], axis=2)
    stop = jnp.where(visits.any(2), stop, start)  # an empty range where nothing is visited
    return start.astype(jnp.int32), stop.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: FlashOptions, q: jax.Array, k: jax.Array, v: jax.Array, tokens: FlashTokens
) -> tuple[jax.Array, jax.Array]:
    """Returns attention, and the base-2 logarithm of each query's softmax sum."""
    return _forward(options, q, k, v, tokens)[0]


def _forward(
    options: FlashOptions, q: jax.Array, k: jax.Array, v: jax.Array, tokens: FlashTokens
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Returns the results of ``_attention``, and the residuals for its gradient."""
    query_bounds = _block_bounds(options, tokens, (options.queries, options.keys), 1)
    out, lse = run_program("flash_fwd", options, query_bounds, tokens, (q, k, v))
    out = checkpoint_name(out, KERNEL_OUTPUT)
    lse = checkpoint_name(lse, KERNEL_OUTPUT)
    return (out, lse), (q, k, v, tokens, out, lse)


def _backward(
    options: FlashOptions, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    """Returns the gradients of q, k and v, from the log sums of the forward pass."""
    q, k, v, tokens, out, lse = residuals
    out_cotangent, lse_cotangent = cotangents
    # The mean cotangent of each query's weights, [batch, heads, queries].
    products = out.astype(jnp.float32) * out_cotangent.astype(jnp.float32)
    mean_cotangent = jnp.sum(products, axis=-1).transpose(0, 2, 1)
    mean_cotangent = mean_cotangent - lse_cotangent / math.log(2)
    arrays = (q, k, v, out_cotangent, lse, mean_cotangent)
    query_bounds = _block_bounds(options, tokens, (options.queries, options.keys), 1)
    key_bounds = _block_bounds(options, tokens, (options.keys, options.keys), 0)
    (q_grad,) = run_program("flash_dq", options, query_bounds, tokens, arrays)
    k_grad, v_grad = run_program("flash_dkv", options, key_bounds, tokens, arrays)
    return q_grad, k_grad, v_grad, None


_attention.defvjp(_forward, _backward)
