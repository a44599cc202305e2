"""Sums of adapters over one base: one adapter that stands for several, with weights.

That the trees share their base is checked before any work.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.sums.arithmetic import HOWS, CombineMethod, Sign
from lora_jax.bank.sums.lowrank import replace_factors
from lora_jax.bank.sums.terms import ARRAYS, rank_of_sum, ranks_by_layer, summed, summed_biases
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.magnitude import wide
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import (
    LoraWeight,
    Node,
    Trained,
    TrainedRows,
    is_node,
    leaves_of,
    map_leaves,
)
from lora_jax.lorafy import nodes_of
from lora_jax.saving.fingerprint import base_fingerprint, differing

_Terms = Mapping[int, Leaf]  # nodes of one path, by the index of their tree


def shared_base(what: str, trees: Mapping[str, Tree]) -> dict[str, Leaf]:
    """Returns the frozen leaves of trees over one base by path: W, or the leaf itself.

    A leaf that trains in full has its earlier value from a tree that leaves it frozen; where there
    is none, it is left out.

    Args:
      what: the function that asks, for messages.
      trees: adapted or plain, by a name for messages.

    Raises:
      ValueError: the trees have different paths, shapes or frozen values.
    """
    leaves_of_tree = {name: dict(leaves_of(tree)[0]) for name, tree in trees.items()}
    first = next(iter(leaves_of_tree))
    base: dict[str, Leaf] = {}
    owner: dict[str, str] = {}
    for name, leaves in leaves_of_tree.items():
        if list(leaves) != list(leaves_of_tree[first]):
            only = sorted(leaves.keys() ^ leaves_of_tree[first].keys())
            raise ValueError(
                f"{what}: {first} and {name} have different leaves, {only[:3]} among them: the "
                "trees are to be adapted trees of one base"
            )
        unlike: dict[str, Leaf] = {}
        for path, leaf in leaves.items():
            mine, here = (x.base if is_node(x) else x for x in (leaves_of_tree[first][path], leaf))
            shapes = [getattr(x, "shape", None) for x in (mine, here)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{what}: {path!r} has the shape {shapes[0]} in {first} and {shapes[1]} in "
                    f"{name}: the trees have different bases"
                )
            if isinstance(leaf, Trained):
                continue
            owner.setdefault(path, name)
            if base.setdefault(path, here) is not here and not is_abstract((here, base[path])):
                unlike[path] = here
        mine = {path: base[path] for path in unlike}
        if wrong := differing(base_fingerprint(mine), base_fingerprint(unlike)):
            raise ValueError(
                f"{what}: {owner[wrong[0]]} and {name} have different bases: {len(wrong)} frozen "
                f"leaves differ, {', '.join(wrong[:3])} among them. Load all adapters onto one "
                "base, load_adapter(folder, params)"
            )
    return base


def combine(
    trees: Sequence[Tree],
    weights: Sequence[float],
    *,
    how: str = "exact",
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Sign | None = None,
    key: jax.Array | None = None,
    base: Tree | None = None,
) -> Tree:
    """Returns one adapted tree for the weighted sum of several adapted trees over one base.

    With Wᵢ = W + sᵢ·AᵢBᵢ, the result stands for W + Σ wᵢ·sᵢ·AᵢBᵢ, where ranks, alphas and adapted
    weights may differ, and a weight that a tree does not adapt is absent from the sum. Weights may
    be negative: ``combine([tree], [-1.0])`` is the negation. The result is plain LoRA of scale 1.

    ============================= ==================================================================
    how                           result
    ============================= ==================================================================
    "exact"                       the sum, of rank Σ rᵢ (PEFT's "cat"); PiSSA's and OLoRA's ranks
                                  count twice, W + s(AB − A₀B₀)
    "svd"                         the best approximation of the sum of rank `rank`, layer by layer;
                                  nothing of W's size is formed
    "linear"                      (Σ √(wᵢsᵢ) Aᵢ)(Σ √(wᵢsᵢ) Bᵢ): A's and B's are summed apart, so
                                  that products AᵢBⱼ of different adapters come in, and it is not
                                  the sum
    "magnitude_prune", "ties",    sums of pruned A's and B's, as "linear"; for "ties", the mean of
    "dare_linear", "dare_ties"    the elements that have the majority's sign
    "magnitude_prune_svd",        the same for the changes sᵢ·AᵢBᵢ, which are formed for one layer
    "ties_svd", …                 at a time, reduced to `rank`
    ============================= ==================================================================

    All but "exact" are those of PEFT's ``add_weighted_adapter``, which takes the root of ∣wᵢsᵢ∣ and
    gives the sign to A. (With a single adapter, PEFT always goes by "linear".)

    Leaves that train in full, rows of tables and biases on B are summed exactly, whatever `how`:
    v₀ + Σ wᵢ(vᵢ − v₀). The earlier value v₀ comes from `base` or a tree that leaves it frozen.

    Args:
      trees: adapted trees of one base, from `lorafy` or `load_adapter`.
      weights: one for each.
      how: see above.
      rank: rank of the result, for those that end in "svd"; a layer whose sum has a smaller rank
        keeps that. By default the largest rank among the trees, layer by layer.
      density: the share of elements that pruning leaves, in (0, 1].
      majority_sign_method: for TIES: "total" (the default; the sign of the elements' sum), or
        "frequency" (of the sum of their signs).
      key: for DARE, which prunes at random and divides by the density: a PRNG key. A weight's draws
        depend on it and on the weight's path.
      base: the plain tree, needed where a leaf trains in full in all trees.

    Returns:
      The tree of the first one's base, without `start` factors. A weight's dropout is that of the
      first tree which adapts it; A is frozen where it is in all of them.

    Raises:
      ValueError: the trees have different bases or axis roles; an adapter has a part that has no
        sum (DoRA's magnitude); ranks differ where `how` sums A's; an option has no effect.

    >>> from lora_jax import bank
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> rules = [lj.LoraRule(targets=["dense"], rank=2, init=lj.init.orthogonal)]
    >>> french, law = (lj.lorafy(params, rules, key=jax.random.key(i)) for i in range(2))
    >>> both = bank.combine([french, law], [1.0, 0.5])
    >>> both["dense"]["kernel"].ranks
    (4,)
    >>> less = bank.combine([french, law], [1.0, -1.0], how="svd", rank=2)
    >>> less["dense"]["kernel"].ranks
    (2,)
    """
    chosen = _checked(how, rank, density, majority_sign_method, key)
    if not trees or len(weights) != len(trees):
        raise ValueError(
            f"combine: {len(trees)} trees and {len(weights)} weights: give one weight for each "
            "tree, and one tree at least"
        )
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(f"combine: the weight {wrong[0]} is not finite")
    named = {f"trees[{index}]": tree for index, tree in enumerate(trees)}
    earlier = shared_base("combine", named if base is None else {**named, "base": base})
    terms = _terms(trees, base)
    for path, of_path in terms.items():
        _check_terms(path, of_path, chosen, earlier, weights)
    key = jax.random.key(0) if key is None else key

    def result(path: str) -> Node:
        of_path = terms[path]
        used = np.asarray([weights[index] for index in of_path])
        if nodes := [node for node in of_path.values() if isinstance(node, LoraWeight)]:
            return _weight(nodes, used, chosen, rank, fold_in_path(key, path))
        return _sum_values(list(of_path.values()), used, earlier.get(path))

    return map_leaves(lambda path, leaf: result(path) if path in terms else leaf, trees[0])


def _checked(
    how: str, rank: int | None, density: float | None, sign: Sign | None, key: jax.Array | None
) -> CombineMethod:
    """Returns the way to combine, after a check of the options that it takes and needs."""
    if how not in HOWS:
        hint = "; PEFT's 'cat' is 'exact'" if how == "cat" else ""
        raise ValueError(f"combine: how={how!r}: choose one of {list(HOWS)}{hint}")
    chosen = HOWS[how]
    takes = {
        "rank": (rank, chosen.is_compressed),
        "density": (density, chosen.prunes is not None),
        "majority_sign_method": (sign, chosen.elects),
        "key": (key, chosen.prunes == "random"),
    }
    for name, (value, is_taken) in takes.items():
        if value is not None and not is_taken:
            raise ValueError(f"combine: {name} has no effect with how={how!r}: leave it out")
    if chosen.prunes and density is None:
        raise ValueError(f"combine: how={how!r} needs density=…, the share of elements to leave")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"combine: density={density}: a share in (0, 1]")
    if chosen.prunes == "random" and key is None:
        raise ValueError(f"combine: how={how!r} draws at random: give key=jax.random.key(…)")
    if sign not in (None, "total", "frequency"):
        raise ValueError(f"combine: majority_sign_method={sign!r}: choose 'total' or 'frequency'")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"combine: rank={rank!r}: a rank is an integer of at least 1")
    return dataclasses.replace(chosen, name=how, density=density or 1.0, sign=sign or "total")


def _terms(trees: Sequence[Tree], base: Tree | None) -> dict[str, dict[int, Node]]:
    """Returns the nodes of each path, by the index of their tree."""
    if base is not None and nodes_of(base):
        raise ValueError("combine: base is to be the plain tree, and it is adapted: strip it first")
    terms: dict[str, dict[int, Node]] = defaultdict(dict)
    for index, tree in enumerate(trees):
        nodes = nodes_of(tree)
        if not nodes:
            raise ValueError(f"combine: trees[{index}] is plain: call lorafy or load_adapter first")
        for path, node in nodes.items():
            if not node.is_on:
                raise ValueError(
                    f"combine: trees[{index}] has no adapter at {path!r}, as the base half of a "
                    "tree: join(adapter, base) first"
                )
            terms[path][index] = node
    return terms


def _check_terms(
    path: str,
    terms: _Terms,
    how: CombineMethod,
    earlier: Mapping[str, Leaf],
    weights: Sequence[float],
) -> None:
    """Raises a ValueError where the nodes of one path have no sum."""
    lora = [index for index, node in terms.items() if isinstance(node, LoraWeight)]
    other = [index for index in terms if index not in lora]
    if lora and other:
        raise ValueError(
            f"combine: trees[{lora[0]}] adapts {path!r}, and trees[{other[0]}] trains it, or rows "
            "of it, in full: make an adapter of that, lora_jax.bank.extract(base, merge(tree), …)"
        )
    if not lora:
        values = [node.value for node in terms.values()]
        known = path in earlier or _is_kept(values, [weights[index] for index in terms])
        if not known:
            raise ValueError(
                f"combine: {path!r} trains in full, and its sum needs the value before training: "
                "give the plain tree, combine(…, base=params)"
            )
        return
    first = terms[lora[0]]
    for index, node in terms.items():
        if node.invocation is not None:
            raise ValueError(
                f"combine: trees[{index}] is an activated LoRA, which acts from its invocation on: "
                "it has no sum with adapters that act on other tokens"
            )
        for part in node.extras:
            if part.vector != "shift":
                raise ValueError(
                    f"combine: trees[{index}] has the part {part.name!r} at {path!r}, which has no "
                    "sum. Make a plain adapter of it first: lora_jax.bank.extract("
                    "strip(tree), merge(tree), rank=…)"
                )
        for name in ("roles", "uses"):
            mine, theirs = getattr(first, name), getattr(node, name)
            if mine != theirs:
                raise ValueError(
                    f"combine: {path!r} has {name} {mine} in trees[{lora[0]}] and {theirs} in "
                    f"trees[{index}]: adapt it with the same {name} in all trees"
                )
        if how.what == "factors" and node.start is not None:
            raise ValueError(
                f"combine: trees[{index}] has {path!r} from an initialiser that takes factors out "
                f"of the base, which how={how.name!r} cannot sum apart: choose 'exact' or 'svd'"
            )
    if how.what == "factors":
        for ranks in ranks_by_layer(list(terms.values())):
            if len({rank for rank in ranks if rank}) > 1:
                raise ValueError(
                    f"combine: {path!r} has the ranks {list(ranks)}, and how={how.name!r} sums "
                    "factors of one rank only: choose 'exact', 'svd' or one that ends in '_svd'"
                )


def _weight(
    nodes: Sequence[LoraWeight],
    weights: np.ndarray,
    how: CombineMethod,
    rank: int | None,
    key: jax.Array,
) -> LoraWeight:
    """Returns the sum of the nodes of one weight."""
    first, by_layer = nodes[0], ranks_by_layer(nodes)
    dtype = max((n.arrays[name].dtype for n in nodes for name in "ab"), key=lambda d: d.itemsize)
    sizes = [math.prod(first.roles.sizes(first.shape, label)) for label in ("in", "out")]
    n_lanes = 2 if first.uses == "each" else 1
    each = [tuple(rank // n_lanes for rank in ranks) for ranks in by_layer]
    ranks = tuple(n_lanes * rank_of_sum(r, (sizes[0], sizes[1]), how, rank) for r in each)
    factors = summed(
        [{name: n.arrays[name] for name in ARRAYS if name in n.arrays} for n in nodes],
        weights.astype(wide(dtype)),
        key,
        by_layer=by_layer,
        ranks=ranks,
        n_batch=first.n_batch,
        uses=first.uses,
        how=how,
        dtype=dtype,
    )
    frozen = first.frozen if all(n.frozen == first.frozen for n in nodes) else ()
    node = replace_factors(
        first.replace(extras=(), frozen=frozen, a_of=None, ties=()), factors, ranks
    )
    extras = tuple(dict.fromkeys(part for n in nodes for part in n.extras))
    for part in extras:  # whose shift is s times its array
        has = [part in n.extras for n in nodes]
        terms = [(n.arrays[part.name], n.scale) for n in nodes if part in n.extras]
        arrays, scales = zip(*terms, strict=True)
        total = summed_biases(arrays, scales, weights[has].astype(wide(dtype)))
        node = node.replace(**{part.name: total.astype(dtype)})
    return node.replace(extras=extras)


def _is_kept(values: Sequence[jax.Array], weights: Sequence[float]) -> bool:
    """Returns True if a sum is the common value of all, whatever it was before training."""
    same = all(v is values[0] or bool(jnp.array_equal(v, values[0])) for v in values[1:])
    return same and math.isclose(sum(weights), 1.0, abs_tol=1e-9)


def _sum_values(nodes: Sequence[Leaf], weights: np.ndarray, before: BaseLike) -> Node:
    """Returns the sum of leaves that train in full or in some rows: v₀ + Σ wᵢ(vᵢ − v₀)."""
    first: Leaf = nodes[0]
    if before is None:
        copied: Node = first.replace(value=jnp.array(first.value, copy=True))
        return copied
    if not all(isinstance(n, TrainedRows) and n.is_table == first.is_table for n in nodes):
        total = _moved(before, [node.merged() for node in nodes], weights)
        return Trained(total.astype(before.dtype))
    rows = tuple(sorted({row for node in nodes for row in node.rows}))
    start = as_array(before)[np.asarray(rows)]
    values = []
    for node in nodes:
        places = np.asarray([rows.index(row) for row in node.rows])
        values.append(start.astype(node.value.dtype).at[places].set(node.value))
    total = _moved(start, values, weights).astype(first.value.dtype)
    summed: Node = first.replace(value=total, rows=rows)
    return summed


def _moved(before: BaseLike, values: Sequence[jax.Array], weights: np.ndarray) -> jax.Array:
    dtype = wide(before.dtype)
    start = as_array(before).astype(dtype)
    changes: list[jax.Array] = [
        (v.astype(dtype) - start) * float(w) for v, w in zip(values, weights, strict=True)
    ]
    return start + sum(changes[1:], changes[0])
