"""Tied vectors: several weights of a tree train one vector together.

A **member** is one matrix of a stack, or a kernel that is no stack. A **tie** is the number of the
vector that a member trains (`lora_jax.core.weight.LoraWeight.ties`), or −1 for a member without
a vector. Members with the same tie hold the same vector. The first of them in the order of the
tree's leaves trains. The others get its values whenever a tree is built, so that each node can be
used by itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.paths import numbered_layer
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.select.resolve import Adaptation, Decision

TIED_PART = "v"  # the name of the part that holds the tied vectors


def vector_index_of_module(index: int, n: int, tying: float) -> int:
    """Returns the index of the vector that a module trains, one of n modules.

    Args:
      index: index of the module in the order of the modules.
      n: the number of modules.
      tying: `weight_tying`, from 0 (a vector for each module) to 1 (one vector for all).

    Source: PEFT's ``TinyLoraModel._create_and_replace``.
    """
    n_vectors = max(1, round(n * (1 - tying)))
    modules_per_vector = max(1, n // n_vectors)
    return min(index // modules_per_vector, n_vectors - 1)


def ties_of(
    decisions: Mapping[str, Decision], leaves: Mapping[str, Leaf], order: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Returns `LoraWeight.ties` of each weight that shares a trained vector, by path.

    All weights of rules with the same u and `weight_tying` are one pool, in which vectors are tied
    layer by layer.

    Args:
      decisions: the decision for each selected leaf, by path.
      leaves: the arrays of the tree, by path.
      order: paths in the order of the forward pass; by default the order of the tree's leaves.
    """
    pools: dict[tuple[int, float], list[str]] = {}
    for path, decision in decisions.items():
        if not isinstance(decision, Adaptation):
            continue
        rule = decision.rule
        if rule.tinylora and rule.weight_tying:
            pools.setdefault((rule.u, rule.weight_tying), []).append(path)
    index_of_path = {path: index for index, path in enumerate(order)}
    ties = dict[str, list[int]]()
    first_vector = 0  # number of the pool's first vector
    for (_, tying), paths in pools.items():
        paths.sort(key=lambda path: index_of_path.get(path, len(index_of_path)))
        is_adapted = {path: _is_member_adapted(leaves[path], decisions[path]) for path in paths}
        ties |= {path: [-1] * len(is_adapted[path]) for path in paths}
        # PEFT counts each adapted member as a module.
        modules = _members_by_layer(paths, is_adapted)
        for index, (path, member) in enumerate(modules):
            ties[path][member] = first_vector + vector_index_of_module(index, len(modules), tying)
        first_vector += len(modules)
    return {path: tuple(ties_of_path) for path, ties_of_path in ties.items()}


def _is_member_adapted(leaf: Leaf, decision: Decision) -> list[bool]:
    """Returns a flag for each member of a weight: True if the member is adapted."""
    assert isinstance(decision, Adaptation)
    batch = decision.roles.sizes(leaf.shape, "batch")
    ranks = np.asarray(decision.ranks).reshape(-1, *[1] * (len(batch) - 1))
    is_adapted: list[bool] = np.broadcast_to(ranks > 0, batch or (1,)).ravel().tolist()
    return is_adapted


class _OrderedMember(NamedTuple):
    """A stack member, sortable by run, layer and index of the weight.

    A **run** is a group of consecutive weights with equal numbers of members. A weight without
    layers is a run by itself.
    """

    run: int
    layer: int
    weight_index: int
    path: str
    member: int


def _members_by_layer(
    paths: Sequence[str], is_adapted: Mapping[str, Sequence[bool]]
) -> list[tuple[str, int]]:
    """Returns (path, index) of each adapted member; members of a layer are consecutive."""
    members: list[_OrderedMember] = []
    run = 0
    run_members: int | None = None  # members of each weight of the run
    for weight_index, path in enumerate(paths):
        # A weight begins a new run unless it has layers as the weight before it.
        n_members = len(is_adapted[path])
        layer_of_path = numbered_layer(path, stacked=False) if n_members == 1 else None
        has_layers = n_members > 1 or layer_of_path is not None
        if not has_layers or n_members != run_members:
            run += 1
        run_members = n_members if has_layers else None
        # The layer of a member is its index in the stack, or the number in the path.
        for member in np.flatnonzero(is_adapted[path]).tolist():
            layer = member if layer_of_path is None else layer_of_path
            ordered = _OrderedMember(
                run=run, layer=layer, weight_index=weight_index, path=path, member=member
            )
            members.append(ordered)
    return [(ordered.path, ordered.member) for ordered in sorted(members)]


def fill_in_tied_vectors(tree: Tree) -> Tree:
    """Returns a tree in which tied members hold the vector of the first one."""
    leaves, _ = leaves_of(tree)
    weights = {path: leaf for path, leaf in leaves if isinstance(leaf, LoraWeight)}
    nodes = tied_nodes(weights)
    vectors: dict[str, Leaf] = {path: node.arrays.get(TIED_PART) for path, node in nodes.items()}
    are_arrays = all(isinstance(vector, jax.Array | np.ndarray) for vector in vectors.values())
    if not nodes or not are_arrays:  # a plain tree, a half of a tree, or an abstract tree
        return tree
    tied_vectors = dict[str, jax.Array]()
    # Tied vectors have one length u.
    for u in {vector.shape[-1] for vector in vectors.values()}:
        paths = [path for path, vector in vectors.items() if vector.shape[-1] == u]
        ties = [nodes[path].ties for path in paths]
        # [adapters, members, u]: a tree may hold several adapters, stacked.
        rows = jnp.concatenate(
            [vectors[path].reshape(-1, len(nodes[path].ties), u) for path in paths], axis=1
        )
        for path, first_rows in zip(paths, _row_of_first_member(ties), strict=True):
            vector = vectors[path]
            vectors_of_path = rows[:, np.asarray(first_rows)]
            tied_vectors[path] = vectors_of_path.reshape(vector.shape).astype(vector.dtype)

    def replace_vector(path: str, leaf: Leaf) -> Leaf:
        if path not in tied_vectors:
            return leaf
        return leaf.replace(**{TIED_PART: tied_vectors[path]})

    return map_leaves(replace_vector, tree)


def _row_of_first_member(ties: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns, for each member, the row of the first member with the same tie.

    Args:
      ties: ties of the members of each weight; rows are counted over all weights.
    """
    row_of_tie: dict[int, int] = {}
    rows_of_weights = []
    row = 0
    for weight_ties in ties:
        rows = []
        for tie in weight_ties:
            if tie < 0:  # an untied member
                rows.append(row)
            else:
                rows.append(row_of_tie.setdefault(tie, row))
            row += 1
        rows_of_weights.append(rows)
    return rows_of_weights


def tied_nodes(nodes: Mapping[str, Leaf]) -> dict[str, LoraWeight]:
    """Returns the nodes that share a trained vector."""
    return {path: node for path, node in nodes.items() if getattr(node, "ties", ())}


def n_copied_elements(nodes: Mapping[str, Leaf]) -> int:
    """Returns the number of elements of tied vectors that are copies."""
    u_of_tie: dict[int, int] = {}
    n_elements = 0
    for node in tied_nodes(nodes).values():
        u = node.shape_of(TIED_PART)[-1]
        ties = [tie for tie in node.ties if tie >= 0]
        n_elements += u * len(ties)
        u_of_tie |= dict.fromkeys(ties, u)
    return n_elements - sum(u_of_tie.values())
