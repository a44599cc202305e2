"""The transform of a parameter tree, its halves, and its inverses."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax.adapt.roles import infer_roles
from lora_jax.axes import AxisRoles
from lora_jax.build import node_of
from lora_jax.magnitude import wide
from lora_jax.paths import nearest
from lora_jax.resolve import beside, resolve
from lora_jax.rules import Rule
from lora_jax.weight import LoraWeight, Node, Trained, is_leaf, is_node, leaves_of

Tree = Any
Adapter = dict[str, dict[str, Any]]


def lorafy(
    params: Tree,
    rules: Sequence[Rule],
    *,
    key: jax.Array | None = None,
    trace: Sequence[Any] | None = None,
) -> Tree:
    """`params` with each selected kernel as a `LoraWeight`, each leaf that trains as a `Trained`.

    Pure: containers stay what they are, and every other leaf is the same object. A `LoraWeight`
    holds the kernel itself; a `Trained` (or of some rows, a `TrainedRows`) holds a copy of what
    trains, so that donating it spares `params`.

    Args:
      params: any pytree; its leaves may be `jax.ShapeDtypeStruct`\\ s, which cost nothing.
      rules: the first rule that selects a leaf wins.
      key: a PRNG key, `jax.random.key(0)` by default. Each weight's draws depend on it and on the
        weight's path only, so that adapting one more weight changes no other.
      trace: ``(fn, *args)``, as `fn` is called, `params` among the arguments (arrays may be
        `jax.ShapeDtypeStruct`\\ s): the axis roles of each kernel are read from what `fn` does
        with it, in the place of Flax's convention. A rule's own in_axes and out_axes come first.

    Raises ValueError where a rule selects nothing, where a kernel's axis roles are unknown, or
    where the tree is adapted already.
    """
    leaves, treedef = leaves_of(params)
    if adapted := [path for path, leaf in leaves if is_node(leaf)]:
        raise ValueError(
            f"the tree is adapted already (at {adapted[0]!r}): give lorafy the tree before, "
            "lora_jax.strip(params), or lora_jax.merge(params) to build on what was learned"
        )
    arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    chosen = resolve(arrays, rules, _looked(trace, arrays))
    key = jax.random.key(0) if key is None else key
    return treedef.unflatten(
        node_of(leaf, path, chosen[path], key) if path in chosen else leaf for path, leaf in leaves
    )


def _looked(
    trace: Sequence[Any] | None, leaves: list[tuple[str, Any]]
) -> dict[str, AxisRoles | str] | None:
    """The roles that `trace` shows, by path."""
    if trace is None:
        return None
    fn, *args = trace
    return infer_roles(fn, args, {id(leaf): path for path, leaf in leaves})


def _map_nodes(visit: Any, tree: Tree) -> Tree:
    """`tree` with `visit(node)` in place of each node."""
    return jax.tree.map(lambda x: visit(x) if is_node(x) else x, tree, is_leaf=is_leaf)


def _nodes(tree: Tree, what: str) -> dict[str, Node]:
    """The nodes of an adapted tree by path; ValueError where there are none."""
    leaves, _ = leaves_of(tree)
    nodes = {path: leaf for path, leaf in leaves if is_node(leaf)}
    if not nodes:
        raise ValueError(f"{what} needs an adapted tree, and this one is plain: call lorafy first")
    return nodes


def split(params: Tree) -> tuple[Adapter, Tree]:
    """An adapted tree as its two halves, (adapter, base); `join` is the exact inverse.

    adapter: a flat dict ``{path: {"a": …, "b": …}}`` (or ``{"value": …}``; with DoRA "magnitude",
    with a bias on B "bias" as well) of plain arrays, which trains. base: the tree with the rest,
    frozen; where the adapter's arrays were, there is None.
    """
    adapter = {path: node.parts() for path, node in _nodes(params, "split").items()}
    return adapter, _map_nodes(lambda node: node.with_parts({}), params)


def join(adapter: Mapping[str, Mapping[str, Any]], base: Tree) -> Tree:
    """The inverse of `split`. ``join({}, base)`` is the base alone.

    Raises ValueError where the adapter and the base do not belong together.
    """
    if not adapter:
        return base
    leaves, treedef = leaves_of(base)
    _check_same_paths(adapter, {path for path, leaf in leaves if is_node(leaf)}, "join")

    def filled(path: str, leaf: Any) -> Any:
        if not is_node(leaf):
            return leaf
        if set(adapter[path]) != set(leaf.part_names()):
            raise ValueError(
                f"join: the adapter has {sorted(adapter[path])} for {path!r}, where the tree "
                f"trains {sorted(leaf.part_names())}"
            )
        return leaf.with_parts(adapter[path])

    return treedef.unflatten(filled(path, leaf) for path, leaf in leaves)


def strip(params: Tree) -> Tree:
    """The tree before `lorafy`: its very leaves.

    (Of a leaf that trains in full, its value now: no copy of the earlier one is kept.)
    """
    return _map_nodes(lambda node: node.base, params)


def merge(params: Tree) -> Tree:
    """The tree with W + s·AB in place of each adapted weight: no cost at inference.

    Each sum is taken in fp32 (or wider) and rounded once to W's dtype. A bias on B is added to the
    bias that stands beside the kernel; ValueError where there is none, or of another shape.
    """
    leaves, treedef = leaves_of(params)
    for path, leaf in leaves:
        if isinstance(leaf, LoraWeight) and leaf.is_on and leaf.uses != "all":
            raise ValueError(
                f"merge: the adapter of {path!r} is for one use of it only (uses={leaf.uses!r}); "
                "merged, both would see it. Run the adapted tree through lora_jax.adapt"
            )
    merged = {path: _merged(leaf) for path, leaf in leaves}
    for path, leaf in leaves:
        if isinstance(leaf, LoraWeight) and leaf.is_on and leaf.bias is not None:
            there = beside(path, merged)
            shape = None if there is None else merged[there].shape
            if there is None or shape != leaf.bias.shape:
                raise ValueError(
                    f"merge: {path!r} has a bias on B of shape {leaf.bias.shape}, and "
                    + (f"{there!r} has the shape {shape}" if there else "no bias stands beside it")
                    + ": it cannot be merged. Run the adapted tree through lora_jax.adapt"
                )
            bias = merged[there]
            total = bias.astype(wide(bias.dtype)) + leaf.factored().shift.astype(wide(bias.dtype))
            merged[there] = total.astype(bias.dtype)
    return treedef.unflatten(merged[path] for path, _ in leaves)


def _merged(leaf: Any) -> Any:
    if not is_node(leaf):
        return leaf
    return leaf.merged() if leaf.is_on else leaf.base


def swap(params: Tree, other: Tree) -> Tree:
    """`params` with the adapter of another adapted tree: its factors, scale and trained values.

    Where the two have the same ranks, a function compiled for `params` runs on the result without
    compiling again, whatever the alphas. Raises ValueError where they do not adapt the same
    weights in the same way.
    """
    theirs = _nodes(other, "swap")
    leaves, treedef = leaves_of(params)
    mine = {path: leaf for path, leaf in leaves if is_node(leaf)}
    _check_same_paths(theirs, set(mine), "swap")
    for path, node in mine.items():
        a, b = _kind(node), _kind(theirs[path])
        if a != b:
            raise ValueError(f"swap: {path!r} is {a} in one tree and {b} in the other")

    def swapped(path: str, leaf: Any) -> Any:
        if not is_node(leaf):
            return leaf
        other = theirs[path]
        if isinstance(leaf, Trained):
            return other
        kept = {"dropout": leaf.dropout} if isinstance(leaf, LoraWeight) else {}
        return other.replace(base=leaf.base, **kept)

    return treedef.unflatten(swapped(path, leaf) for path, leaf in leaves)


def _kind(node: Node) -> str:
    if isinstance(node, LoraWeight):
        return f"adapted with the shape {node.shape} and {node.roles}"
    return "trained in full" if isinstance(node, Trained) else "trained in some rows"


def _check_same_paths(adapter: Mapping[str, Any], paths: set[str], what: str) -> None:
    if unknown := [path for path in adapter if path not in paths]:
        near = nearest(unknown[0], paths, n=3)
        raise ValueError(
            f"{what}: the adapter has {unknown[0]!r} (and {len(unknown) - 1} more) that the tree "
            f"does not adapt; the nearest paths there are {near}"
        )
    if missing := sorted(paths - set(adapter)):
        raise ValueError(
            f"{what}: the adapter has nothing for {missing[0]!r} (and {len(missing) - 1} more)"
        )


def trainable_mask(params: Tree) -> Tree:
    """`params` with True for each array that trains (a, b, value) and False for all others.

    For an optimiser of the whole tree; see `lora_jax.optim.freeze_base`.
    """

    def mask(node: Node) -> Node:
        return jax.tree.map(lambda _: False, node).with_parts(dict.fromkeys(node.parts(), True))

    return jax.tree.map(lambda x: mask(x) if is_node(x) else False, params, is_leaf=is_node)


def count_params(params: Tree) -> tuple[int, int]:
    """(trained, all) parameters of a tree; padding of ranks and scales not counted."""
    trained = total = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_leaf):
        if not is_node(leaf):
            total += math.prod(leaf.shape) if hasattr(leaf, "shape") else 0
            continue
        own = leaf.n_trainable if leaf.is_on else 0
        trained += own
        total += own
        if not isinstance(leaf, Trained):
            total += math.prod(leaf.shape) + leaf.n_frozen
    return trained, total


def summary(params: Tree) -> str:
    """The line that PEFT's ``print_trainable_parameters`` prints, for an adapted tree.

    ``trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622``
    """
    trained, total = count_params(params)
    share = 100 * trained / total if total else 0.0
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
