"""Attention of transformers' modules by `lora_jax.models.layers.attend`."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lora_jax.models.layers.attend import Attend, attend
from lora_jax.models.layers.attention import AttentionInputs, soft_cap, wide_dtype
from lora_jax.models.layers.masks import Mask, MaskTokens
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.torch.backend import call_jax, to_torch
from lora_jax.torch.packages import TorchModelError

NAME = "lora_jax"


class Attending(NamedTuple):
    """The implementation of attention in use.

    Attributes:
      attention, placement: see `attend`.
      keeps_masks: whether each mask is an array, also where it says no more than "causal".
      segments: [batch, seq] int32: a token sees those of its own segment only; None for all.
      unpadded: whether the module's attention mask is of ones.
      cached: the slots of a cache that each token may see; None without a cache.
    """

    attention: str | Attend = "auto"
    placement: Placement = UNPLACED
    keeps_masks: bool = False
    segments: jax.Array | None = None
    unpadded: bool = False
    cached: Mask | None = None


_CHOSEN: ContextVar[Attending] = ContextVar("attention", default=Attending())  # noqa: B039  it is immutable


@contextlib.contextmanager
def attending(chosen: Attending) -> Iterator[None]:
    """Sets the implementation of attention within a block."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Returns a mask, [batch, 1, queries, keys] bool; None for one that is causal and no more.

    A model that looks into its masks, or lays others over them, allows no None.
    """
    chosen = _CHOSEN.get()
    if chosen.unpadded or chosen.segments is not None:  # padding is a segment of its own
        attention_mask = None
    plain = mask_function is causal_mask_function or (local_size or 0) >= kv_length
    same_length = q_length == kv_length or chosen.cached is not None
    plain = plain and allow_is_causal_skip and attention_mask is None and same_length
    if plain and not chosen.keeps_masks:
        return None
    if chosen.cached is not None:
        return _placed_mask(mask_function, chosen.cached)
    if chosen.segments is not None:
        return _placed_mask(mask_function, _mask_of_segments(chosen.segments))
    options |= {"mask_function": mask_function, "local_size": local_size}
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    seen: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **options | {"use_vmap": False},  # torchax cannot map
    )
    return seen


def _mask_of_segments(segments: jax.Array) -> Mask:
    """Returns the mask of rows whose segments, [batch, seq], each count positions from 0."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.argmax(segments[:, :, None] == segments[:, None, :], axis=2)
    tokens = MaskTokens(slots, slots - begins, segments)
    return Mask(queries=tokens, keys=tokens, causal=False, aligned=True)


def _placed_mask(mask_function: Any, mask: Mask) -> torch.Tensor:
    """Returns [batch, 1, queries, keys]: what a function of positions lets see within a mask."""
    queries, slots = mask.queries.positions, mask.keys.positions
    assert queries is not None and slots is not None, "the tokens have positions"
    rows, head = jnp.arange(len(slots), dtype=jnp.int32), jnp.zeros((1, 1, 1, 1), jnp.int32)
    at = (rows[:, None, None, None], head, queries[:, None, :, None], slots[:, None, None, :])
    visible = mask.visible()[:, None]
    seen: torch.Tensor = call_jax(lambda own: own & visible, mask_function(*to_torch(at)))
    return seen


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention as transformers calls it: heads lead, [batch, heads, seq, head_dim]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if any(options.get(name) is not None for name in ("position_bias", "head_mask", "alibi")):
        raise NotImplementedError(f"{type(module).__name__} adds a bias to its scores")
    out = call_jax(
        _attend, query, key, value, attention_mask, scaling, softcap, s_aux, bool(causal)
    )
    return out, None


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    array: jax.Array | None,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Computes [batch, seq, heads, head_dim]; an array for a mask is of bools or of numbers to add.

    Without one it is `attend`'s, for which zeros fill up the narrower values of latent attention.
    """
    batch, heads, n, size = q.shape
    kv_heads, m, width = v.shape[1:]
    scale = size**-0.5 if scale is None else scale
    chosen = _CHOSEN.get()
    seen = chosen.cached
    if array is None and seen is not None and not causal:
        raise TorchModelError("it attends to more than the tokens so far")
    if array is None and (seen is not None or n == m):
        if seen is None:
            slots = jnp.arange(n, dtype=jnp.int32)
            tokens = MaskTokens(slots, jnp.broadcast_to(slots, (batch, n)), chosen.segments)
            seen = Mask(queries=tokens, keys=tokens, causal=causal, aligned=True)
        q, k, v = (_widened(x.swapaxes(1, 2), max(size, width)) for x in (q, k, v))
        inputs = AttentionInputs(q, k, v, seen, scale, cap, sinks)
        return attend(inputs, attention=chosen.attention, placement=chosen.placement)[..., :width]
    wide = wide_dtype(q.dtype)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, n, size)
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", grouped, k, preferred_element_type=wide) * scale
    scores = soft_cap(scores.reshape(batch, heads, n, m), cap)
    if array is None and causal:
        array = jnp.tril(jnp.ones((n, m), bool), m - n)[None, None]
    if array is not None:
        array = array[..., :m]
        is_bool = array.dtype == bool
        scores = jnp.where(array, scores, jnp.finfo(wide).min) if is_bool else scores + array
    if sinks is not None:
        each = jnp.broadcast_to(sinks.astype(wide)[:, None, None], (batch, heads, n, 1))
        scores = jnp.concatenate([scores, each], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :m].astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, n, m)
    out = jnp.einsum("bhgqk,bhkd->bqhgd", weights, v)
    return out.reshape(batch, n, heads, width)


def _widened(x: jax.Array, width: int) -> jax.Array:
    more = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
