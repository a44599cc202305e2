"""Makes transformers' modules compute attention by `lora_jax.models.layers.attend`."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lora_jax.core.names import ALL_SCORES_REASONS
from lora_jax.models.layers.attend import Attend, attend
from lora_jax.models.layers.attention import AttentionInputs, soft_cap, wide_dtype
from lora_jax.models.layers.masks import Mask, MaskTokens
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.torch.backend import call_jax, define_function, to_torch
from lora_jax.torch.packages import TorchModelError

ATTENTION_NAME = "lora_jax"


class AttentionSettings(NamedTuple):
    """The attention settings of the module that is being called.

    Attributes:
      attention, placement: see `attend`.
      keeps_masks: whether each mask is an array, even if it is only causal.
      segments: [batch, seq] int32: a token sees the tokens of its own segment; None for all tokens.
      unpadded: whether the module's attention mask has only ones.
      cached: the slots of a cache that each token may see; None without a cache.
    """

    attention: str | Attend = "auto"
    placement: Placement = UNPLACED
    keeps_masks: bool = False
    segments: jax.Array | None = None
    unpadded: bool = False
    cached: Mask | None = None


_CURRENT_SETTINGS: ContextVar[AttentionSettings] = ContextVar(
    "attention",
    default=AttentionSettings(),  # noqa: B039  it is immutable
)


@contextlib.contextmanager
def use_attention(settings: AttentionSettings) -> Iterator[None]:
    """Sets the settings of attention within a block."""
    token = _CURRENT_SETTINGS.set(settings)
    try:
        yield
    finally:
        _CURRENT_SETTINGS.reset(token)


def current_placement() -> Placement:
    """Returns the placement of the module that is being called."""
    return _CURRENT_SETTINGS.get().placement


def _make_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Returns a mask, [batch, 1, queries, keys] bool; None for a mask that is only causal.

    A model that reads or combines its masks sets `allow_is_causal_skip` to False, and gets no None.
    """
    settings = _CURRENT_SETTINGS.get()
    if settings.unpadded or settings.segments is not None:
        attention_mask = None  # padding is its own segment
    is_causal = mask_function is causal_mask_function or (local_size or 0) >= kv_length
    has_all_keys = q_length == kv_length or settings.cached is not None
    may_skip = allow_is_causal_skip and not settings.keeps_masks
    if is_causal and has_all_keys and may_skip and attention_mask is None:
        return None
    if settings.cached is not None:
        return _mask_by_positions(mask_function, settings.cached)
    if settings.segments is not None:
        return _mask_by_positions(mask_function, _mask_of_segments(settings.segments))
    # Without a cache or segments, transformers computes the mask.
    options |= {
        "mask_function": mask_function,
        "local_size": local_size,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
        "use_vmap": False,  # torchax has no vmap
    }
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options
    )
    return mask


def _mask_of_segments(segments: jax.Array) -> Mask:
    """Returns the mask of rows with several segments, [batch, seq]; each starts at position 0."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    is_same_segment = segments[:, :, None] == segments[:, None, :]  # [batch, seq, seq]
    first_slots = jnp.argmax(is_same_segment, axis=2)  # of each token's segment
    tokens = MaskTokens(slots, slots - first_slots, segments)
    return Mask(queries=tokens, keys=tokens, causal=False, aligned=True)


def _mask_by_positions(mask_function: Any, mask: Mask) -> torch.Tensor:
    """Combines a mask with a function of positions: [batch, 1, queries, keys] bool.

    Args:
      mask_function: transformers' function of (row, head, query position, key position).
      mask: the mask of the queries and keys, with their positions.
    """
    query_positions, key_positions = mask.queries.positions, mask.keys.positions
    assert query_positions is not None and key_positions is not None, "the tokens have positions"
    rows = jnp.arange(len(key_positions), dtype=jnp.int32)
    indices = (
        rows[:, None, None, None],
        jnp.zeros((1, 1, 1, 1), jnp.int32),  # the head
        query_positions[:, None, :, None],
        key_positions[:, None, None, :],
    )
    is_visible = mask.visible()[:, None]
    is_allowed = mask_function(*to_torch(indices))
    combined_mask: torch.Tensor = call_jax(lambda array: array & is_visible, is_allowed)
    return combined_mask


def _run_attention(
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
    """Computes attention with transformers' arguments and axes: [batch, heads, seq, head_dim]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if any(options.get(name) is not None for name in ("position_bias", "head_mask", "alibi")):
        raise NotImplementedError(
            f"{type(module).__name__} adds a bias to its attention scores, which lora_jax's "
            "attention does not support"
        )
    out = call_jax(
        _attend_to_keys, query, key, value, attention_mask, scaling, softcap, s_aux, bool(causal)
    )
    return out, None


def _attend_to_keys(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float | None,
    cap: float | None,
    sinks: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Computes attention by `attend` if the mask follows a known rule, else from all scores.

    Args:
      q: [batch, heads, queries, head_dim].
      k: [batch, kv_heads, keys, head_dim].
      v: [batch, kv_heads, keys, value_dim], which is smaller than head_dim in latent attention.
      mask: [batch or 1, heads or 1, queries, keys], bools or numbers to add to the scores; None for
        the implementation's own mask.
      scale: the factor of the scores; None for 1/sqrt(head_dim).
      cap: the bound of the scores; None for none.
      sinks: [heads], a score of no key; None for none.
      causal: whether a query sees no later key, where there is no mask.

    Returns:
      [batch, queries, heads, value_dim].
    """
    batch, _, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    settings = _CURRENT_SETTINGS.get()
    mask_by_rule = settings.cached
    if mask is None and mask_by_rule is not None and not causal:
        raise TorchModelError("it attends to later tokens, so it cannot generate with a cache")
    has_rule = mask is None and (mask_by_rule is not None or n_queries == n_keys)
    if not has_rule:
        with jax.named_scope(_scope_of_scores(mask)):
            return _attend_by_scores(q, k, v, mask, scale, cap, sinks, causal)
    if mask_by_rule is None:
        # Without a cache, queries and keys are the same tokens.
        slots = jnp.arange(n_queries, dtype=jnp.int32)
        positions = jnp.broadcast_to(slots, (batch, n_queries))
        tokens = MaskTokens(slots, positions, settings.segments)
        mask_by_rule = Mask(queries=tokens, keys=tokens, causal=causal, aligned=True)
    return _attend_by_rule(q, k, v, mask_by_rule, scale, cap, sinks)


def _attend_by_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float | None,
    cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Computes attention by `attend`; see `_attend_to_keys` for the arguments."""
    settings = _CURRENT_SETTINGS.get()
    head_dim, value_dim = q.shape[3], v.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    # `attend` takes [batch, seq, heads, width], with the same width for keys and values.
    width = max(head_dim, value_dim)
    q, k, v = (_pad_last_axis(x.swapaxes(1, 2), width) for x in (q, k, v))
    inputs = AttentionInputs(q, k, v, mask, scale, cap, sinks)
    out = attend(inputs, attention=settings.attention, placement=settings.placement)
    return out[..., :value_dim]


def _scope_of_scores(mask: jax.Array | None) -> str:
    """Returns the name of the scope that says why a call of attention holds all scores."""
    by_mask, by_bias, by_lengths = ALL_SCORES_REASONS
    if mask is None:
        return by_lengths
    return by_mask if mask.dtype == bool else by_bias


def _attend_by_scores(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float,
    cap: float | None,
    sinks: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Computes attention from all scores; see `_attend_to_keys` for the arguments."""
    batch, heads, n_queries, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    wide = wide_dtype(q.dtype)
    # [batch, kv_heads, query heads of a key head, queries, head_dim]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, n_queries, head_dim)
    scores = jnp.einsum("bhgqd,bhkd->bhgqk", grouped, k, preferred_element_type=wide) * scale
    scores = soft_cap(scores.reshape(batch, heads, n_queries, n_keys), cap)
    if mask is None and causal:
        mask = jnp.tril(jnp.ones((n_queries, n_keys), bool), n_keys - n_queries)[None, None]
    if mask is not None:
        mask = mask[..., :n_keys]
        if mask.dtype == bool:
            scores = jnp.where(mask, scores, jnp.finfo(wide).min)
        else:
            scores = scores + mask
    if sinks is not None:
        # Each head has a further score that takes weight from all keys.
        sink_scores = sinks.astype(wide)[:, None, None]
        sink_scores = jnp.broadcast_to(sink_scores, (batch, heads, n_queries, 1))
        scores = jnp.concatenate([scores, sink_scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :n_keys].astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, n_queries, n_keys)
    out = jnp.einsum("bhgqk,bhkd->bqhgd", weights, v)
    return out.reshape(batch, n_queries, heads, value_dim)


def _pad_last_axis(x: jax.Array, width: int) -> jax.Array:
    """Pads the last axis of an array with zeros to a width."""
    missing = width - x.shape[-1]
    if missing == 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def _run_torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Computes ``torch.nn.functional.scaled_dot_product_attention``.

    Calls without a mask run by `attend`, and so do calls with a mask of bools for keys alone, which
    is padding. Other calls hold all scores.

    Args:
      query: [..., heads, queries, head_dim].
      key: [..., kv_heads, keys, head_dim].
      value: [..., kv_heads, keys, value_dim].
      attn_mask: array of bools, or of numbers to add to the scores. Its axes broadcast to those of
        the scores. None for no mask.
      dropout_p: must be 0, as in modules that are in evaluation mode.
      is_causal: whether query i sees no key after key i.
      scale: the factor of the scores; None for 1/sqrt(head_dim).
      enable_gqa: whether keys may have fewer heads than queries.

    Returns:
      [..., heads, queries, value_dim].
    """
    if dropout_p:
        raise NotImplementedError("lora_jax's attention has no dropout of scores")
    if attn_mask is not None and is_causal:
        raise NotImplementedError("torch has no attention with both a mask and is_causal")
    del enable_gqa  # torch checks the numbers of heads by it
    out: torch.Tensor = call_jax(
        _attend_as_torch, query, key, value, attn_mask, bool(is_causal), scale
    )
    return out


def _attend_as_torch(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    scale: float | None,
) -> jax.Array:
    """Computes attention of JAX's arrays; see `_run_torch_attention` for the arguments."""
    q, k, v = (_with_four_axes(x) for x in (query, key, value))
    batch, _, n_queries, head_dim = q.shape
    n_keys = k.shape[2]
    query_positions = _positions(batch, n_queries)
    key_positions = _positions(batch, n_keys)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*query.shape[:-3], *_with_four_axes(mask).shape[1:]))
        mask = _with_four_axes(mask)
        is_padding = mask.dtype == bool and mask.shape[1:3] == (1, 1)
        if not is_padding:
            scale = head_dim**-0.5 if scale is None else scale
            with jax.named_scope(_scope_of_scores(mask)):
                out = _attend_by_scores(q, k, v, mask, scale, None, None, causal=False)
            return out.swapaxes(1, 2).reshape(*query.shape[:-1], -1)
        key_positions = jnp.where(mask[:, 0, 0], key_positions, -1)  # no query sees padding
    rule = Mask(
        queries=MaskTokens(query_positions[0], query_positions),
        keys=MaskTokens(jnp.arange(n_keys, dtype=jnp.int32), key_positions),
        causal=causal,
        aligned=n_queries == n_keys,
    )
    return _attend_by_rule(q, k, v, rule, scale).swapaxes(1, 2).reshape(*query.shape[:-1], -1)


def _with_four_axes(x: jax.Array) -> jax.Array:
    """Reshapes an array so that one axis comes before its last three."""
    if x.ndim < 3:
        x = x.reshape(*[1] * (3 - x.ndim), *x.shape)
    return x.reshape(-1, *x.shape[-3:])


def _positions(batch: int, n_tokens: int) -> jax.Array:
    """Returns the positions of tokens in rows without padding, [batch, n_tokens] int32."""
    return jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32), (batch, n_tokens))


AttentionInterface.register(ATTENTION_NAME, _run_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _make_mask)
define_function(torch.nn.functional.scaled_dot_product_attention, _run_torch_attention)
define_function(torch.ops.aten.scaled_dot_product_attention, _run_torch_attention)
