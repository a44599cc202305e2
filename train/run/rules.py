"""Turns the options of an adapter into rules for the tree."""

import dataclasses
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import init
from lora_jax.peft.config import read_config
from lora_jax.rules import PRESETS
from train.console.errors import UserError, as_user_errors
from train.options.common import AdapterConfig
from train.options.conditions import NO_ADAPTER
from train.run.intrinsic import moves_weights
from train.run.invocation import invocation_ids
from train.run.pretrained import ModelInfo

Rule = lj.LoraRule | lj.TrainRule

_INITIALISERS = {
    "kaiming": init.kaiming,
    "gaussian": init.gaussian,
    "orthogonal": init.orthogonal,
    "pissa": init.pissa,
    "fast-pissa": init.fast_pissa(),
    "olora": init.olora,
}


def rules(adapter: AdapterConfig, outline: ModelInfo | None = None) -> list[Rule]:
    """Returns the rules that the options describe.

    Args:
      adapter: the options.
      outline: the model to adapt. Without it, the options are checked as far as possible, and the
        result lacks rules that depend on the model.

    Raises:
      UserError: the options contradict each other, or do not fit the model.
    """
    if moves_weights(adapter):
        return [lj.TrainRule(targets=".*")]
    if adapter.peft_config is not None:
        return _peft_rules(adapter, adapter.peft_config, outline)
    with as_user_errors(ValueError, prefix="The options of the adapter are not valid: "):
        rules_of_options = _full_rules(adapter, outline) + _lora_rules(adapter, outline)
    if not rules_of_options:
        raise UserError(
            "--targets none leaves no parameter to train. Select parameters with --train or --bias."
        )
    # Most models have one stack of layers.
    if outline is None or len(getattr(outline.config, "stacks", ())) < 2:
        return rules_of_options
    stack_rules: list[Rule] = []
    for rule in rules_of_options:
        stack_rules += _split_by_stack(rule, outline)
    return stack_rules


def _peft_rules(adapter: AdapterConfig, path: str, outline: ModelInfo | None) -> list[Rule]:
    """Returns the rule of --train, and then the rules of a PEFT configuration."""
    fields = peft_fields(path)
    if outline is None:
        return []
    train_rules: list[Rule] = []
    if adapter.train:
        train_rules.append(lj.TrainRule(targets=adapter.train))
    with _peft_errors(path):
        return [*train_rules, *lp.rules(fields, outline)]


def _full_rules(adapter: AdapterConfig, outline: ModelInfo | None) -> list[Rule]:
    """Returns the rules of parameters and of rows that train in full."""
    train_rules: list[Rule] = []
    if adapter.train:
        train_rules.append(lj.TrainRule(targets=adapter.train))
    if adapter.train_tokens:
        tables = [".*"] if outline is None else outline.paths("embedding")
        for table in tables:
            rule = lj.TrainRule(targets=re.escape(table), rows=adapter.train_tokens)
            train_rules.append(rule)
    if adapter.bias == "all":
        train_rules.append(lj.TrainRule(targets=["bias"]))
    return train_rules


def _lora_rules(adapter: AdapterConfig, outline: ModelInfo | None) -> list[Rule]:
    """Returns the rules of LoRA. With --divide-rank, the rule of the experts comes first."""
    lora_rules: list[Rule] = []
    if adapter.divide_rank and outline is not None:
        if outline.active_experts is None:
            raise UserError(
                "--divide-rank only applies to a mixture of experts, but the model is none. Remove "
                "--divide-rank."
            )
        rank = lj.optim.expert_rank(adapter.rank, active=outline.active_experts)
        lora_rules.append(_lora_rule(adapter, ("experts",), rank, outline))
    if adapter.targets != NO_ADAPTER:
        targets: str | tuple[str, ...] = adapter.targets
        if len(targets) == 1 and (targets[0] == "all-linear" or not _is_name(targets[0])):
            targets = targets[0]  # a preset, or a pattern
        lora_rules.append(_lora_rule(adapter, targets, adapter.rank, outline))
    return lora_rules


def _split_by_stack(rule: Rule, outline: ModelInfo) -> list[Rule]:
    """Splits a rule about some of the model's layers into one rule for each stack of layers.

    Args:
      rule: the rule. A rule about all layers stays as it is.
      outline: a model with several stacks of layers; see ``DecoderConfig.stacks``.

    Raises:
      UserError: the model has fewer layers.
    """
    if rule.layers is None:
        return [rule]
    config: Any = outline.config
    n_layers = config.num_hidden_layers
    for layer in rule.layers:
        if layer >= n_layers:
            raise UserError(
                f"--layers {layer} does not exist: the model has {n_layers} layers, counted from "
                f"0. Pass numbers from 0 to {n_layers - 1}."
            )
    # A layer's index in its stack differs from its index in the model.
    stack_rules = []
    for stack, stack_layers in config.stacks.items():
        indices = [stack_layers.index(layer) for layer in rule.layers if layer in stack_layers]
        if indices:
            other_stacks = f"(?!model/layers/{stack}/).*"
            stack_rules.append(dataclasses.replace(rule, layers=indices, exclude=other_stacks))
    # Linear layers have no q_proj, and other layers no in_proj_qkv.
    matching_rules = [stack_rule for stack_rule in stack_rules if _selects(stack_rule, outline)]
    if not matching_rules:
        return stack_rules  # `lorafy` reports that they select nothing
    return matching_rules


def _selects(rule: Rule, outline: ModelInfo) -> bool:
    """Returns True if a rule selects parameters of a model."""
    try:
        return bool(lj.lorafy(outline.params, [rule], kinds=outline.kinds))
    except ValueError:
        return False


def check_names(adapter: AdapterConfig, outline: ModelInfo) -> None:
    """Raises a UserError for a name of --targets or --train that selects nothing in the model."""
    if moves_weights(adapter) or adapter.peft_config or adapter.init_adapter:
        return
    if len(adapter.targets) > 1:
        _check_names("--targets", adapter.targets, lj.LoraRule, outline)
    _check_names("--train", adapter.train, lj.TrainRule, outline)


def _check_names(
    option: str, names: tuple[str, ...], rule_class: Callable[..., Rule], outline: ModelInfo
) -> None:
    """Raises a UserError for a name of an option that selects nothing.

    Args:
      option: the option.
      names: the names.
      rule_class: the class of the rule that the option makes.
      outline: the model.
    """
    option_and_names = f"{option} {' '.join(names)}"
    for name in names:
        is_name = _is_name(name) or name in PRESETS
        if name in (*NO_ADAPTER, "") or not is_name:
            raise UserError(
                f"{option_and_names}: several targets must be names of modules, but {name!r} is "
                "not a name. Pass only names, or only one regular expression, such as "
                "'.*(q|v)_proj/kernel'."
            )
        with as_user_errors(ValueError, prefix=f"{option_and_names}: "):
            lj.lorafy(outline.params, [rule_class(targets=[name])], kinds=outline.kinds)


def peft_fields(path: str) -> dict[str, Any]:
    """Returns the checked fields of --peft-config.

    Raises:
      UserError: the file is missing, or its configuration cannot be used.
    """
    with _peft_errors(path):
        return read_config(path)


def _peft_errors(path: str) -> AbstractContextManager[None]:
    """Returns a context that turns errors of reading --peft-config into UserErrors."""
    return as_user_errors(ValueError, OSError, prefix=f"--peft-config {path}: ")


def _lora_rule(
    adapter: AdapterConfig, targets: str | tuple[str, ...], rank: int, outline: ModelInfo | None
) -> lj.LoraRule:
    """Returns a LoRA rule of a rank, with the scale s that --alpha and --rank define."""
    alpha = adapter.alpha
    # A divided rank keeps the ratio of alpha to the rank.
    if alpha is not None and rank != adapter.rank:
        alpha *= rank / adapter.rank
    alora: str | None = getattr(adapter, "alora", None)
    invocation = None
    if alora is not None and outline is not None:
        invocation = invocation_ids(alora, outline)
    variants: dict[str, Any] = {}
    for variant in adapter.variants:
        variants[variant.option] = True
        variants |= adapter.settings_of(variant)
    return lj.LoraRule(
        targets=targets,
        layers=adapter.layers or None,
        rank=rank,
        alpha=alpha,
        scaling=adapter.scaling,
        dropout=adapter.dropout,
        init=_INITIALISERS[adapter.init],
        train_bias=adapter.bias == "adapted",
        invocation=invocation,
        **variants,
    )


def _is_name(target: str) -> bool:
    """Returns True if a target is the name or path of a module, and not a regular expression."""
    return target.replace("/", "").replace("_", "").isalnum()
