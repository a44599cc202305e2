"""Combines adapters over one base to one adapter: their weighted sum.

The terms of a leaf are its nodes in the trees. `shared_base` checks first that the trees have one
base.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.sums.arithmetic import METHODS, CombineMethod, Sign
from lora_jax.bank.sums.lowrank import replace_factors
from lora_jax.bank.sums.terms import ARRAYS, rank_of_sum, ranks_by_layer, summed, summed_biases
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.magnitude import accumulation_dtype
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
from lora_jax.saving.fingerprint import base_fingerprint, keys_that_differ

_Terms = Mapping[int, Leaf]  # nodes of one path, by the index of their tree


def shared_base(what: str, trees: Mapping[str, Tree]) -> dict[str, Leaf]:
    """Returns the frozen leaves of trees over one base by path: W, or the leaf itself.

    A leaf that trains in full has its earlier value from a tree that leaves it frozen; where there
    is none, it is left out.

    Args:
      what: name of the calling function, for messages.
      trees: adapted or plain, by a name for messages.

    Raises:
      ValueError: the trees have different paths, shapes or frozen values.
    """
    leaves_by_name = {name: dict(leaves_of(tree)[0]) for name, tree in trees.items()}
    first_name = next(iter(leaves_by_name))
    first_leaves = leaves_by_name[first_name]
    base: dict[str, Leaf] = {}
    owner_of_path: dict[str, str] = {}  # the first tree that leaves a leaf frozen
    for name, leaves in leaves_by_name.items():
        if list(leaves) != list(first_leaves):
            unshared_paths = sorted(leaves.keys() ^ first_leaves.keys())
            raise ValueError(
                f"{what}: {first_name} and {name} have different leaves, such as "
                f"{unshared_paths[:3]}. All trees must be adapted trees of the same base."
            )
        other_objects: dict[str, Leaf] = {}  # leaves whose values have to be compared
        for path, leaf in leaves.items():
            frozen_leaf = leaf.base if is_node(leaf) else leaf
            first_leaf = first_leaves[path]
            first_shape = _shape(first_leaf.base if is_node(first_leaf) else first_leaf)
            if _shape(frozen_leaf) != first_shape:
                raise ValueError(
                    f"{what}: {path!r} has the shape {first_shape} in {first_name}, but "
                    f"{_shape(frozen_leaf)} in {name}. The trees have different bases."
                )
            if isinstance(leaf, Trained):
                continue
            owner_of_path.setdefault(path, name)
            base_leaf = base.setdefault(path, frozen_leaf)
            if base_leaf is not frozen_leaf and not is_abstract((frozen_leaf, base_leaf)):
                other_objects[path] = frozen_leaf
        base_sums = base_fingerprint({path: base[path] for path in other_objects})
        different_paths = keys_that_differ(base_sums, base_fingerprint(other_objects))
        if different_paths:
            raise ValueError(
                f"{what}: {owner_of_path[different_paths[0]]} and {name} have different "
                f"bases: {len(different_paths)} frozen leaves differ, such as "
                f"{', '.join(different_paths[:3])}. Load all adapters onto one base with "
                "load_adapter(folder, params)."
            )
    return base


def _shape(leaf: Leaf) -> tuple[int, ...] | None:
    """Returns the shape of a leaf; None for leaves that are not arrays."""
    shape: tuple[int, ...] | None = getattr(leaf, "shape", None)
    return shape


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
    method = _method(how, rank, density, majority_sign_method, key)
    if not trees or len(weights) != len(trees):
        raise ValueError(
            f"combine: there are {len(trees)} trees, but {len(weights)} weights. Give at "
            "least one tree, and one weight for each."
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"combine: the weight {weight} is not a finite number.")
    named_trees = {f"trees[{index}]": tree for index, tree in enumerate(trees)}
    if base is not None:
        named_trees["base"] = base
    base_leaves = shared_base("combine", named_trees)
    terms_by_path = _terms(trees, base)
    for path, terms in terms_by_path.items():
        _check_terms(path, terms, method, base_leaves, weights)
    key = jax.random.key(0) if key is None else key

    def sum_leaf(path: str, leaf: Leaf) -> Leaf:
        """Returns the summed node of a leaf, or the leaf itself."""
        if path not in terms_by_path:
            return leaf
        terms = terms_by_path[path]
        term_weights = np.asarray([weights[index] for index in terms])
        lora_nodes = [node for node in terms.values() if isinstance(node, LoraWeight)]
        if lora_nodes:
            return _sum_weights(lora_nodes, term_weights, method, rank, fold_in_path(key, path))
        return _sum_values(list(terms.values()), term_weights, base_leaves.get(path))

    return map_leaves(sum_leaf, trees[0])


def _method(
    how: str, rank: int | None, density: float | None, sign: Sign | None, key: jax.Array | None
) -> CombineMethod:
    """Returns the method by its name, after a check of its options."""
    if how not in METHODS:
        hint = " PEFT's 'cat' is 'exact'." if how == "cat" else ""
        raise ValueError(f"combine: how={how!r} is unknown. Choose one of {list(METHODS)}.{hint}")
    method = METHODS[how]
    has_effect = {
        "rank": method.is_compressed,
        "density": method.prunes is not None,
        "majority_sign_method": method.elects,
        "key": method.prunes == "random",
    }
    options = {"rank": rank, "density": density, "majority_sign_method": sign, "key": key}
    for name, value in options.items():
        if value is not None and not has_effect[name]:
            raise ValueError(f"combine: {name} has no effect with how={how!r}. Remove {name}.")
    if method.prunes and density is None:
        raise ValueError(f"combine: how={how!r} needs density=…, the share of elements that stay.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"combine: density={density} must be in (0, 1].")
    if method.prunes == "random" and key is None:
        raise ValueError(f"combine: how={how!r} draws random numbers. Pass key=jax.random.key(…).")
    if sign not in (None, "total", "frequency"):
        raise ValueError(
            f"combine: majority_sign_method={sign!r} is unknown. Choose 'total' or 'frequency'."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"combine: rank={rank!r} must be an integer of at least 1.")
    return dataclasses.replace(method, name=how, density=density or 1.0, sign=sign or "total")


def _terms(trees: Sequence[Tree], base: Tree | None) -> dict[str, dict[int, Node]]:
    """Returns the nodes of each path in all trees, by the index of the tree."""
    if base is not None and nodes_of(base):
        raise ValueError(
            "combine: base must be the plain tree, but it is adapted. Pass lora_jax.strip(base)."
        )
    terms: dict[str, dict[int, Node]] = defaultdict(dict)
    for index, tree in enumerate(trees):
        nodes = nodes_of(tree)
        if not nodes:
            raise ValueError(
                f"combine: trees[{index}] is a plain tree. Call lorafy or load_adapter first."
            )
        for path, node in nodes.items():
            if not node.is_on:
                raise ValueError(
                    f"combine: trees[{index}] has no adapter at {path!r}, because it is the "
                    "base half of a tree. Call join(adapter, base) first."
                )
            terms[path][index] = node
    return terms


def _check_terms(
    path: str,
    terms: _Terms,
    method: CombineMethod,
    base_leaves: Mapping[str, Leaf],
    weights: Sequence[float],
) -> None:
    """Raises a ValueError if the nodes of one path cannot be summed."""
    lora_indices = [index for index, node in terms.items() if isinstance(node, LoraWeight)]
    value_indices = [index for index in terms if index not in lora_indices]
    if lora_indices and value_indices:
        raise ValueError(
            f"combine: trees[{lora_indices[0]}] adapts {path!r}, but "
            f"trees[{value_indices[0]}] trains it, or rows of it, in full. Make an adapter "
            "of the latter first: lora_jax.bank.extract(base, merge(tree), …)."
        )
    if lora_indices:
        _check_lora_terms(path, terms, method)
        return
    values = [node.value for node in terms.values()]
    is_constant = _sum_is_constant(values, [weights[index] for index in terms])
    if path not in base_leaves and not is_constant:
        raise ValueError(
            f"combine: {path!r} is trained in full, and its sum needs its value before "
            "training. Pass the plain tree: combine(…, base=params)."
        )


def _check_lora_terms(path: str, terms: _Terms, method: CombineMethod) -> None:
    """Raises a ValueError if the adapters of one weight cannot be summed."""
    first_index, first_node = next(iter(terms.items()))
    for index, node in terms.items():
        if node.invocation is not None:
            raise ValueError(
                f"combine: trees[{index}] is an activated LoRA, which acts only from its "
                "invocation on. It cannot be added to adapters that act on other tokens."
            )
        for part in node.extras:
            if part.vector != "shift":
                raise ValueError(
                    f"combine: trees[{index}] has the part {part.name!r} at {path!r}, which "
                    "cannot be summed. Make a plain adapter of it first: "
                    "lora_jax.bank.extract(strip(tree), merge(tree), rank=…)."
                )
        for name in ("roles", "uses"):
            first_value, value = getattr(first_node, name), getattr(node, name)
            if first_value != value:
                raise ValueError(
                    f"combine: {path!r} has {name} {first_value} in trees[{first_index}], "
                    f"but {value} in trees[{index}]. Adapt it with the same {name} in all "
                    "trees."
                )
        if method.summands == "factors" and node.start is not None:
            raise ValueError(
                f"combine: {path!r} of trees[{index}] was initialized from its base, and "
                f"how={method.name!r} cannot sum such factors. Choose 'exact' or 'svd'."
            )
    if method.summands == "factors":
        for ranks in ranks_by_layer(list(terms.values())):
            if len({rank for rank in ranks if rank}) > 1:
                raise ValueError(
                    f"combine: {path!r} has the ranks {list(ranks)}, but how={method.name!r} "
                    "needs the same rank in all trees. Choose 'exact', 'svd' or a method "
                    "that ends in '_svd'."
                )


def _sum_weights(
    nodes: Sequence[LoraWeight],
    weights: np.ndarray,
    method: CombineMethod,
    rank: int | None,
    key: jax.Array,
) -> LoraWeight:
    """Returns the sum of the nodes of one weight."""
    first_node = nodes[0]
    dtypes = [node.arrays[name].dtype for node in nodes for name in "ab"]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    n_in = math.prod(first_node.roles.sizes(first_node.shape, "in"))
    n_out = math.prod(first_node.roles.sizes(first_node.shape, "out"))
    n_lanes = 2 if first_node.uses == "each" else 1  # lanes: halves of the rank, one for each use
    by_layer = ranks_by_layer(nodes)
    ranks = []
    for term_ranks in by_layer:
        lane_ranks = tuple(term_rank // n_lanes for term_rank in term_ranks)
        ranks.append(n_lanes * rank_of_sum(lane_ranks, (n_in, n_out), method, rank))
    arrays_of_nodes: list[dict[str, jax.Array]] = []
    for node in nodes:
        arrays_of_nodes.append({n: node.arrays[n] for n in ARRAYS if n in node.arrays})
    factors = summed(
        arrays_of_nodes,
        weights.astype(accumulation_dtype(dtype)),
        key,
        by_layer=by_layer,
        ranks=tuple(ranks),
        n_batch=first_node.n_batch,
        uses=first_node.uses,
        method=method,
        dtype=dtype,
    )
    frozen = first_node.frozen if all(n.frozen == first_node.frozen for n in nodes) else ()
    plain_node = first_node.replace(extras=(), frozen=frozen, a_of=None, ties=())
    result = replace_factors(plain_node, factors, tuple(ranks))
    extras = tuple(dict.fromkeys(part for node in nodes for part in node.extras))
    for part in extras:  # biases on B, whose shift is s times the array
        owners = [node for node in nodes if part in node.extras]
        owner_weights = weights[[part in node.extras for node in nodes]]
        bias = summed_biases(
            tuple(node.arrays[part.name] for node in owners),
            tuple(node.scale for node in owners),
            owner_weights.astype(accumulation_dtype(dtype)),
        )
        result = result.replace(**{part.name: bias.astype(dtype)})
    return result.replace(extras=extras)


def _sum_is_constant(values: Sequence[jax.Array], weights: Sequence[float]) -> bool:
    """Returns True if all values are equal and the weights sum to 1."""
    are_equal = all(
        value is values[0] or bool(jnp.array_equal(value, values[0])) for value in values[1:]
    )
    return are_equal and math.isclose(sum(weights), 1.0, abs_tol=1e-9)


def _sum_values(nodes: Sequence[Leaf], weights: np.ndarray, base_leaf: BaseLike) -> Node:
    """Returns the sum of fully or partly trained leaves: v₀ + Σ wᵢ(vᵢ − v₀).

    Without v₀, `_check_terms` has made sure that the sum is the value of each.
    """
    first_node: Leaf = nodes[0]
    if base_leaf is None:
        copy: Node = first_node.replace(value=jnp.array(first_node.value, copy=True))
        return copy
    are_rows_of_one_kind = all(
        isinstance(node, TrainedRows) and node.is_table == first_node.is_table for node in nodes
    )
    if not are_rows_of_one_kind:
        value = _sum_changes(base_leaf, [node.merged() for node in nodes], weights)
        return Trained(value.astype(base_leaf.dtype))
    rows = tuple(sorted({row for node in nodes for row in node.rows}))
    base_rows = as_array(base_leaf)[np.asarray(rows)]
    values = []
    for node in nodes:
        indices = np.asarray([rows.index(row) for row in node.rows])
        values.append(base_rows.astype(node.value.dtype).at[indices].set(node.value))
    value = _sum_changes(base_rows, values, weights).astype(first_node.value.dtype)
    node_of_sum: Node = first_node.replace(value=value, rows=rows)
    return node_of_sum


def _sum_changes(
    base_leaf: BaseLike, values: Sequence[jax.Array], weights: np.ndarray
) -> jax.Array:
    """Returns v₀ + Σ wᵢ(vᵢ − v₀), in fp32 or wider."""
    dtype = accumulation_dtype(base_leaf.dtype)
    base_value = as_array(base_leaf).astype(dtype)
    changes: list[jax.Array] = [
        (value.astype(dtype) - base_value) * float(weight)
        for value, weight in zip(values, weights, strict=True)
    ]
    return base_value + sum(changes[1:], changes[0])
