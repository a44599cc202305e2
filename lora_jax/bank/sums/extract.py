"""Adapters taken out of models that were fine-tuned in full."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.sums.lowrank import Factors, replace_factors, split_roots, stack_layers
from lora_jax.core.aliases import aliased
from lora_jax.core.axes import Label
from lora_jax.core.base import as_array, member
from lora_jax.core.magnitude import wide
from lora_jax.core.parts import layout
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
    """A leaf that fine-tuning has changed is no part of the adapter."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The share of a change that an adapter has, weight by weight. `print` shows it as a table.

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
        lines = []
        for path, error in self.errors.items():
            ranks = sorted({*self.ranks.get(path, ())})
            shown = "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else ""
            kept = f"rank {shown}" if shown else "some rows"
            lines.append((path, kept, f"relative error of the change {error:.4f}"))
        lines += [(path, "in full", "") for path in self.in_full]
        lines += [(path, "lost", f"changed by {size:.4f}") for path, size in self.lost.items()]
        first, second = (max((len(line[i]) for line in lines), default=0) for i in (0, 1))
        return "\n".join(f"{p:{first}}  {k:{second}}  {e}".rstrip() for p, k, e in lines)


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
    """Returns `before` with an adapter for what full fine-tuning has changed, and what is lost.

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
        raise ValueError("extract: give a rank=…, or the energy=… that each layer is to keep")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"extract: rank={rank!r}: a rank is an integer of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"extract: energy={energy}: a share in (0, 1]")
    chosen = [LoraRule(targets="all-linear")] if rules is None else rules
    old, new = _leaves(before, after)
    marked = lorafy(before, [_cheap_rule(rule) for rule in chosen], trace=trace, kinds=kinds)
    nodes = nodes_of(marked)
    extracted: dict[str, Node] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    for path in old:
        node, value = nodes.get(path), new[path]
        if isinstance(node, LoraWeight) and (kept := _weight(node, value, rank, energy)):
            extracted[path], errors[path] = kept
            ranks[path] = kept[0].ranks
            continue
        change = _change(old[path], value)
        if not change:
            continue
        if isinstance(node, TrainedRows):
            picked = as_array(value)[np.asarray(node.rows)].astype(node.value.dtype)
            extracted[path] = node.replace(value=picked)
            errors[path] = _change(extracted[path].merged(), value) / change
        elif isinstance(node, Trained) or (keep_rest and node is None and _is_float(value)):
            extracted[path] = Trained(jnp.array(as_array(value), old[path].dtype, copy=True))
        else:
            lost[path] = change / (float(_norm(old[path])) or 1.0)
    if not extracted:
        raise ValueError(
            "extract: nothing that the rules select differs between before and after"
            + (f"; {next(iter(lost))!r} does, among {len(lost)}" if lost else "")
        )
    if lost:
        some = ", ".join(list(lost)[:5]) + (", …" if len(lost) > 5 else "")
        warnings.warn(
            f"{len(lost)} leaves have changed and are no part of the adapter: {some}. Keep them "
            "whole by a TrainRule(targets=[…]) among the rules, or all by keep_rest=True",
            ExtractWarning,
            stacklevel=2,
        )
    in_full = tuple(path for path, node in extracted.items() if isinstance(node, Trained))
    tree = map_leaves(extracted.get, aliased(before))
    return tree, Extraction(ranks, errors, in_full, lost)


def _cheap_rule(rule: Rule) -> Rule:
    """Returns a rule that selects the same, at little cost; checks that all it says has effect."""
    if not isinstance(rule, LoraRule):
        return rule
    for field in dataclasses.fields(rule):
        if field.name not in _FIELDS and getattr(rule, field.name) != field.default:
            hint = ": give it to extract" if field.name == "rank" else ": leave it out"
            raise ValueError(f"extract: {field.name} of {rule} has no effect here{hint}")
    return dataclasses.replace(rule, rank=1)


def _leaves(before: Tree, after: Tree) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns the arrays of both trees by path, after a check that they belong together."""
    for name, tree in (("before", before), ("after", after)):
        if nodes := nodes_of(tree):
            raise ValueError(
                f"extract: {name} is adapted (at {next(iter(nodes))!r}): give a plain tree, "
                "lora_jax.merge(tree) or lora_jax.strip(tree)"
            )
    old, new = (
        {path: leaf for path, leaf in leaves_of(tree)[0] if hasattr(leaf, "dtype")}
        for tree in (before, after)
    )
    if only := sorted(set(old) ^ set(new)):
        raise ValueError(f"extract: only one of the trees has {only[0]!r}, among {len(only)}")
    for path, leaf in old.items():
        if tuple(leaf.shape) != tuple(new[path].shape):
            raise ValueError(
                f"extract: {path!r} has the shape {tuple(leaf.shape)} before and "
                f"{tuple(new[path].shape)} after"
            )
    return old, new


def _weight(
    node: LoraWeight, after: BaseLike, rank: int | None, energy: float | None
) -> tuple[LoraWeight, float] | None:
    """Returns the weight with factors of its change, and their relative error.

    None if no adapted layer has changed.
    """
    labels, n = node.labels, node.n_batch
    depth = node.shape[labels.index("batch")] if n else 1
    groups: list[tuple[list[int], Factors | None]] = []
    left = whole = 0.0
    for layer in range(depth):
        a, b, s = _decomposed(node.base, after, layer, labels)
        energies = np.square(np.asarray(s, np.float64)).reshape(-1, s.shape[-1]).sum(0)
        is_kept = node.ranks[layer % len(node.ranks)] > 0 and energies[0] > 0
        r = _rank(energies, rank, energy) if is_kept else 0
        whole, left = whole + float(energies.sum()), left + float(energies[r:].sum())
        if r:
            a, b = (factor[..., :r, :].astype(node.a.dtype) for factor in (a, b))
            groups.append(([layer], (a[None], b[None]) if depth > 1 else (a, b)))
    if not groups:
        return None
    return replace_factors(node, *stack_layers(groups, depth)), math.sqrt(left / whole)


def _rank(energies: np.ndarray, rank: int | None, energy: float | None) -> int:
    """Returns the rank that keeps a share of the energies, at most `rank`."""
    largest = min(rank or len(energies), len(energies))
    if energy is None:
        return largest
    kept = np.cumsum(energies)
    enough = int(np.argmax(kept >= energy * kept[-1])) + 1
    return min(enough, largest)


@functools.partial(jax.jit, static_argnames="labels")
def _decomposed(
    before: BaseLike, after: BaseLike, layer: jax.Array | int, labels: tuple[Label, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns A [batch…, k, in], B [batch…, k, out] and singular values S [batch…, k] of a change.

    Args:
      before, after: the kernels, or the stacks of which one layer is decomposed.
      layer: index along the first batch axis.
      labels: the roles of the kernel's axes.
    """
    dtype = max(wide(before.dtype), wide(after.dtype), key=lambda kind: np.dtype(kind).itemsize)
    order: tuple[Label, ...] = ("batch", "in", "out")

    def matrix(leaf: Leaf) -> jax.Array:
        own = labels
        if "batch" in labels:
            axis = labels.index("batch")
            own = (*labels[:axis], *labels[axis + 1 :])
            leaf = member(leaf, axis, layer)
        array = as_array(leaf)
        batch, rows, columns = (
            [array.shape[axis] for axis in layout((label,), own)] for label in order
        )
        flat = (*batch, math.prod(rows), math.prod(columns))
        return jnp.transpose(array, layout(order, own)).reshape(flat).astype(dtype)

    change = matrix(after) - matrix(before)
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    return *split_roots(u, s, vt, s.shape[-1]), s


def _change(before: BaseLike, after: BaseLike) -> float:
    """Returns ‖after − before‖; 1 for leaves of no floats that differ."""
    return 0.0 if before is after else float(_distance(before, after))


@jax.jit
def _distance(before: BaseLike, after: BaseLike) -> jax.Array:
    old, new = as_array(before), as_array(after)
    if not _is_float(old):
        return jnp.any(old != new).astype(jnp.float32)
    dtype = max(wide(old.dtype), wide(new.dtype), key=lambda kind: np.dtype(kind).itemsize)
    return _length(new.astype(dtype) - old.astype(dtype))


@jax.jit
def _norm(leaf: Leaf) -> jax.Array:
    array = as_array(leaf)
    if not _is_float(array):
        return jnp.ones((), jnp.float32)
    return _length(array.astype(wide(array.dtype)))


def _length(array: jax.Array) -> jax.Array:
    length: jax.Array = jnp.linalg.norm(array.reshape(-1))
    return length


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)
