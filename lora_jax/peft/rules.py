"""Translates a PEFT configuration into rules for a parameter tree."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
from jax.typing import DTypeLike

from lora_jax import init
from lora_jax.core.types import Fields, Model, Tree
from lora_jax.hf.keys import Row
from lora_jax.peft.config import DECOMPOSING_INITS, INVOCATION, KIND, OWN, SWITCHES, read_config
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import targeted_experts
from lora_jax.peft.forms import FORMS
from lora_jax.peft.modules import (
    Module,
    ends_with,
    is_tied,
    modules,
    pattern_value,
    places,
    rank_and_alpha,
    tables_of,
    targeted,
)
from lora_jax.rules import AnyOf, LoraRule, Rule, TrainRule


def _drawn_both(key: jax.Array, shape: init.FactorShape, dtype: DTypeLike) -> init.Factors:
    """Draws A ~ U(±1/√d_in), B ~ U(±1/√r): PEFT's ``init_lora_weights=False``."""
    key_a, key_b = jax.random.split(key)
    bound = 1 / math.sqrt(shape.rank)
    a, _ = init.kaiming(key_a, shape, dtype)
    return a, jax.random.uniform(key_b, shape.b, dtype, -bound, bound)


# The initialiser of each value of init_lora_weights.
_INITIALISERS: dict[object, init.Initialiser] = {
    True: init.kaiming,
    None: init.kaiming,
    False: _drawn_both,
    "gaussian": init.gaussian,
    "orthogonal": init.orthogonal,
    "pissa": init.pissa,
    "olora": init.olora,
}
# What PEFT does for the others, which a rule cannot. A trained adapter needs none of it.
_BEYOND_RULES = {
    "eva": "computes A from activations of your data",
    "lora_ga": "computes A and B from gradients on your data",
    "mica": "freezes B at singular vectors of the base, and trains A alone",
}


def rules(config: Tree, model: Any = None) -> list[Rule]:
    """Translates a PEFT configuration into rules.

    Args:
      config: a dict, a file or folder, or a `peft.LoraConfig`.
      model: the model, or a key table; see `lora_jax.peft.load`. With it, the rules select exactly
        the modules that PEFT would, whatever the configuration. Without it, only a configuration
        that goes by names (a list of targets, or "all-linear") can be translated.

    Returns:
      Rules for `lora_jax.lorafy`.

    Raises:
      PeftError: for a field or an initialiser that is not supported, and if nothing matches.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> from lora_jax import peft
    >>> config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    >>> peft.rules(config, model)
    [LoraRule(targets=..., rank=4, alpha=8...)]
    """
    fields = read_config(config)
    _check_initialiser(fields)
    if model is None:
        return _translated(fields)
    first, *others = tables_of(model)
    try:
        return rules_for(fields, first, *selected(fields, first, model))
    except PeftError:
        for table in others:  # by other names of the same modules
            with contextlib.suppress(PeftError):
                return rules_for(fields, table, *selected(fields, table, model))
        raise


def _check_initialiser(config: Fields) -> None:
    """Raises a PeftError where PEFT initialises otherwise than any rule."""
    name = config["init_lora_weights"]
    if (reason := _BEYOND_RULES.get(name)) is not None:
        known = ", ".join(map(repr, _INITIALISERS))
        raise PeftError(
            f"init_lora_weights={name!r}: PEFT {reason}, and rules do not: choose one of {known}; "
            "or initialise in PEFT, save the adapter there, and go on from it by lora_jax.peft.load"
        )


def _translated(config: Fields) -> list[Rule]:
    targets = config["target_modules"]
    # Only the model's own names can settle these.
    settled_by_model = {
        "target_modules": targets is None or (isinstance(targets, str) and targets != "all-linear"),
        "exclude_modules": isinstance(config["exclude_modules"], str),
        "rank_pattern": bool(config["rank_pattern"]),
        "alpha_pattern": bool(config["alpha_pattern"]),
        "layers_pattern": bool(config["layers_pattern"]),
        "trainable_token_indices": config["trainable_token_indices"] is not None,
        "target_parameters": bool(config["target_parameters"]),
    }
    if unclear := [name for name, is_unclear in settled_by_model.items() if is_unclear]:
        raise PeftError(
            f"{', '.join(unclear)}: what these select depends on the model; give it as well: "
            "rules(config, model)"
        )

    def paths(field: str) -> AnyOf:
        return AnyOf(name.replace(".", "/") for name in config[field] or ())

    targets = targets if isinstance(targets, str) else paths("target_modules")
    layers = config["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers or None
    saved, exclude = paths("modules_to_save"), paths("exclude_modules")
    rules_made: list[Rule] = [TrainRule(targets=saved)] if saved else []
    if config["bias"] == "all":
        rules_made.append(TrainRule(targets=["bias"]))
    rank, alpha = config["r"], config["lora_alpha"]
    return [*rules_made, _lora_rule(config, targets, rank, alpha, layers, exclude=exclude)]


def selected(
    config: Fields, table: Sequence[Row], model: Model, *, experts: bool = False
) -> tuple[list[Module], list[Module]]:
    """Returns the modules that PEFT could adapt, and those of them that it does adapt.

    Args:
      config: the fields of a PEFT configuration.
      table: the model's key table.
      model: the model; it tells the family and the experts.
      experts: see `modules`.
    """
    available = modules(table, experts=experts, tied=is_tied(config))
    family = getattr(getattr(model, "config", None), "model_type", None)
    return available, targeted(config, available, family) + targeted_experts(config, model)


def rules_for(
    config: Fields, table: Sequence[Row], available: Sequence[Module], chosen: Sequence[Module]
) -> list[Rule]:
    """Makes rules that select PEFT's choice, path by path and layer by layer.

    Args:
      config: the fields of a PEFT configuration.
      table: the model's key table.
      available, chosen: see `selected`.
    """
    _check_two_uses(config, chosen)
    if is_tied(config):
        _check_tied_alphas(config, table, chosen)
    chosen_rules: list[Rule] = [*_saved(config, table), *_tokens(config, available)]
    if config["bias"] == "all":
        paths = sorted({row.path for row in table if row.hf.endswith(".bias")})
        if paths:
            chosen_rules.append(TrainRule(targets=_either(paths)))
    settings: dict[tuple[int, float, str, tuple[int, ...] | None, bool], list[str]] = {}
    for path, members in _group_by_path(chosen).items():
        layers: dict[tuple[int, float], list[int]] = {}
        for module in members:
            at = layers.setdefault(rank_and_alpha(config, module.name), [])
            at.extend(module.index[:1])
        row = next(row for row in table if row.path == path)
        uses = members[0].uses if len({m.uses for m in members}) == 1 else "each"
        halves = getattr(members[0], "half", None) is not None  # of gate_up_proj, with one A
        for (rank, alpha), at in layers.items():
            key = (rank, alpha, uses, _some_layers(at, row), halves)
            settings.setdefault(key, []).append(path)
    for (rank, alpha, uses, layer, halves), paths in settings.items():
        rule = _lora_rule(config, _either(paths), rank, alpha, layer, uses=uses)
        chosen_rules.append(dataclasses.replace(rule, share_a=halves and _may_share_a(rule)))
    return chosen_rules


def _lora_rule(
    config: Fields,
    targets: Any,
    rank: int,
    alpha: float,
    layers: Sequence[int] | None,
    uses: str = "all",
    exclude: tuple[str, ...] = (),
) -> LoraRule:
    variants = {option: config[field] for field, option in SWITCHES.items()}
    if (form := FORMS.get(config[KIND])) is not None:
        variants |= {form.VARIANT.option: True} | form.settings(config[OWN])
    return LoraRule(
        targets=targets,
        exclude=exclude,
        layers=layers,
        rank=rank,
        alpha=alpha,
        scaling="alpha/sqrt(rank)" if config["use_rslora"] else "alpha/rank",
        dropout=config["lora_dropout"],
        init=_INITIALISERS.get(config["init_lora_weights"], init.kaiming),
        train_bias=config["bias"] == "lora_only",
        invocation=config[INVOCATION],
        uses=cast(Literal["all", "lookup", "product", "each"], uses),
        **variants,
    )


def _may_share_a(rule: LoraRule) -> bool:
    """Returns False where A is taken out of each kernel: PEFT has that for the two as one."""
    return not init.takes_from_base(rule.init)


def _some_layers(layers: Sequence[int], row: Row) -> tuple[int, ...] | None:
    """Returns layers of a row as a rule has them: None for all of its stack, or without one."""
    some = tuple(sorted(set(layers)))
    return some if some and len(some) < row.stack[0] else None


def _either(paths: Sequence[str]) -> str:
    return "|".join(re.escape(path) for path in paths)


def _group_by_path(chosen: Sequence[Module]) -> dict[str, list[Module]]:
    paths: dict[str, list[Module]] = {}
    for module in chosen:
        paths.setdefault(module.path, []).append(module)
    return paths


def _check_two_uses(config: Fields, chosen: Sequence[Module]) -> None:
    """Raises a PeftError where the two uses of a table are adapted in different ways."""
    for path, members in _group_by_path(chosen).items():
        if len({module.uses for module in members}) == 1:
            continue
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            values = [pattern_value(config[field], m.name, config[default]) for m in members]
            if len(set(values)) > 1:
                names = " and ".join(module.name for module in members)
                raise PeftError(
                    f"{names} are tied to one table, {path}, and {field} gives them {values}: give "
                    "both the same, or target one of them"
                )


def _check_tied_alphas(config: Fields, table: Sequence[Row], chosen: Sequence[Module]) -> None:
    """Raises a PeftError where a head that shares its table's A and B has another alpha."""
    adapted = {module.path: module.name for module in chosen}
    for row in table:
        heads = [alias.removesuffix(".weight") for alias in row.aliases]
        for head in heads if row.path in adapted else []:
            names = (adapted[row.path], head)
            alphas = [
                pattern_value(config["alpha_pattern"], n, config["lora_alpha"]) for n in names
            ]
            if alphas[0] != alphas[1]:
                raise PeftError(
                    f"alpha_pattern gives {names[0]} {alphas[0]} and {head} {alphas[1]}, and the "
                    "two share an adapter: give both the same"
                )


def saved_modules(config: Fields, names: Sequence[str]) -> list[str]:
    """Lists the tensors among `names` that belong to modules_to_save.

    As in PEFT, an entry matches the end of a module's name, even within a word: "norm" matches
    every layer's input_layernorm, too.
    """
    wanted = [f"{entry}." for entry in config["modules_to_save"] or ()]
    return [name for name in names if any(entry in name for entry in wanted)]


def _saved(config: Fields, table: Sequence[Row]) -> list[TrainRule]:
    """Makes rules for modules that are saved whole: they train in full, layer by layer."""
    if not config["modules_to_save"]:
        return []
    where = places(table)
    tensors = saved_modules(config, list(where))
    tied = saved_modules(config, [alias for row in table for alias in row.aliases])
    tied += [name for name in tensors if where[name][0].aliases]
    if tied and not is_tied(config):
        raise PeftError(
            f"modules_to_save holds {tied[0].removesuffix('.weight')}, which is tied: PEFT saves a "
            "copy that only one of its two uses sees, which is not supported; train it in PEFT "
            "with ensure_weight_tying=True"
        )
    if not tensors:
        raise PeftError(
            f"modules_to_save={config['modules_to_save']!r} matches none of the model's modules"
        )
    layers: dict[Row, list[int]] = {}
    for row, index in map(where.__getitem__, tensors):
        layers.setdefault(row, []).extend(index[:1])
    grouped: dict[tuple[int, ...] | None, list[str]] = {}
    for row, at in layers.items():
        grouped.setdefault(_some_layers(at, row), []).append(row.path)
    return [TrainRule(targets=_either(paths), layers=at) for at, paths in grouped.items()]


def token_rows(config: Fields, available: Sequence[Module]) -> dict[str, list[int]]:
    """Returns trainable_token_indices by the name of the embedding."""
    tokens = config["trainable_token_indices"]
    if tokens is None:
        return {}
    embeddings = [module.name for module in available if module.is_embedding]
    if isinstance(tokens, list):
        if not embeddings:
            raise PeftError("trainable_token_indices: the model has no embedding")
        return {embeddings[0]: tokens}
    rows_by_path = {}
    for key, rows in tokens.items():
        named = [name for name in embeddings if name == key or name.endswith(f".{key}")]
        if not named and _repeats_table(key, tokens, available):
            continue
        if not named:
            raise PeftError(
                f"trainable_token_indices names {key!r}; the model's embeddings are "
                f"{', '.join(embeddings)}"
            )
        rows_by_path[named[0]] = rows
    return rows_by_path


def _repeats_table(key: str, tokens: Mapping[str, list[int]], available: Sequence[Module]) -> bool:
    """Returns True for a tied head with the same tokens as its table, which PEFT saves once."""

    def is_named(module: Module, key: str) -> bool:
        return module.name == key or ends_with(module.name, [key])

    paths = [m.path for m in available if m.uses == "product" and is_named(m, key)]
    tables = [m for m in available if m.path in paths and m.is_embedding]
    of_table = [rows for name, rows in tokens.items() for m in tables if is_named(m, name)]
    if of_table and sorted(of_table[0]) != sorted(tokens[key]):
        raise PeftError(
            f"trainable_token_indices has other tokens for {key!r} than for {tables[0].name}, and "
            "the two are tied: train the same tokens of both"
        )
    return bool(of_table)


def _tokens(config: Fields, available: Sequence[Module]) -> list[TrainRule]:
    paths = {module.name: module.path for module in available if module.is_embedding}
    return [
        TrainRule(targets=re.escape(paths[name]), rows=rows)
        for name, rows in token_rows(config, available).items()
    ]


def takes_from_base(config: Fields) -> bool:
    """Returns True if PEFT subtracts the initial factors from the base, again at each load."""
    return config["init_lora_weights"] in DECOMPOSING_INITS
