"""Adapter options as rules for the tree."""

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
      outline: the model to adapt. Without it, the options are checked as far as possible, and
        rules that depend on the model are left out.

    Raises:
      UserError: the options make no sense, or do not fit the model.
    """
    if moves_weights(adapter):
        return [lj.TrainRule(targets=".*")]
    if adapter.peft_config is not None:
        others: list[Rule] = [lj.TrainRule(targets=adapter.train)] if adapter.train else []
        fields = peft_fields(adapter.peft_config)
        with _peft_errors(adapter.peft_config):
            return [] if outline is None else [*others, *lp.rules(fields, outline)]
    with as_user_errors(ValueError, prefix="options on the adapter: "):
        chosen: list[Rule] = []
        if adapter.train:
            chosen.append(lj.TrainRule(targets=adapter.train))
        if adapter.train_tokens:
            tables = [".*"] if outline is None else outline.paths("embedding")
            rows = adapter.train_tokens
            chosen += [lj.TrainRule(targets=re.escape(table), rows=rows) for table in tables]
        if adapter.bias == "all":
            chosen.append(lj.TrainRule(targets=["bias"]))
        if adapter.divide_rank and outline is not None:
            if outline.active_experts is None:
                raise UserError("--divide-rank: the model is not a mixture of experts")
            rank = lj.optim.expert_rank(adapter.rank, active=outline.active_experts)
            chosen.append(_lora_rule(adapter, ("experts",), rank, outline))
        targets: str | tuple[str, ...] = adapter.targets
        if len(targets) == 1 and (targets[0] == "all-linear" or not _is_name(targets[0])):
            targets = targets[0]
        if targets != NO_ADAPTER:
            chosen.append(_lora_rule(adapter, targets, adapter.rank, outline))
    if not chosen:
        raise UserError(
            "--targets none: nothing would train; select parameters with --train or --bias"
        )
    if outline is None or len(getattr(outline.config, "stacks", ())) < 2:
        return chosen
    return [part for rule in chosen for part in _rules_of_places(rule, outline)]


def _rules_of_places(rule: Rule, outline: ModelInfo) -> list[Rule]:
    """Returns a rule on some of the model's layers as one for each stack of layers.

    Args:
      rule: the rule; one on all layers stays as it is.
      outline: a model with several stacks of layers; see ``DecoderConfig.stacks``.

    Raises:
      UserError: the model has fewer layers.
    """
    if rule.layers is None:
        return [rule]
    config: Any = outline.config
    depth, parts = config.num_hidden_layers, []
    if beyond := [layer for layer in rule.layers if layer >= depth]:
        raise UserError(f"--layers {beyond[0]}: the model has {depth} layers, counted from 0")
    for place, numbers in config.stacks.items():
        if own := [numbers.index(layer) for layer in rule.layers if layer in numbers]:
            elsewhere = f"(?!model/layers/{place}/).*"
            parts.append(dataclasses.replace(rule, layers=own, exclude=elsewhere))

    def selects(rule: Rule) -> bool:
        try:
            return bool(lj.lorafy(outline.params, [rule], kinds=outline.kinds))
        except ValueError:  # linear layers have no q_proj, and others no in_proj_qkv
            return False

    return list(filter(selects, parts)) or parts


def check_names(adapter: AdapterConfig, outline: ModelInfo) -> None:
    """Raises a UserError for a name of --targets or --train that selects nothing in the model."""
    if moves_weights(adapter) or adapter.peft_config or adapter.init_adapter:
        return
    asked: list[tuple[str, tuple[str, ...], Callable[..., Rule]]] = [
        ("--targets", adapter.targets if len(adapter.targets) > 1 else (), lj.LoraRule),
        ("--train", adapter.train, lj.TrainRule),
    ]
    for option, names, rule in asked:
        for name in names:
            if name in (*NO_ADAPTER, "") or not (_is_name(name) or name in PRESETS):
                raise UserError(
                    f"{option} {' '.join(names)}: several targets are names of modules, and "
                    f"{name!r} is none. Give names alone, or one regular expression alone, such as "
                    "'.*(q|v)_proj/kernel'"
                )
            with as_user_errors(ValueError, prefix=f"{option} {' '.join(names)}: "):
                lj.lorafy(outline.params, [rule(targets=[name])], kinds=outline.kinds)


def peft_fields(path: str) -> dict[str, Any]:
    """Returns the checked fields of --peft-config.

    Raises:
      UserError: the file is missing, or is no configuration that can be used.
    """
    with _peft_errors(path):
        return read_config(path)


def _peft_errors(path: str) -> AbstractContextManager[None]:
    return as_user_errors(ValueError, OSError, prefix=f"--peft-config {path}: ")


def _lora_rule(
    adapter: AdapterConfig, targets: str | tuple[str, ...], rank: int, outline: ModelInfo | None
) -> lj.LoraRule:
    """Returns a rule of the given rank, with the scale s of the options' alpha and rank."""
    alora: str | None = getattr(adapter, "alora", None)
    known = alora is not None and outline is not None
    alpha = adapter.alpha
    if alpha is not None and rank != adapter.rank:
        alpha *= rank / adapter.rank
    variants: dict[str, Any] = {}
    for variant in adapter.variants:
        variants |= {variant.option: True} | adapter.settings_of(variant)
    return lj.LoraRule(
        targets=targets,
        layers=adapter.layers or None,
        rank=rank,
        alpha=alpha,
        scaling=adapter.scaling,
        dropout=adapter.dropout,
        init=_INITIALISERS[adapter.init],
        train_bias=adapter.bias == "adapted",
        invocation=invocation_ids(alora, outline) if known else None,  # type: ignore[arg-type]
        **variants,
    )


def _is_name(target: str) -> bool:
    """Returns True if a target is a module name or path, rather than a regular expression."""
    return target.replace("/", "").replace("_", "").isalnum()
