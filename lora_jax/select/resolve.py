"""Resolves rules: finds the leaves that they select, and makes a decision for each leaf.

A **decision** is an `Adaptation` of a kernel, or the `FullTraining` of a leaf.
"""

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence

import jax.numpy as jnp

from lora_jax.adapt.sides import RoleWarning
from lora_jax.adapt.user_code import user_line_of_call, warn
from lora_jax.core.axes import AxisRoles, ObservedRoles, default_roles
from lora_jax.core.paths import leaf_name, numbered_layer
from lora_jax.core.types import JsonObject, Leaf
from lora_jax.rules import ALL_LINEAR, PRESETS, LoraRule, Rule, TrainRule
from lora_jax.select.matching import (
    BIAS_NAMES,
    NOT_AN_ARGUMENT,
    LeafFacts,
    no_match_reason,
    selects,
)

_ROLE_REMEDY = (
    "Exclude the leaf with exclude=…, or give its in_axes=… and out_axes=… in a separate rule."
)

Leaves = Sequence[tuple[str, Leaf]]  # path and array, or anything with a shape and a dtype


@dataclasses.dataclass(frozen=True)
class FullTraining:
    """The decision for a leaf that trains in full, or in some rows of its first axis.

    Attributes:
      rows: indices of the rows; None: all.
      is_table: True for rows of a table, False for layers of a stack.
    """

    rows: tuple[int, ...] | None = None
    is_table: bool = False


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The decision for one kernel.

    Attributes:
      roles: axis roles of the weight.
      rules: a rule for each layer of batch axis 0, None where the layer isn't adapted; a single
        rule where all layers have the same rule, or there is no stack.
    """

    roles: AxisRoles
    rules: tuple[LoraRule | None, ...]

    @property
    def rule(self) -> LoraRule:
        """The first of `rules`, which has the settings that all layers share."""
        return next(rule for rule in self.rules if rule is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each layer; 0 if the layer is not adapted."""
        return tuple(rule.stored_rank if rule else 0 for rule in self.rules)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each layer; 0 if the layer is not adapted."""
        return tuple(rule.scale if rule else 0.0 for rule in self.rules)


Decision = Adaptation | FullTraining


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns an iterable of rules as a tuple, after a check of their types.

    Raises:
      TypeError: `rules` is no iterable of rules; the message says what to write.
      ValueError: there are no rules.
    """
    if isinstance(rules, Rule):
        raise TypeError(f"rules must be a list. Write [{rules!r}].")
    # A string or a dictionary is an iterable, but not of rules.
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a list, such as [LoraRule(targets=['q_proj'])], not {rules!r}."
            f"{_peft_hint(rules)}"
        )
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"A rule must be a LoraRule or a TrainRule, not {rule!r}.{_peft_hint(rule)}"
            )
    if not rules:
        raise ValueError("rules is empty. Give at least one LoraRule or TrainRule.")
    return rules


def resolve(
    leaves: Leaves,
    rules: Iterable[Rule],
    facts: LeafFacts = LeafFacts(),  # noqa: B008
) -> dict[str, Decision]:
    """Returns the decision for each leaf that a rule selects, by path; the first rule wins.

    Args:
      leaves: leaves of the tree, with their paths.
      rules: the rules, in the order in which they apply; see `check_rules`.
      facts: facts about the leaves beyond their names.

    Raises:
      ValueError: a rule selects nothing (the message names it and the nearest paths), the roles of
        a selected kernel's axes are unknown, or layers of one stack disagree.
      TypeError: `rules` is no iterable of rules.
    """
    rules = check_rules(rules)
    for rule in rules:
        if facts.kinds is None and rule.targets in PRESETS and rule.targets != ALL_LINEAR:
            raise ValueError(
                f"{rule}: the preset {rule.targets!r} needs the kind of each leaf. Call "
                "lorafy(params, rules, kinds=lora_jax.models.kinds(model.config)), or write your "
                "own kinds={path: kind}."
            )
    effective_rules: set[int] = set()  # indices of rules that take part in a decision
    decisions: dict[str, Decision] = {}
    tree = dict(leaves)
    for path, leaf in leaves:
        selecting = {i: rule for i, rule in enumerate(rules) if selects(rule, path, tree, facts)}
        if not selecting:
            continue
        first_index = min(selecting)
        first_rule = selecting[first_index]
        decision: Decision | None
        if isinstance(first_rule, TrainRule):
            decision = _decide_training(first_rule, path, leaf)
            decision_rules = {first_index}
        else:
            # The layers of a stack may have different LoRA rules.
            lora_rules = {i: rule for i, rule in selecting.items() if isinstance(rule, LoraRule)}
            decision, decision_rules = _decide_adaptation(lora_rules, path, leaf, facts)
        if decision is not None:
            decisions[path] = decision
            effective_rules |= decision_rules
    decisions |= _decide_biases(tree, decisions)
    # A rule without effect is an error.
    for index, rule in enumerate(rules):
        if index not in effective_rules:
            reason = no_match_reason(rule, tree, decisions if index else {}, facts)
            raise ValueError(f"{rule} selects no leaf. {reason}")
    return decisions


def _peft_hint(rules: object) -> str:
    """Returns a remedy if the value is a PEFT configuration instead of a rule; "" otherwise."""
    if not hasattr(rules, "peft_type"):
        return ""
    return " Convert a configuration of PEFT to rules with lora_jax.peft.rules(config)."


def _decide_training(rule: TrainRule, path: str, leaf: Leaf) -> FullTraining | None:
    """Returns the decision for a leaf that trains; None if its layers are not selected."""
    is_table = rule.rows is not None
    indices = rule.rows if is_table else rule.layers
    if indices is None:
        return FullTraining()
    if is_table and len(leaf.shape) != 2:
        raise ValueError(
            f"{rule}: rows= selects rows of a table [n, d], but {path!r} has the shape "
            f"{tuple(leaf.shape)}. Name only tables in targets, or remove rows."
        )
    # The path has the number of the leaf's layer, so the whole leaf trains or none of it.
    layer = None if is_table else numbered_layer(path, stacked=False)
    if layer is not None:
        return FullTraining() if layer in indices else None
    # Some rows of a table train, or some layers of a stack.
    size = leaf.shape[0] if leaf.shape else 0
    _check_indices(rule, "row" if is_table else "layer", indices, path, size)
    return FullTraining(tuple(indices), is_table)


def _check_indices(
    rule: Rule, axis_name: str, indices: Sequence[int], path: str, size: int
) -> None:
    """Raises a ValueError for an index beyond the first axis of a leaf.

    Args:
      rule: the rule with the indices.
      axis_name: "row" or "layer", for the message.
      indices: the indices of rows or layers.
      path: path of the leaf.
      size: the size of the leaf's first axis.
    """
    for index in indices:
        if index >= size:
            raise ValueError(
                f"{rule} names {axis_name} {index} of {path!r}, which has only {size} "
                f"{axis_name}s. Use indices below {size}, which count from 0."
            )


def _decide_biases(paths: Container[str], decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Returns the decision for each bias whose kernel's rule trains it."""
    bias_decisions: dict[str, Decision] = {}
    for path, decision in decisions.items():
        if not isinstance(decision, Adaptation) or not decision.rule.train_bias:
            continue
        bias = bias_path(path, paths)
        if bias is None or bias in decisions:
            continue
        layers = tuple(layer for layer, rank in enumerate(decision.ranks) if rank)
        has_all_layers = len(layers) == len(decision.ranks)
        bias_decisions[bias] = FullTraining(None if has_all_layers else layers)
    return bias_decisions


def bias_path(path: str, paths: Container[str]) -> str | None:
    """Returns the path of the bias beside a kernel; None if there is no bias."""
    module = path.removesuffix(leaf_name(path))
    return next((module + name for name in BIAS_NAMES if module + name in paths), None)


def _decide_adaptation(
    rules: Mapping[int, LoraRule], path: str, leaf: Leaf, facts: LeafFacts
) -> tuple[Adaptation | None, set[int]]:
    """Returns the decision for a kernel, and the indices of the rules that it uses.

    Args:
      rules: rules that select the kernel, by their index.
      path, leaf: the kernel.
      facts: see `resolve`.
    """
    roles = _roles_of_kernel(next(iter(rules.values())), path, len(leaf.shape), facts)
    batch = roles.sizes(leaf.shape, "batch")
    layer_of_path = numbered_layer(path, stacked=bool(batch))
    is_stack = layer_of_path is None and bool(batch)
    layers = range(batch[0]) if is_stack else [layer_of_path or 0]
    rule_of_layer = [_first_rule_of_layer(rules, layer) for layer in layers]
    indices = {index for index in rule_of_layer if index is not None}
    # No rule adapts a layer of this kernel.
    if not indices:
        return None, indices
    if is_stack:
        for rule in rules.values():
            _check_indices(rule, "layer", rule.layers or (), path, batch[0])
    # All rules of a stack must be equal in the fields that layers share.
    shared_settings = {
        dataclasses.replace(rules[index], **_FIELDS_OF_LAYERS, dtype=jnp.dtype(rules[index].dtype))
        for index in indices
    }
    if len(shared_settings) > 1:
        raise ValueError(
            f"The rules for the layers of the stack {path!r} may only differ in rank and "
            "alpha. Give these rules the same values in all other fields."
        )
    # A single rule stands for all layers.
    if len(set(rule_of_layer)) == 1:
        rule_of_layer = rule_of_layer[:1]
    elif any(rules[index].uses == "each" for index in indices):
        raise ValueError(
            "uses='each' needs the same rule for all layers of a stack, but the layers of "
            f"{path!r} have different rules. Select all layers with one rule, or change uses."
        )
    layer_rules = tuple(None if index is None else rules[index] for index in rule_of_layer)
    return Adaptation(roles, layer_rules), indices


def _first_rule_of_layer(rules: Mapping[int, LoraRule], layer: int) -> int | None:
    """Returns the index of the first rule for a layer; None if no rule adapts the layer."""
    for index, rule in rules.items():
        if rule.layers is None or layer in rule.layers:
            return index
    return None


# Fields that may differ between the layers of one stack. With these values, rules that differ in no
# other field are equal.
_FIELDS_OF_LAYERS: JsonObject = dict(targets=".*", exclude=(), layers=None, rank=2, alpha=None)


def _roles_of_kernel(rule: LoraRule, path: str, ndim: int, facts: LeafFacts) -> AxisRoles:
    """Returns the axis roles of a kernel: by its rule, by a traced function, or by its name.

    Raises:
      ValueError: the rule's axes do not fit the kernel, or the roles are unknown.
    """
    if rule.in_axes is not None and rule.out_axes is not None:
        try:
            return AxisRoles.from_axes(rule.in_axes, rule.out_axes, ndim)
        except ValueError as error:
            raise ValueError(f"{rule}: {path!r}: {error}") from None
    roles_by_name = default_roles(leaf_name(path), ndim)
    if facts.roles is not None:
        observed = facts.roles.get(path, NOT_AN_ARGUMENT)
        if isinstance(observed, ObservedRoles):
            return observed.roles
        # The function does not show the roles: `observed` is the reason.
        if roles_by_name is None or observed == NOT_AN_ARGUMENT:
            raise ValueError(
                f"{rule} selects {path!r}, but the traced function does not show the roles "
                f"of its axes, because {observed}. {_ROLE_REMEDY}"
            )
        warn(
            f"The traced function does not show the roles of the axes of {path!r}, because "
            f"{observed}. lorafy uses the roles that the name suggests, {roles_by_name}. "
            f"{_ROLE_REMEDY}",
            RoleWarning,
            user_line_of_call(),
        )
    if roles_by_name is None:
        raise ValueError(
            f"{rule} selects {path!r}, but the roles of its {ndim} axes are unknown, because "
            "only the names kernel, w and embedding have a convention. Name the axes that are "
            "contracted with the input and those that come out in LoraRule(in_axes=…, "
            "out_axes=…). Or let lorafy trace your function with lorafy(params, rules, "
            "trace=(fn, params, x))."
        )
    return roles_by_name
