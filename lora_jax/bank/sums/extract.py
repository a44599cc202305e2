"""Extracts adapters from models that were fine-tuned in full."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.bank.sums.lowrank import Factors, replace_factors, split_roots, stack_layers
from lora_jax.core.aliases import alias_repeated_objects
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array, member
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import layout_of_axes
from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained, TrainedRows, leaves_of, map_leaves
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.rules import LoraRule, Rule

# Fields of a LoraRule that say which kernels are adapted and how they train on.
_FIELDS = frozenset(
    {"targets", "exclude", "layers", "dropout", "freeze_a", "train_bias", "dtype"}
    | {"in_axes", "out_axes"}
)


class ExtractWarning(UserWarning):
    """Warns of a leaf that fine-tuning changed, but that the adapter does not include."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The errors of an extracted adapter, and the changes that it lacks; printed as a table.

    Attributes:
      ranks: ranks of each kernel's layers, or one for all, by path.
      errors: ‖Δ − AB‖/‖Δ‖ of each kernel, and of each leaf of which some rows train.
      in_full: the leaves that the adapter holds whole.
      lost: ‖Δ‖/‖W‖ of each leaf that has changed and is no part of the adapter.
    """

    ranks: dict[str, tuple[int, ...]]
    errors: dict[str, float]
    in_full: tuple[str, ...]
    lost: dict[str, float]

    def __str__(self) -> str:
        lines: list[tuple[str, str, str]] = []  # a leaf, its form in the adapter, its change
        for path, error in self.errors.items():
            ranks = self.ranks.get(path, ())
            form = "some rows"
            if ranks:
                smallest, largest = min(ranks), max(ranks)
                form = f"rank {smallest}" if smallest == largest else f"rank {smallest}–{largest}"
            lines.append((path, form, f"relative error of the change {error:.4f}"))
        lines += [(path, "in full", "") for path in self.in_full]
        lines += [(path, "lost", f"changed by {size:.4f}") for path, size in self.lost.items()]
        path_width = max((len(path) for path, _, _ in lines), default=0)
        form_width = max((len(form) for _, form, _ in lines), default=0)
        return "\n".join(
            f"{path:{path_width}}  {form:{form_width}}  {change}".rstrip()
            for path, form, change in lines
        )


def extract(
    before: Tree,
    after: Tree,
    rules: Sequence[Rule] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keep_rest: bool = False,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> tuple[Tree, Extraction]:
    """Returns `before` with an adapter for the change by full fine-tuning, and the lost share.

    Each selected kernel gets the best approximation AB of Δ = after − before (Eckart–Young), from
    its singular values in fp32 (or wider), one layer of a stack at a time; the scale is 1.

    Args:
      before: the base, a plain tree; its kernels may be codes, and the adapter then also mends what
        coding has changed.
      after: the same tree after fine-tuning.
      rules: a `LoraRule` for kernels, a `TrainRule` for leaves (norms, embeddings) that the adapter
        holds whole; the first that selects a leaf wins. By default
        ``[LoraRule(targets="all-linear")]``. Ranks are chosen here, not in a rule.
      rank: rank of each layer. With `energy`, the largest rank.
      energy: the share of ‖Δ‖² (the sum of squared singular values) that each layer keeps, in
        (0, 1], by the smallest rank that does. Experts of one layer have one rank.
      keep_rest: hold all other leaves whole that have changed.
      trace, kinds: as in `lorafy`.

    Returns:
      (tree, extraction). Kernels without a change stay plain.

    Raises:
      ValueError: neither rank nor energy is given; a rule has a field that has no effect here; a
        tree is adapted; the trees differ in paths or shapes; nothing that is selected has changed.

    Warns:
      ExtractWarning: a leaf that has changed is no part of the adapter.

    >>> from lora_jax import bank
    >>> before = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> after = {"dense": {"kernel": jnp.ones((4, 3)).at[0].set(2.0), "bias": jnp.ones(3)}}
    >>> tree, extraction = bank.extract(before, after, energy=0.99, keep_rest=True)
    >>> print(extraction)
    dense/kernel  rank 1   relative error of the change 0.0000
    dense/bias    in full
    """
    if rank is None and energy is None:
        raise ValueError(
            "extract: give rank=…, or energy=…, the share of the change that each layer keeps."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"extract: rank={rank!r} must be an integer of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"extract: energy={energy} must be in (0, 1].")
    if rules is None:
        rules = [LoraRule(targets="all-linear")]
    leaves_before, leaves_after = _leaves(before, after)
    # The nodes say what is selected, and how it trains on.
    tree = lorafy(before, [_rank_one_rule(rule) for rule in rules], trace=trace, kinds=kinds)
    nodes = nodes_of(tree)
    extracted: dict[str, Node] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    for path, leaf in leaves_before.items():
        node = nodes.get(path)
        new_leaf = leaves_after[path]
        if isinstance(node, LoraWeight):
            weight_and_error = _weight_of_change(node, new_leaf, rank, energy)
            if weight_and_error is not None:
                weight, errors[path] = weight_and_error
                extracted[path] = weight
                ranks[path] = weight.ranks
                continue
        change = _change(leaf, new_leaf)
        if change == 0:
            continue
        is_held_whole = isinstance(node, Trained) or (
            keep_rest and node is None and _is_float(new_leaf)
        )
        if isinstance(node, TrainedRows):
            rows = as_array(new_leaf)[np.asarray(node.rows)].astype(node.value.dtype)
            trained_rows = node.replace(value=rows)
            extracted[path] = trained_rows
            errors[path] = _change(trained_rows.merged(), new_leaf) / change
        elif is_held_whole:
            extracted[path] = Trained(jnp.array(as_array(new_leaf), leaf.dtype, copy=True))
        else:
            lost[path] = change / (float(_norm(leaf)) or 1.0)
    lost_paths = list(lost)
    if not extracted:
        hint = f" Other leaves differ: {lost_paths[0]!r} and {len(lost) - 1} more." if lost else ""
        raise ValueError(
            "extract: none of the leaves that the rules select differs between before and "
            f"after.{hint}"
        )
    if lost:
        examples = ", ".join(lost_paths[:5]) + (", …" if len(lost) > 5 else "")
        warnings.warn(
            f"{len(lost)} changed leaves are not part of the adapter: {examples}. Keep their "
            "values with a TrainRule(targets=[…]) among the rules, or keep all with "
            "keep_rest=True.",
            ExtractWarning,
            stacklevel=2,
        )
    in_full = tuple(path for path, node in extracted.items() if isinstance(node, Trained))
    extraction = Extraction(ranks=ranks, errors=errors, in_full=in_full, lost=lost)
    return map_leaves(extracted.get, alias_repeated_objects(before)), extraction


def _rank_one_rule(rule: Rule) -> Rule:
    """Returns a rule of rank 1 with the same targets; checks that each field has an effect."""
    if not isinstance(rule, LoraRule):
        return rule
    for field in dataclasses.fields(rule):
        has_no_effect = field.name not in _FIELDS and getattr(rule, field.name) != field.default
        if has_no_effect:
            hint = "Pass it to extract." if field.name == "rank" else "Remove it."
            raise ValueError(f"extract: {field.name} of {rule} has no effect here. {hint}")
    return dataclasses.replace(rule, rank=1)


def _leaves(before: Tree, after: Tree) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns the arrays of both trees by path, after a check that the trees match."""
    leaves_before = _plain_leaves("before", before)
    leaves_after = _plain_leaves("after", after)
    unmatched_paths = sorted(set(leaves_before) ^ set(leaves_after))
    if unmatched_paths:
        raise ValueError(
            f"extract: only one of the two trees has {unmatched_paths[0]!r} (and "
            f"{len(unmatched_paths) - 1} more leaves)."
        )
    for path, leaf in leaves_before.items():
        shape = tuple(leaf.shape)
        new_shape = tuple(leaves_after[path].shape)
        if shape != new_shape:
            raise ValueError(
                f"extract: {path!r} has the shape {shape} in before, but {new_shape} in after."
            )
    return leaves_before, leaves_after


def _plain_leaves(name: str, tree: Tree) -> dict[str, Leaf]:
    """Returns the arrays of a tree by path; raises a ValueError if the tree is adapted."""
    nodes = nodes_of(tree)
    if nodes:
        raise ValueError(
            f"extract: {name} is adapted (at {list(nodes)[0]!r}). Pass a plain tree, "
            "lora_jax.merge(tree) or lora_jax.strip(tree)."
        )
    return {path: leaf for path, leaf in leaves_of(tree)[0] if hasattr(leaf, "dtype")}


def _weight_of_change(
    node: LoraWeight, new_kernel: BaseLike, rank: int | None, energy: float | None
) -> tuple[LoraWeight, float] | None:
    """Returns the weight with factors of its change, and their relative error.

    None if no adapted layer has changed.
    """
    depth = node.shape[node.labels.index("batch")] if node.n_batch > 0 else 1
    groups: list[tuple[list[int], Factors | None]] = []
    lost_energy = total_energy = 0.0
    for layer in range(depth):
        a, b, singular_values = _decomposed(node.base, new_kernel, layer, node.labels)
        # Summed over the experts of the layer.
        squares = np.square(np.asarray(singular_values, np.float64))
        energies = squares.reshape(-1, squares.shape[-1]).sum(0)
        is_adapted = node.ranks[layer % len(node.ranks)] > 0
        has_changed = energies[0] > 0
        layer_rank = _rank(energies, rank, energy) if is_adapted and has_changed else 0
        total_energy += float(energies.sum())
        lost_energy += float(energies[layer_rank:].sum())
        if layer_rank == 0:
            continue
        a = a[..., :layer_rank, :].astype(node.a.dtype)
        b = b[..., :layer_rank, :].astype(node.a.dtype)
        groups.append(([layer], (a[None], b[None]) if depth > 1 else (a, b)))
    if not groups:
        return None
    factors, ranks = stack_layers(groups, depth)
    return replace_factors(node, factors, ranks), math.sqrt(lost_energy / total_energy)


def _rank(energies: np.ndarray, rank: int | None, energy: float | None) -> int:
    """Returns the rank that keeps a share of the energies, at most `rank`."""
    max_rank = min(rank or len(energies), len(energies))
    if energy is None:
        return max_rank
    energy_by_rank = np.cumsum(energies)
    is_enough = energy_by_rank >= energy * energy_by_rank[-1]
    sufficient_rank = int(np.argmax(is_enough)) + 1
    return min(sufficient_rank, max_rank)


@functools.partial(jax.jit, static_argnames="labels")
def _decomposed(
    before: BaseLike, after: BaseLike, layer: jax.Array | int, labels: tuple[Label, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns A [batch…, k, in], B [batch…, k, out] and singular values [batch…, k] of a change.

    Args:
      before, after: the kernels, or the stacks of which one layer is decomposed.
      layer: index along the first batch axis.
      labels: the roles of the kernel's axes.
    """
    dtype = _wide_dtype(before.dtype, after.dtype)
    layer_labels = labels
    stack_axis = labels.index("batch") if "batch" in labels else None
    if stack_axis is not None:
        layer_labels = (*labels[:stack_axis], *labels[stack_axis + 1 :])

    def to_matrix(leaf: Leaf) -> jax.Array:
        """Returns a layer as [batch…, in, out]."""
        array = as_array(leaf if stack_axis is None else member(leaf, stack_axis, layer))
        batch_axes = layout_of_axes(("batch",), layer_labels)
        in_axes = layout_of_axes(("in",), layer_labels)
        out_axes = layout_of_axes(("out",), layer_labels)
        shape = (
            *(array.shape[axis] for axis in batch_axes),
            math.prod(array.shape[axis] for axis in in_axes),
            math.prod(array.shape[axis] for axis in out_axes),
        )
        order = layout_of_axes(("batch", "in", "out"), layer_labels)
        return jnp.transpose(array, order).reshape(shape).astype(dtype)

    change = to_matrix(after) - to_matrix(before)
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    a, b = split_roots(u, s, vt, s.shape[-1])
    return a, b, s


def _wide_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """Returns the widest of some dtypes, at least fp32."""
    return max(map(accumulation_dtype, dtypes), key=lambda dtype: np.dtype(dtype).itemsize)


def _change(before: BaseLike, after: BaseLike) -> float:
    """Returns ‖after − before‖; for leaves that are not floats, 1 if they differ."""
    return 0.0 if before is after else float(_distance(before, after))


@jax.jit
def _distance(before: BaseLike, after: BaseLike) -> jax.Array:
    """Returns ‖after − before‖ as an array, or whether leaves that are not floats differ."""
    array_before = as_array(before)
    array_after = as_array(after)
    if not _is_float(array_before):
        return jnp.any(array_before != array_after).astype(jnp.float32)
    dtype = _wide_dtype(array_before.dtype, array_after.dtype)
    return _length(array_after.astype(dtype) - array_before.astype(dtype))


@jax.jit
def _norm(leaf: Leaf) -> jax.Array:
    array = as_array(leaf)
    if not _is_float(array):
        return jnp.ones((), jnp.float32)
    return _length(array.astype(accumulation_dtype(array.dtype)))


def _length(array: jax.Array) -> jax.Array:
    length: jax.Array = jnp.linalg.norm(array.reshape(-1))
    return length


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)
