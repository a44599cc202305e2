"""Tied vectors: the members of a tree that train one vector together.

A tie is a number for each member of a stack (`lora_jax.core.weight.LoraWeight.ties`): members of
one number hold one vector. The first of them in the order of the tree's leaves trains, and the
others take its values wherever a tree is put together, so that each node can be used by itself.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.paths import numbered_layer
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.select.resolve import Adaptation, Decision

NAME = "v"  # of the part that is tied


def group_of(index: int, n: int, tying: float) -> int:
    """Returns the number of the vector of one of n modules.

    Args:
      index: place of the module in their order.
      n: the number of modules.
      tying: 0 for a vector each, 1 for one for all.

    Source: PEFT's ``TinyLoraModel._create_and_replace``.
    """
    groups = max(1, round(n * (1 - tying)))
    return min(index // max(1, n // groups), groups - 1)


def ties_of(
    chosen: Mapping[str, Decision], leaves: Mapping[str, Leaf], order: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Returns `LoraWeight.ties` of each weight that trains a vector with others, by path.

    All weights of rules with the same u and `weight_tying` are counted together, layer by layer.

    Args:
      chosen: the decision for each selected leaf, by path.
      leaves: the arrays of the tree, by path.
      order: paths in the order of the forward pass; by default that of the tree's leaves.
    """
    pools: dict[tuple[int, float], list[str]] = {}
    for path, choice in chosen.items():
        if isinstance(choice, Adaptation) and choice.rule.tinylora and choice.rule.weight_tying:
            pools.setdefault((choice.rule.u, choice.rule.weight_tying), []).append(path)
    places = {path: place for place, path in enumerate(order)}
    ties, first = dict[str, tuple[int, ...]](), 0
    for (_, tying), paths in pools.items():
        paths.sort(key=lambda path: places.get(path, len(places)))
        sizes = {path: _members(leaves[path], chosen[path]) for path in paths}
        modules = _layer_by_layer(paths, sizes)
        made = {path: [-1] * len(on) for path, on in sizes.items()}
        for index, (path, member) in enumerate(modules):
            made[path][member] = first + group_of(index, len(modules), tying)
        ties |= {path: tuple(numbers) for path, numbers in made.items()}
        first += len(modules)
    return ties


def _members(leaf: Leaf, choice: Decision) -> list[bool]:
    """Returns for each member of a stack, or for a kernel alone, whether it is adapted."""
    assert isinstance(choice, Adaptation)
    batch = choice.roles.sizes(leaf.shape, "batch")
    ranks = np.asarray(choice.ranks).reshape(-1, *[1] * (len(batch) - 1))
    on: list[bool] = np.broadcast_to(ranks > 0, batch or (1,)).ravel().tolist()
    return on


def _layer_by_layer(
    paths: Sequence[str], sizes: Mapping[str, Sequence[bool]]
) -> list[tuple[str, int]]:
    """Returns the adapted members of weights; those of one layer follow each other."""
    keyed: list[tuple[int, int, int, str, int]] = []
    run, before = 0, None
    for place, path in enumerate(paths):
        numbered = None if len(sizes[path]) > 1 else numbered_layer(path, stacked=False)
        kind = None if numbered is None and len(sizes[path]) == 1 else len(sizes[path])
        run += kind is None or kind != before
        before = kind
        for member, is_on in enumerate(sizes[path]):
            layer = member if numbered is None else numbered
            keyed += [(run, layer, place, path, member)] * is_on
    return [(path, member) for *_, path, member in sorted(keyed)]


def with_ties(tree: Tree) -> Tree:
    """Returns a tree in which members that share a vector hold that of the first of them."""
    nodes = tied_nodes({p: x for p, x in leaves_of(tree)[0] if isinstance(x, LoraWeight)})
    vectors: dict[str, Leaf] = {path: node.arrays.get(NAME) for path, node in nodes.items()}
    if not nodes or not all(isinstance(v, jax.Array | np.ndarray) for v in vectors.values()):
        return tree  # plain, half of a tree, or abstract
    changed = dict[str, jax.Array]()
    for u in {v.shape[-1] for v in vectors.values()}:
        alike = {path: v for path, v in vectors.items() if v.shape[-1] == u}
        ties = [nodes[path].ties for path in alike]
        # [adapters, members, u]: a tree may hold several adapters, stacked.
        vectors_of = zip(alike.values(), ties, strict=True)
        rows = jnp.concatenate([v.reshape(-1, len(n), u) for v, n in vectors_of], axis=1)
        for (path, v), numbers in zip(alike.items(), _rows_of_firsts(ties), strict=True):
            changed[path] = rows[:, np.asarray(numbers)].reshape(v.shape).astype(v.dtype)

    def visit(path: str, leaf: Leaf) -> Leaf:
        return leaf.replace(**{NAME: changed[path]}) if path in changed else leaf

    return map_leaves(visit, tree)


def _rows_of_firsts(ties: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns for each member the row of the first member of its number; its own without one."""
    firsts, row = dict[int, int](), 0
    picked = []
    for numbers in ties:
        rows = range(row, row + len(numbers))
        picked.append(
            [at if n < 0 else firsts.setdefault(n, at) for n, at in zip(numbers, rows, strict=True)]
        )
        row += len(numbers)
    return picked


def tied_nodes(nodes: Mapping[str, Leaf]) -> dict[str, LoraWeight]:
    """Returns the nodes of a tree that train a vector with others."""
    return {path: node for path, node in nodes.items() if getattr(node, "ties", ())}


def n_shared(nodes: Mapping[str, Leaf]) -> int:
    """Returns the number of elements of vectors that are copies of others, which train."""
    counts: dict[int, int] = {}
    n = 0
    for node in tied_nodes(nodes).values():
        u = node.shape_of(NAME)[-1]
        n += u * sum(number >= 0 for number in node.ties)
        counts |= {number: u for number in node.ties if number >= 0}
    return n - sum(counts.values())
