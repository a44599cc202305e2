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
from lora_jax.torch.backend import call_jax

NAME = "lora_jax"


class _Chosen(NamedTuple):
    """The implementation of attention in use.

    Attributes:
      attention, placement: see `attend`.
      keeps_masks: whether each mask is an array, also where it says no more than "causal".
      segments: [batch, seq] int32: a token sees those of its own segment only; None for all.
      unpadded: whether the module's attention mask is of ones.
    """

    attention: str | Attend = "auto"
    placement: Placement = UNPLACED
    keeps_masks: bool = False
    segments: jax.Array | None = None
    unpadded: bool = False


_CHOSEN: ContextVar[_Chosen] = ContextVar("attention", default=_Chosen())  # noqa: B039  it is immutable


@contextlib.contextmanager
def attending(
    attention: str | Attend = "auto",
    placement: Placement = UNPLACED,
    *,
    keeps_masks: bool = False,
    segments: jax.Array | None = None,
    unpadded: bool = False,
) -> Iterator[None]:
    """Sets the implementation of attention within a block; see `attend` and `Mask`."""
    token = _CHOSEN.set(_Chosen(attention, placement, keeps_masks, segments, unpadded))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
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
    plain = plain and allow_is_causal_skip and attention_mask is None and q_length == kv_length
    if plain and not chosen.keeps_masks:
        return None
    options |= {"allow_is_bidirectional_skip": False, "use_vmap": False}  # torchax cannot map
    seen: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **options,
    )
    if chosen.segments is None or seen is None:
        return seen
    same = chosen.segments[:, None, :, None] == chosen.segments[:, None, None, :]
    alike: torch.Tensor = call_jax(lambda x: x & same, seen)
    return alike


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
    mask: jax.Array | None,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Computes [batch, seq, heads, head_dim]; without a mask by `attend`.

    Heads of latent attention have narrower values than keys: zeros fill them up.
    """
    if mask is not None or q.shape[2] != k.shape[2]:
        return _masked(q, k, v, mask, scale, cap, sinks, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_out, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    chosen, seq = _CHOSEN.get(), q.shape[2]
    slots = jnp.arange(seq, dtype=jnp.int32)
    positions = jnp.broadcast_to(slots, (q.shape[0], seq))
    tokens = MaskTokens(slots, positions, chosen.segments)
    seen = Mask(queries=tokens, keys=tokens, causal=causal, aligned=True)
    q, k, v = (_widened(x.swapaxes(1, 2), width) for x in (q, k, v))
    inputs = AttentionInputs(q, k, v, seen, scale, cap, sinks)
    return attend(inputs, attention=chosen.attention, placement=chosen.placement)[..., :n_out]


def _widened(x: jax.Array, width: int) -> jax.Array:
    more = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def _masked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Computes attention with a mask as an array: bool, or a number to add to the scores."""
    wide = wide_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    q = q.reshape(q.shape[0], k.shape[1], groups, *q.shape[2:])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=wide) * scale
    scores = soft_cap(scores, cap)
    if mask is None and causal:
        n, m = scores.shape[-2:]
        mask = jnp.tril(jnp.ones((n, m), bool), m - n)[None, None]
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        mask = (
            mask[:, :, None]
            if mask.shape[1] == 1
            else mask.reshape(mask.shape[0], *q.shape[1:3], *mask.shape[2:])
        )
        least = jnp.finfo(wide).min
        scores = jnp.where(mask, scores, least) if mask.dtype == bool else scores + mask
    if sinks is not None:
        each = sinks.astype(wide).reshape(k.shape[1], groups, 1, 1)
        each = jnp.broadcast_to(each, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, each], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(v.dtype)
    out = jnp.einsum("bhgqk,bhkd->bqhgd", weights, v)
    return out.reshape(*out.shape[:2], -1, v.shape[-1])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
