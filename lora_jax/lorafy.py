"""The transform of a parameter tree, its halves, and its inverses."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapt.roles import roles_by_looking
from lora_jax.axes import AxisRoles
from lora_jax.init import FactorShape, Initialiser
from lora_jax.paths import flatten_with_paths, fold_in_path, nearest
from lora_jax.product import factor_shapes, stored
from lora_jax.rules import Adapted, Rule, TrainRule, resolve
from lora_jax.weight import LoraWeight, Node, Trained, is_node

Tree = Any
Adapter = dict[str, dict[str, Any]]


def lorafy(
    params: Tree,
    rules: Sequence[Rule],
    *,
    key: jax.Array | None = None,
    trace: Sequence[Any] | None = None,
) -> Tree:
    """`params` with each selected kernel as a `LoraWeight`, each leaf to be trained as a `Trained`.

    Pure: containers stay what they are, and every other leaf is the same object. A `LoraWeight`
    holds the kernel itself; a `Trained` holds a copy, so that donating it spares `params`.

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
    leaves, treedef = flatten_with_paths(params, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_node(leaf)]:
        raise ValueError(
            f"the tree is adapted already (at {adapted[0]!r}): give lorafy the tree before, "
            "lora_jax.strip(params), or lora_jax.merge(params) to build on what was learned"
        )
    arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    chosen = resolve(arrays, rules, _looked(trace, arrays))
    key = jax.random.key(0) if key is None else key
    return treedef.unflatten(
        _adapted_leaf(leaf, path, chosen.get(path), key) for path, leaf in leaves
    )


def _looked(
    trace: Sequence[Any] | None, leaves: list[tuple[str, Any]]
) -> dict[str, AxisRoles | str] | None:
    """The roles that `trace` shows, by path."""
    if trace is None:
        return None
    fn, *args = trace
    return roles_by_looking(fn, args, {id(leaf): path for path, leaf in leaves})


def _adapted_leaf(leaf: Any, path: str, choice: Adapted | TrainRule | None, key: jax.Array) -> Any:
    if choice is None:
        return leaf
    if isinstance(choice, TrainRule):
        return Trained(leaf if _is_abstract(leaf) else jnp.array(leaf, copy=True))
    rank = max(choice.ranks)
    _, _, scale_shape = factor_shapes(tuple(leaf.shape), choice.roles, rank)
    if _is_abstract(leaf):
        a, b = jax.eval_shape(lambda: _draw(leaf, path, choice, jax.random.key(0)))
        scale: Any = jax.ShapeDtypeStruct(scale_shape, jnp.float32)
    else:
        a, b = _draw(leaf, path, choice, key)
        scales = np.asarray(choice.scales, np.float32)
        scales = scales.reshape(-1, *[1] * (len(scale_shape) - 1)) if scale_shape else scales[0]
        scale = jnp.asarray(np.broadcast_to(scales, scale_shape))
    return LoraWeight(
        leaf, a, b, scale, roles=choice.roles, ranks=choice.ranks, dropout=choice.rule.dropout
    )


def _draw(leaf: Any, path: str, choice: Adapted, key: jax.Array) -> tuple[Any, Any]:
    """The stored factors of one weight: where the layers' ranks differ, layer by layer."""
    shape, roles, rule = tuple(leaf.shape), choice.roles, choice.rule
    batch = roles.sizes(shape, "batch")
    fan_in, fan_out = (math.prod(roles.sizes(shape, label)) for label in ("in", "out"))
    rank = max(choice.ranks)
    key = fold_in_path(key, path)
    dtype = np.dtype(rule.dtype)
    if len(set(choice.ranks)) == 1:
        a, b = _initialise(rule.init, key, FactorShape(batch, fan_in, fan_out, rank), dtype)
    else:
        layers = [
            _padded(
                _initialise(
                    rule.init,
                    jax.random.fold_in(key, layer),
                    FactorShape(batch[1:], fan_in, fan_out, layer_rank),
                    dtype,
                )
                if layer_rank
                else None,
                FactorShape(batch[1:], fan_in, fan_out, rank),
                dtype,
            )
            for layer, layer_rank in enumerate(choice.ranks)
        ]
        a, b = (jnp.stack(factors) for factors in zip(*layers, strict=True))
    a, b = stored(a, b, len(batch))
    a_shape, b_shape, _ = factor_shapes(shape, roles, rank)
    return a.reshape(a_shape), b.reshape(b_shape)


def _initialise(
    init: Initialiser, key: jax.Array, shape: FactorShape, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    a, b = init(key, shape, dtype)
    if a.shape != shape.a or b.shape != shape.b:
        raise ValueError(
            f"the initialiser {init!r} returned A of shape {a.shape} and B of shape {b.shape}; "
            f"expected {shape.a} and {shape.b}"
        )
    return a.astype(dtype), b.astype(dtype)


def _padded(
    factors: tuple[jax.Array, jax.Array] | None, shape: FactorShape, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Factors with zeros up to the rank of `shape`, which is where training leaves them."""
    if factors is None:
        return jnp.zeros(shape.a, dtype), jnp.zeros(shape.b, dtype)
    a, b = factors
    missing = shape.rank - a.shape[-1]
    none = [(0, 0)] * len(shape.batch)
    return jnp.pad(a, [*none, (0, 0), (0, missing)]), jnp.pad(b, [*none, (0, missing), (0, 0)])


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _map_nodes(visit: Any, tree: Tree) -> Tree:
    """`tree` with `visit(node)` in place of each node."""
    return jax.tree.map(lambda x: visit(x) if is_node(x) else x, tree, is_leaf=is_node)


def _nodes(tree: Tree, what: str) -> dict[str, Node]:
    """The nodes of an adapted tree by path; ValueError where there are none."""
    leaves, _ = flatten_with_paths(tree, is_leaf=is_node)
    nodes = {path: leaf for path, leaf in leaves if is_node(leaf)}
    if not nodes:
        raise ValueError(f"{what} needs an adapted tree, and this one is plain: call lorafy first")
    return nodes


def split(params: Tree) -> tuple[Adapter, Tree]:
    """An adapted tree as its two halves, (adapter, base); `join` is the exact inverse.

    adapter: a flat dict ``{path: {"a": …, "b": …}}`` (or ``{"value": …}``) of plain arrays, which
    trains. base: the tree with the rest, frozen; where the adapter's arrays were, there is None.
    """
    adapter: Adapter = {}
    for path, node in _nodes(params, "split").items():
        if isinstance(node, Trained):
            adapter[path] = {"value": node.value}
        else:
            adapter[path] = {"a": node.a, "b": node.b}

    def shell(node: Node) -> Node:
        return Trained(None) if isinstance(node, Trained) else node.replace(a=None, b=None)

    return adapter, _map_nodes(shell, params)


def join(adapter: Mapping[str, Mapping[str, Any]], base: Tree) -> Tree:
    """The inverse of `split`. ``join({}, base)`` is the base alone.

    Raises ValueError where the adapter and the base do not belong together.
    """
    if not adapter:
        return base
    leaves, treedef = flatten_with_paths(base, is_leaf=is_node)
    _check_same_paths(adapter, {path for path, leaf in leaves if is_node(leaf)}, "join")

    def filled(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return Trained(adapter[path]["value"])
        if isinstance(leaf, LoraWeight):
            return leaf.replace(a=adapter[path]["a"], b=adapter[path]["b"])
        return leaf

    return treedef.unflatten(filled(path, leaf) for path, leaf in leaves)


def strip(params: Tree) -> Tree:
    """The tree before `lorafy`: its very leaves.

    (Of a leaf that trains in full, its value now: no copy of the earlier one is kept.)
    """
    return _map_nodes(lambda n: n.value if isinstance(n, Trained) else n.base, params)


def merge(params: Tree) -> Tree:
    """The tree with W + s·AB in place of each adapted weight: no cost at inference.

    Each sum is taken in fp32 (or wider) and rounded once to W's dtype.
    """

    def merged(node: Node) -> Any:
        if isinstance(node, Trained):
            return node.value
        return node.base if node.a is None else node.merged()

    return _map_nodes(merged, params)


def swap(params: Tree, other: Tree) -> Tree:
    """`params` with the adapter of another adapted tree: its a, b, scale and trained values.

    Where the two have the same ranks, a function compiled for `params` runs on the result without
    compiling again, whatever the alphas. Raises ValueError where they do not adapt the same
    weights in the same way.
    """
    theirs = _nodes(other, "swap")
    leaves, treedef = flatten_with_paths(params, is_leaf=is_node)
    mine = {path: leaf for path, leaf in leaves if is_node(leaf)}
    _check_same_paths(theirs, set(mine), "swap")
    for path, node in mine.items():
        a, b = _kind(node), _kind(theirs[path])
        if a != b:
            raise ValueError(f"swap: {path!r} is {a} in one tree and {b} in the other")

    def swapped(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return theirs[path]
        if isinstance(leaf, LoraWeight):
            node = theirs[path]
            assert isinstance(node, LoraWeight)
            return leaf.replace(a=node.a, b=node.b, scale=node.scale, ranks=node.ranks)
        return leaf

    return treedef.unflatten(swapped(path, leaf) for path, leaf in leaves)


def _kind(node: Node) -> str:
    if isinstance(node, Trained):
        return "trained in full"
    return f"adapted with the shape {node.shape} and {node.roles}"


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
        if isinstance(node, Trained):
            return Trained(jax.tree.map(lambda _: True, node.value))
        a, b = (jax.tree.map(lambda _: True, factor) for factor in (node.a, node.b))
        base, scale = (jax.tree.map(lambda _: False, frozen) for frozen in (node.base, node.scale))
        return node.replace(base=base, a=a, b=b, scale=scale)

    return jax.tree.map(lambda x: mask(x) if is_node(x) else False, params, is_leaf=is_node)


def count_params(params: Tree) -> tuple[int, int]:
    """(trained, all) parameters of a tree; padding of ranks and scales not counted."""
    trained = total = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_node):
        if isinstance(leaf, LoraWeight):
            adapter = leaf.n_trainable if leaf.a is not None else 0
            trained += adapter
            total += adapter + math.prod(leaf.shape)
        elif isinstance(leaf, Trained):
            trained += math.prod(leaf.shape)
            total += math.prod(leaf.shape)
        elif hasattr(leaf, "shape"):
            total += math.prod(leaf.shape)
    return trained, total


def summary(params: Tree) -> str:
    """The line that PEFT's ``print_trainable_parameters`` prints, for an adapted tree.

    ``trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622``
    """
    trained, total = count_params(params)
    share = 100 * trained / total if total else 0.0
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
