"""Activated LoRA: adapters that act only on some tokens, such as those after an invocation.

Activated LoRA (Greenewald et al., arXiv 2504.12397; PEFT's ``alora_invocation_tokens``) leaves all
tokens before the invocation to the base, so that keys and values of the base stay valid for it. A
mask says which tokens see the adapter: `activate` gives one to the weights of a tree, and `invoked`
finds that of an invocation in token ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.types import Forward, Leaf, Tree
from lora_jax.core.weight import LoraWeight, is_leaf, map_leaves


def activate(tree: Tree, mask: jax.typing.ArrayLike) -> Tree:
    """Returns an adapted tree whose adapter acts only on the tokens of a mask.

    The tokens of an activation are its axes that a product with a weight neither contracts nor
    batches: [batch, seq], in this order, or both as one axis. `lora_jax.adapt` follows them from
    the arguments whose leading axes are those of the mask, or both as one axis. A product raises a
    `TokensError` where the order of its rows is not known to be the mask's: after a reversal, a
    gather or a sort along these axes, say. So does a product with rows of other sizes, and a
    look-up. With a cache, the mask is that of the new tokens.

    Args:
      tree: an adapted tree, or one with adapted trees in it.
      mask: [batch, seq] bool, True for the tokens that see the adapter.

    Raises:
      ValueError: the mask has other axes, or the tree has no adapted weight.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2, init=lj.init.orthogonal)])
    >>> forward = lj.adapt(lambda params, x: x @ params["dense"]["kernel"])
    >>> some = lj.activate(tree, jnp.array([[False, True]]))
    >>> forward(some, jnp.ones((1, 2, 4))).shape
    (1, 2, 3)
    """
    is_active = jnp.asarray(mask, bool)
    if is_active.ndim != 2:
        raise ValueError(
            f"activate: the mask must have the shape [batch, seq], not {is_active.shape}. Pass one "
            "value for each token."
        )
    weights = _lora_weights_in(tree)
    if not weights:
        raise ValueError(
            "activate needs an adapted tree, but this tree has no adapted weight. Call lorafy "
            "first."
        )
    invocations = {weight.invocation for weight in weights}
    return _with_masks(tree, dict.fromkeys(invocations, is_active))


def invoked(
    ids: jax.typing.ArrayLike,
    invocation: Sequence[int],
    segment_ids: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns the tokens from the last occurrence of an invocation on, the invocation included.

    Args:
      ids: [batch, seq] int.
      invocation: the token ids that invoke the adapter. A row without them has no such tokens.
      segment_ids: [batch, seq] int, for several sequences packed in one row: each has an invocation
        of its own.

    Returns:
      [batch, seq] bool.

    Raises:
      ValueError: the ids have other axes, or the invocation is empty.

    >>> lj.invoked([[7, 5, 6, 5, 6, 1], [5, 1, 1, 1, 1, 6]], [5, 6]).astype(int).tolist()
    [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not len(invocation):
        raise ValueError(
            f"invoked: ids have the shape {ids.shape}, and the invocation has {len(invocation)} "
            "tokens. Pass ids of the shape [batch, seq], and an invocation of at least one token."
        )
    n_tokens = ids.shape[1]
    positions = jnp.arange(n_tokens, dtype=jnp.int32)
    # For each token, the first position of its segment, and the position behind it.
    segment_start = jnp.zeros_like(ids, jnp.int32)
    segment_stop = jnp.full_like(ids, n_tokens, jnp.int32)
    if segment_ids is not None:
        segments = jnp.asarray(segment_ids)
        is_segment_start = segments != jnp.roll(segments, 1, axis=1)
        is_segment_start |= positions == 0
        segment_start = lax.cummax(jnp.where(is_segment_start, positions, 0), axis=1)
        segment_stop = _next_marked_position(is_segment_start, positions)
    # The positions at which the whole invocation stands within a segment.
    is_invocation_start = positions + len(invocation) <= segment_stop
    for offset, token in enumerate(invocation):
        is_invocation_start &= jnp.roll(ids, -offset, axis=1) == token
    # A token sees the adapter if an invocation has begun in its segment, and none begins later.
    last_invocation = lax.cummax(jnp.where(is_invocation_start, positions, -1), axis=1)
    next_invocation = lax.cummin(
        jnp.where(is_invocation_start, positions, n_tokens), axis=1, reverse=True
    )
    next_invocation = jnp.roll(next_invocation, -1, axis=1).at[:, -1].set(n_tokens)
    return (last_invocation >= segment_start) & (next_invocation >= segment_stop)


def _next_marked_position(is_marked: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the position of the next marked token after each token, or the length."""
    n_tokens = positions.size
    marked_positions = jnp.where(is_marked, positions, n_tokens)
    shifted_positions = jnp.roll(marked_positions, -1, axis=1).at[:, -1].set(n_tokens)
    return lax.cummin(shifted_positions, axis=1, reverse=True)


def invocations_of(tree: Tree) -> set[tuple[int, ...]]:
    """Returns the invocations of a tree's adapted weights."""
    return {weight.invocation for weight in _lora_weights_in(tree) if weight.invocation is not None}


def activate_from(
    tree: Tree, ids: jax.typing.ArrayLike, segment_ids: jax.typing.ArrayLike | None = None
) -> Tree:
    """Returns a tree whose activated adapters act on the tokens from their invocation on.

    Args:
      tree: any tree; without an invocation it stays as it is.
      ids, segment_ids: see `invoked`.
    """
    masks: dict[Any, jax.Array] = {
        invocation: invoked(ids, invocation, segment_ids) for invocation in invocations_of(tree)
    }
    return _with_masks(tree, masks) if masks else tree


def params_by_prompt(params: Tree, ids: jax.typing.ArrayLike) -> tuple[Tree, Tree]:
    """Returns the tree for a call with the prompts, and the tree for single-token calls.

    A row whose prompt has the invocation is active after it, as in PEFT's ``generate``.

    Args:
      params: any tree; without an invocation, both are that tree.
      ids: [batch, seq] int, the whole prompts; -1 at padding.
    """
    prompt_masks: dict[Any, jax.Array] = {
        invocation: invoked(ids, invocation) for invocation in invocations_of(params)
    }
    if not prompt_masks:
        return params, params
    completion_masks = {
        invocation: mask.any(axis=1, keepdims=True) for invocation, mask in prompt_masks.items()
    }
    return _with_masks(params, prompt_masks), _with_masks(params, completion_masks)


def args_with_masks(
    fn: Forward, args: tuple[Tree, ...], kwargs: dict[str, Tree]
) -> tuple[Tree, ...]:
    """Returns a model call's arguments, with token masks in the weights that need them.

    That is a method of an object with another one, ``tokens_of_call(*args, **kwargs)``, of the
    arguments after the tree: it returns the token ids and segments of the call, or None where they
    are not whole rows. The models of `lora_jax.models` have it.
    """
    model = getattr(fn, "__self__", None)
    tokens_of_call = getattr(model, "tokens_of_call", None)
    if tokens_of_call is None or not args or not _needs_mask(args[0]):
        return args
    tree, *inputs = args
    tokens = tokens_of_call(*inputs, **kwargs)
    if tokens is None:
        return args
    ids, segment_ids = tokens
    return (activate_from(tree, ids, segment_ids), *inputs)


def _needs_mask(tree: Tree) -> bool:
    """Returns True if a weight has an invocation but no mask that says where it acts."""
    return any(
        weight.invocation is not None and "active" not in weight.arrays
        for weight in _lora_weights_in(tree)
    )


def _lora_weights_in(tree: Tree) -> list[LoraWeight]:
    """Returns the adapted weights of a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    return [leaf for leaf in leaves if isinstance(leaf, LoraWeight)]


def _with_masks(tree: Tree, masks: Mapping[Any, jax.Array]) -> Tree:
    """Returns a tree with a token mask in each weight whose invocation has one."""

    def with_mask(_: str, leaf: Leaf) -> Leaf:
        if not isinstance(leaf, LoraWeight) or leaf.invocation not in masks or not leaf.is_on:
            return leaf
        return leaf.replace(active=masks[leaf.invocation])

    return map_leaves(with_mask, tree)
