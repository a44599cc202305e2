"""Rules say which leaves of a parameter tree are adapted, how, and which train in full."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax import init as initialisers
from lora_jax.axes import EMBEDDING_NAMES, AxisRoles, default_roles
from lora_jax.paths import has_run, leaf_name, nearest, numbered_layer

Targets = str | Sequence[str]
ALL_LINEAR = "all-linear"

# Modules that "all-linear" leaves alone: embeddings (also by the name of the leaf) and the heads
# that turn the last hidden state into the model's output.
_NOT_LINEAR = re.compile(
    r"embed\w*|\w*embeddings?|wte|wpe|\w*lm_head|head|unembed\w*|classifier|score|logits"
)
# Those of masked language models: the output layer lies in a module that holds other layers, too.
_INNER_OUTPUT = re.compile(r"(.*/)?cls/predictions/decoder/\w+")
_INNER_LINEAR = re.compile(r"(.*/)?lm_head/dense/\w+")
# Leaves with two or more axes that a module owns beside its kernel, once layers are stacked.
_SIDE_LEAVES = frozenset({"bias", "b", "scale", "offset", "mean", "var", "gamma", "beta"})


class _Shown:
    """Shows a rule as it was written: only the fields that are not the default."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = [f for f in fields if getattr(self, f.name) != f.default]
        inside = ", ".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in shown)
        return f"{type(self).__name__}({inside})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return repr(list(value))
    return getattr(value, "__name__", None) or repr(value)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraRule(_Shown):
    """Adapts each kernel that `targets` selects: W becomes W + s·AB, A and B trained.

    Args:
      targets: a list of names, each equal to a run of whole path segments (``["q_proj"]`` selects
        ``model/layers/q_proj/kernel``, and never a bias or a norm); or a string, which
        `re.fullmatch`\\ es the whole ``/``-joined path of the leaf; or ``"all-linear"``: every
        kernel but embeddings and the output head.
      exclude: paths that are left alone, in either of the first two forms.
      layers: indices of the layers to adapt; the first batch axis of a stacked kernel, or the
        first numbered segment of the path. None: all.
      rank: r, the number of columns of A and rows of B.
      alpha: s = alpha / rank (or / √rank, see `scaling`). None: alpha = rank, so s = 1 (or √rank).
      scaling: "alpha/rank" (Hu et al., arXiv 2106.09685) or "alpha/sqrt(rank)" (rsLoRA,
        arXiv 2312.03732).
      dropout: probability of zeroing an element of A's input, in [0, 1).
      init: draws A and B; see `lora_jax.init`.
      dtype: of A and B. They are cast to the activation's dtype where they are used.
      in_axes, out_axes: the kernel's axis roles, where they are not Flax's (last axis out, the one
        before it in, the rest batch). Both or neither.

    Raises ValueError on construction where a field makes no sense.
    """

    targets: Targets
    exclude: Targets = ()
    layers: Sequence[int] | None = None
    rank: int = 8
    alpha: float | None = None
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    dropout: float = 0.0
    init: initialisers.Initialiser = initialisers.kaiming
    dtype: Any = jnp.float32
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _freeze_sequences(self, "targets", "exclude", "layers", "in_axes", "out_axes")
        _check_targets(self.targets)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r}: a rank is an integer of at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r}: alpha is a positive number")
        if self.scaling not in ("alpha/rank", "alpha/sqrt(rank)"):
            raise ValueError(f"scaling={self.scaling!r}: choose 'alpha/rank' or 'alpha/sqrt(rank)'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a probability in [0, 1)")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype={self.dtype!r}: A and B need a floating-point dtype")
        if (self.in_axes is None) != (self.out_axes is None):
            raise ValueError("give both in_axes and out_axes, or neither")

    @property
    def scale(self) -> float:
        """s, the factor of AB."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.scaling == "alpha/sqrt(rank)" else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TrainRule(_Shown):
    """Trains the leaves that `targets` selects in full: a head, norms, biases; ``".*"`` is all.

    `targets` is a string, `re.fullmatch`\\ ed on the whole path of the leaf, or a list of names,
    each a run of whole path segments (``["lm_head"]``, ``["bias"]``).
    """

    targets: Targets
    exclude: Targets = ()

    def __post_init__(self) -> None:
        _freeze_sequences(self, "targets", "exclude")
        _check_targets(self.targets)


Rule = LoraRule | TrainRule
# By path, the axis roles that a function was seen to give a leaf, or why there are none.
Looked = Mapping[str, AxisRoles | str] | None


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What the rules decided for one kernel: its roles, and a rule for each layer of its stack."""

    roles: AxisRoles
    rules: tuple[LoraRule | None, ...]  # one a layer of batch axis 0; a single one where no stack

    @property
    def rule(self) -> LoraRule:
        """The settings that all layers share (of `rules`, the first)."""
        return next(rule for rule in self.rules if rule is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.rank if rule else 0 for rule in self.rules)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.scale if rule else 0.0 for rule in self.rules)


def resolve(
    leaves: Sequence[tuple[str, Any]],
    rules: Sequence[Rule],
    looked: Looked = None,
) -> dict[str, Adapted | TrainRule]:
    """Which of `leaves` (path and array, or anything with a shape) gets which rule; first wins.

    Raises ValueError where a rule selects nothing (naming it and the nearest paths), where the
    roles of a selected kernel's axes are unknown, or where layers of one stack disagree.
    """
    if not rules:
        raise ValueError("no rules: give at least one LoraRule or TrainRule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule is a LoraRule or a TrainRule, not {rule!r}")
    used: set[int] = set()
    resolved: dict[str, Adapted | TrainRule] = {}
    for path, leaf in leaves:
        matching = [index for index, rule in enumerate(rules) if _selects(rule, path, leaf, looked)]
        if not matching:
            continue
        first = rules[matching[0]]
        if isinstance(first, TrainRule):
            resolved[path] = first
            used.add(matching[0])
        elif (adapted := _adapt_layers(path, leaf, rules, matching, used, looked)) is not None:
            resolved[path] = adapted
    for index, rule in enumerate(rules):
        if index not in used:
            raise ValueError(_no_match(rule, rules[:index], leaves, resolved, looked))
    return resolved


def _adapt_layers(
    path: str,
    leaf: Any,
    rules: Sequence[Rule],
    matching: list[int],
    used: set[int],
    looked: Looked,
) -> Adapted | None:
    """The rule of each layer of the kernel at `path`; marks those as `used` that take part."""
    candidates = {index: rule for index in matching if isinstance(rule := rules[index], LoraRule)}
    roles = _roles(candidates[matching[0]], path, len(leaf.shape), looked)
    batch = roles.sizes(leaf.shape, "batch")
    number = numbered_layer(path, stacked=bool(batch))
    stacked = number is None and bool(batch)
    layers = range(batch[0]) if stacked else [0 if number is None else number]
    chosen: list[LoraRule | None] = []
    for layer in layers:
        index = next((i for i, rule in candidates.items() if _has_layer(rule, layer)), None)
        chosen.append(None if index is None else candidates[index])
        if index is not None:
            used.add(index)
    if not any(chosen):
        return None
    if stacked:
        for rule in candidates.values():
            if wrong := [layer for layer in rule.layers or () if layer >= batch[0]]:
                raise ValueError(f"{rule}: layer {wrong[0]} of {path!r}, which has {batch[0]}")
    distinct = {
        (r.scaling, r.dropout, r.init, jnp.dtype(r.dtype), r.in_axes, r.out_axes)
        for r in chosen
        if r is not None
    }
    if len(distinct) > 1:
        raise ValueError(
            f"the layers of the stack {path!r} get rules that differ in more than rank and alpha; "
            "make scaling, dropout, init, dtype, in_axes and out_axes the same for all of them"
        )
    if len(set(chosen)) == 1:
        chosen = chosen[:1]
    return Adapted(roles, tuple(chosen))


def _has_layer(rule: LoraRule, layer: int) -> bool:
    return rule.layers is None or layer in rule.layers


def _selects(rule: Rule, path: str, leaf: Any, looked: Looked) -> bool:
    """Whether `rule` names the leaf and (a LoraRule) the leaf can be adapted."""
    if _matches(rule.exclude, path) or not _is_named(rule, path, leaf, looked):
        return False
    if isinstance(rule, TrainRule):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return _is_kernel(path, leaf)


def _is_named(rule: Rule, path: str, leaf: Any, looked: Looked) -> bool:
    if rule.targets != ALL_LINEAR:
        return _matches(rule.targets, path)
    if isinstance(rule, TrainRule) or leaf_name(path) in EMBEDDING_NAMES:
        return False
    known = default_roles(leaf_name(path), len(leaf.shape)) is not None
    if looked is not None:
        known = isinstance(looked.get(path), AxisRoles)
    return known and _is_inner(path)


def _is_inner(path: str) -> bool:
    """Whether the module is neither an embedding nor the output head."""
    if _INNER_LINEAR.fullmatch(path):
        return True
    if _INNER_OUTPUT.fullmatch(path):
        return False
    return not any(_NOT_LINEAR.fullmatch(segment) for segment in path.split("/"))


def _matches(targets: Targets, path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(has_run(path, name) for name in targets)


def _is_kernel(path: str, leaf: Any) -> bool:
    """A kernel has two axes or more and isn't what a module keeps beside its kernel."""
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return leaf_name(path) not in _SIDE_LEAVES


def _roles(rule: LoraRule, path: str, ndim: int, looked: Looked) -> AxisRoles:
    if rule.in_axes is not None and rule.out_axes is not None:
        try:
            return AxisRoles.of(rule.in_axes, rule.out_axes, ndim)
        except ValueError as error:
            raise ValueError(f"{rule}: {path!r}: {error}") from None
    if looked is not None:
        seen = looked.get(path, "it is not among the arguments (leaves are matched by identity)")
        if isinstance(seen, str):
            raise ValueError(
                f"{rule} selects {path!r}, and trace tells no axis roles for it: {seen}. Leave it "
                "out with exclude=…, or say them in a rule for it with in_axes=… and out_axes=…"
            )
        return seen
    roles = default_roles(leaf_name(path), ndim)
    if roles is None:
        raise ValueError(
            f"{rule} selects {path!r}, whose name tells nothing about its {ndim} axes (kernel, w "
            "and embedding have a convention). Say which are contracted with the input and which "
            "come out with LoraRule(in_axes=…, out_axes=…), or let lorafy look at what your "
            "function does with it: lorafy(params, rules, trace=(fn, params, x))"
        )
    return roles


def _no_match(
    rule: Rule,
    earlier: Sequence[Rule],
    leaves: Sequence[tuple[str, Any]],
    resolved: dict[str, Adapted | TrainRule],
    looked: Looked,
) -> str:
    """Why `rule` selected nothing: taken already, not a kernel, or no such name."""
    named = [(path, leaf) for path, leaf in leaves if _is_named(rule, path, leaf, looked)]
    if taken := [path for path, _ in named if path in resolved and earlier]:
        return f"{rule} selects nothing: an earlier rule takes {taken[0]!r} (the first rule wins)"
    if excluded := [path for path, _ in named if _matches(rule.exclude, path)]:
        return f"{rule} selects nothing: its exclude takes out {excluded[0]!r}"
    if isinstance(rule, LoraRule) and rule.layers is not None:
        if kernels := [path for path, leaf in named if _is_kernel(path, leaf)]:
            return f"{rule} selects nothing: {kernels[0]!r} has none of the layers {rule.layers}"
    if named:
        path, leaf = named[0]
        return (
            f"{rule} selects nothing: {path!r} has the shape {tuple(leaf.shape)} and the dtype "
            f"{leaf.dtype}, which is no kernel; a TrainRule trains such a leaf in full"
        )
    if not leaves:
        return f"{rule} selects nothing: the tree has no leaves"
    paths = [path for path, _ in leaves]
    names = [rule.targets] if isinstance(rule.targets, str) else rule.targets
    near = "\n  ".join(dict.fromkeys(path for name in names for path in nearest(name, paths)))
    return f"{rule} selects nothing. The nearest paths are:\n  {near}"


def _freeze_sequences(rule: Rule, *names: str) -> None:
    """Lists become tuples, so that rules can be hashed and compared."""
    for name in names:
        value = getattr(rule, name)
        if value is not None and not isinstance(value, str):
            object.__setattr__(rule, name, tuple(value))


def _check_targets(targets: Targets) -> None:
    if not targets:
        raise ValueError("targets is empty: name at least one module, or 'all-linear'")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets={targets!r} is no regular expression: {error}") from None
    elif wrong := [name for name in targets if not isinstance(name, str) or not name]:
        raise ValueError(f"targets holds {wrong[0]!r}: each target is a non-empty string")
