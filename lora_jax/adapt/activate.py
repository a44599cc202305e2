"""Adapters that act on some tokens alone: activated LoRA, which acts from its invocation on.

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
    """Returns an adapted tree whose adapter acts on some tokens alone.

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
    active = jnp.asarray(mask, bool)
    if active.ndim != 2:
        raise ValueError(f"activate: the mask has the shape {active.shape}; [batch, seq] is needed")
    weights = _weights_of(tree)
    if not weights:
        raise ValueError("activate needs an adapted tree, and this one has no adapted weight")
    return _with_masks(tree, dict.fromkeys({w.invocation for w in weights}, active))


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
            f"invoked: ids of the shape {ids.shape} and {len(invocation)} tokens; [batch, seq], "
            "and one token at least, are needed"
        )
    n = ids.shape[1]
    places = jnp.arange(n, dtype=jnp.int32)
    first, last = jnp.zeros_like(ids, jnp.int32), jnp.full_like(ids, n, jnp.int32)
    if segment_ids is not None:  # the first place of each token's segment, and the one behind it
        segments = jnp.asarray(segment_ids)
        begins = segments != jnp.roll(segments, 1, axis=1)
        begins |= places == 0
        first = lax.cummax(jnp.where(begins, places, 0), axis=1)
        ends = jnp.roll(jnp.where(begins, places, n), -1, axis=1).at[:, -1].set(n)
        last = lax.cummin(ends, axis=1, reverse=True)
    begins_here = places + len(invocation) <= last
    for offset, token in enumerate(invocation):
        begins_here &= jnp.roll(ids, -offset, axis=1) == token
    before = lax.cummax(jnp.where(begins_here, places, -1), axis=1)
    behind = lax.cummin(jnp.where(begins_here, places, n), axis=1, reverse=True)
    behind = jnp.roll(behind, -1, axis=1).at[:, -1].set(n)
    return (before >= first) & (behind >= last)


def invocations_of(tree: Tree) -> set[tuple[int, ...]]:
    """Returns the invocations of a tree's adapted weights."""
    return {weight.invocation for weight in _weights_of(tree) if weight.invocation is not None}


def activate_from(
    tree: Tree, ids: jax.typing.ArrayLike, segment_ids: jax.typing.ArrayLike | None = None
) -> Tree:
    """Returns a tree whose activated adapters act from their invocation among the tokens on.

    Args:
      tree: any tree; without an invocation it stays as it is.
      ids, segment_ids: see `invoked`.
    """
    masks: dict[Any, jax.Array] = {
        each: invoked(ids, each, segment_ids) for each in invocations_of(tree)
    }
    return _with_masks(tree, masks) if masks else tree


def params_by_prompt(params: Tree, ids: jax.typing.ArrayLike) -> tuple[Tree, Tree]:
    """Returns the tree for a call with the prompts, and the one for calls with one token a row.

    A row whose prompt has the invocation is active after it, as in PEFT's ``generate``.

    Args:
      params: any tree; without an invocation, both are that tree.
      ids: [batch, seq] int, the whole prompts; -1 at padding.
    """
    masks: dict[Any, jax.Array] = {each: invoked(ids, each) for each in invocations_of(params)}
    if not masks:
        return params, params
    after = {each: mask.any(axis=1, keepdims=True) for each, mask in masks.items()}
    return _with_masks(params, masks), _with_masks(params, after)


def with_own_masks(
    fn: Forward, args: tuple[Tree, ...], kwargs: dict[str, Tree]
) -> tuple[Tree, ...]:
    """Returns the arguments of a call to a model that tells where its tokens are.

    That is a method of an object with another one, ``tokens_of_call(*args, **kwargs)``, of the
    arguments after the tree: it returns the token ids and segments of the call, or None where they
    are not whole rows. The models of `lora_jax.models` have it.
    """
    asked = getattr(getattr(fn, "__self__", None), "tokens_of_call", None)
    if asked is None or not args or not _waits_for_mask(args[0]):
        return args
    tokens = asked(*args[1:], **kwargs)
    return args if tokens is None else (activate_from(args[0], *tokens), *args[1:])


def _waits_for_mask(tree: Tree) -> bool:
    weights = _weights_of(tree)
    return any(w.invocation is not None and "active" not in w.arrays for w in weights)


def _weights_of(tree: Tree) -> list[LoraWeight]:
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    return [leaf for leaf in leaves if isinstance(leaf, LoraWeight)]


def _with_masks(tree: Tree, masks: Mapping[Any, jax.Array]) -> Tree:
    """Returns a tree whose weights have the mask of their invocation, where there is one."""

    def given(_: str, leaf: Leaf) -> Leaf:
        if not isinstance(leaf, LoraWeight) or leaf.invocation not in masks or not leaf.is_on:
            return leaf
        return leaf.replace(active=masks[leaf.invocation])

    return map_leaves(given, tree)
