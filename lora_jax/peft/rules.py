"""Translates a PEFT configuration into rules for a parameter tree."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
from jax.typing import DTypeLike

from lora_jax import init
from lora_jax.core.types import Fields, Model, Tree
from lora_jax.hf.keys import Row
from lora_jax.peft.config import (
    DECOMPOSING_INITS,
    INVOCATION_FIELD,
    KIND_FIELDS_KEY,
    KIND_KEY,
    OPTION_OF_FIELD,
    read_config,
)
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import select_experts, select_parameters
from lora_jax.peft.forms import FORMS
from lora_jax.peft.modules import (
    Module,
    ends_with,
    list_modules,
    locate_tensors,
    pattern_value,
    rank_and_alpha,
    select_modules,
    tables_by_names,
    ties_tables,
)
from lora_jax.peft.patterns import limit_matches
from lora_jax.rules import AnyOf, LoraRule, Rule, TrainRule


def _draw_a_and_b(key: jax.Array, shape: init.FactorShape, dtype: DTypeLike) -> init.Factors:
    """Draws A ~ U(±1/√d_in), B ~ U(±1/√r): PEFT's ``init_lora_weights=False``."""
    key_a, key_b = jax.random.split(key)
    bound = 1 / math.sqrt(shape.rank)
    a, _ = init.kaiming(key_a, shape, dtype)
    return a, jax.random.uniform(key_b, shape.b, dtype, -bound, bound)


# The initialiser of each value of init_lora_weights.
_INITIALISERS: dict[object, init.Initialiser] = {
    True: init.kaiming,
    None: init.kaiming,
    False: _draw_a_and_b,
    "gaussian": init.gaussian,
    "orthogonal": init.orthogonal,
    "pissa": init.pissa,
    "olora": init.olora,
}
# What PEFT does for other values, which a rule cannot do. A trained adapter does not need it.
_INITIALISERS_WITHOUT_RULE = {
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
        return _make_rules_by_names(fields)
    with limit_matches():
        return _make_rules_by_tables(fields, model)


def _make_rules_by_tables(fields: Fields, model: Model) -> list[Rule]:
    """Makes rules for the first naming scheme of a model's modules that fits."""

    def rules_by_table(table: Sequence[Row]) -> list[Rule]:
        all_modules, adapted_modules = select_modules_of_model(fields, table, model)
        return make_rules(fields, table, all_modules, adapted_modules)

    table, *other_tables = tables_by_names(model)
    try:
        return rules_by_table(table)
    except PeftError:
        for other_table in other_tables:  # by other names of the same modules
            with contextlib.suppress(PeftError):
                return rules_by_table(other_table)
        raise


def _check_initialiser(config: Fields) -> None:
    """Raises a PeftError for an initialiser of PEFT that rules do not support."""
    name = config["init_lora_weights"]
    reason = _INITIALISERS_WITHOUT_RULE.get(name)
    if reason is not None:
        known = ", ".join(map(repr, _INITIALISERS))
        raise PeftError(
            f"With init_lora_weights={name!r}, PEFT {reason}, which rules cannot do. Use one of "
            f"{known}. Or initialise the adapter in PEFT, save it there, and load it with "
            "lora_jax.peft.load."
        )


def _make_rules_by_names(config: Fields) -> list[Rule]:
    """Makes rules from a configuration's names alone, without a model."""
    targets = config["target_modules"]
    is_pattern = isinstance(targets, str) and targets != "all-linear"
    # These fields can only be translated with the names of the model's modules.
    is_unclear = {
        "target_modules": targets is None or is_pattern,
        "exclude_modules": isinstance(config["exclude_modules"], str),
        "rank_pattern": bool(config["rank_pattern"]),
        "alpha_pattern": bool(config["alpha_pattern"]),
        "layers_pattern": bool(config["layers_pattern"]),
        "trainable_token_indices": config["trainable_token_indices"] is not None,
        "target_parameters": bool(config["target_parameters"]),
    }
    unclear_fields = [field for field in is_unclear if is_unclear[field]]
    if unclear_fields:
        raise PeftError(
            f"The modules that {', '.join(unclear_fields)} select depend on the model. Pass the "
            "model, too: rules(config, model)."
        )

    def paths(field: str) -> AnyOf:
        return AnyOf(name.replace(".", "/") for name in config[field] or ())

    rules_by_names: list[Rule] = []
    saved_paths = paths("modules_to_save")
    if saved_paths:
        rules_by_names.append(TrainRule(targets=saved_paths))
    if config["bias"] == "all":
        rules_by_names.append(TrainRule(targets=["bias"]))
    layers = config["layers_to_transform"] or None
    if isinstance(config["layers_to_transform"], int):
        layers = [config["layers_to_transform"]]
    lora_rule = _make_lora_rule(
        config,
        targets=targets if isinstance(targets, str) else paths("target_modules"),
        rank=config["r"],
        alpha=config["lora_alpha"],
        layers=layers,
        exclude=paths("exclude_modules"),
    )
    return [*rules_by_names, lora_rule]


def select_modules_of_model(
    config: Fields, table: Sequence[Row], model: Model, *, experts: bool = False
) -> tuple[list[Module], list[Module]]:
    """Returns the modules that PEFT could adapt, and the modules that it adapts.

    Args:
      config: the fields of a PEFT configuration.
      table: the model's key table.
      model: the model, which has a family and perhaps experts.
      experts: see `list_modules`.
    """
    all_modules = list_modules(table, experts=experts, tied=ties_tables(config))
    model_config = getattr(model, "config", None)
    family = getattr(model_config, "model_type", None)
    adapted_modules = select_modules(config, all_modules, family)
    parameters = select_parameters(config, all_modules, table)
    _check_targeted_once(adapted_modules, parameters)
    parameter_names = [module.name_for_patterns for module in parameters]
    experts_of_model = select_experts(config, model, parameter_names)
    return all_modules, [*adapted_modules, *parameters, *experts_of_model]


def _check_targeted_once(modules: Sequence[Module], parameters: Sequence[Module]) -> None:
    """Raises a PeftError if a layer is targeted as a module and by its parameter."""
    common_names = {module.name for module in modules} & {module.name for module in parameters}
    if common_names:
        raise PeftError(
            f"target_modules and target_parameters both select {min(common_names)}, which PEFT "
            "refuses. Remove one of the two."
        )


class _LoraSettings(NamedTuple):
    """The settings of a LoraRule that all of its paths share."""

    rank: int
    alpha: float
    uses: str
    layers: tuple[int, ...] | None
    is_half: bool  # of gate_up_proj, whose two halves have one A


def make_rules(
    config: Fields,
    table: Sequence[Row],
    all_modules: Sequence[Module],
    adapted_modules: Sequence[Module],
) -> list[Rule]:
    """Makes rules that select exactly the modules that PEFT adapts.

    Args:
      config: the fields of a PEFT configuration.
      table: the model's key table.
      available, chosen: see `select_modules_of_model`.
    """
    _check_uses_agree(config, adapted_modules)
    if ties_tables(config):
        _check_tied_alphas(config, table, adapted_modules)
    all_rules: list[Rule] = [
        *_make_saved_module_rules(config, table),
        *_make_token_rules(config, all_modules),
    ]
    if config["bias"] == "all":
        bias_paths = sorted({row.path for row in table if row.hf.endswith(".bias")})
        if bias_paths:
            all_rules.append(TrainRule(targets=_pattern_for_paths(bias_paths)))
    # Paths with equal settings share a rule.
    rows = {row.path: row for row in table}
    paths_of_settings: dict[_LoraSettings, list[str]] = {}
    for path, members in _group_by_path(adapted_modules).items():
        for settings in _settings_of_layers(config, rows[path], members):
            paths_of_settings.setdefault(settings, []).append(path)
    for settings, paths in paths_of_settings.items():
        rule = _make_lora_rule(
            config,
            targets=_pattern_for_paths(paths),
            rank=settings.rank,
            alpha=settings.alpha,
            layers=settings.layers,
            uses=settings.uses,
        )
        shares_a = settings.is_half and _may_share_a(rule)
        all_rules.append(dataclasses.replace(rule, share_a=shares_a))
    return all_rules


def _settings_of_layers(config: Fields, row: Row, members: Sequence[Module]) -> list[_LoraSettings]:
    """Returns the settings of a leaf's modules, one for each (rank, alpha) pair."""
    layers_of_rank: dict[tuple[int, float], list[int]] = {}  # by rank and alpha
    for module in members:
        layers = layers_of_rank.setdefault(rank_and_alpha(config, module.name_for_patterns), [])
        layers += module.index[:1]
    has_one_use = len({module.uses for module in members}) == 1
    return [
        _LoraSettings(
            rank=rank,
            alpha=alpha,
            uses=members[0].uses if has_one_use else "each",
            layers=_layers_for_rule(layers, row),
            is_half=getattr(members[0], "half", None) is not None,
        )
        for (rank, alpha), layers in layers_of_rank.items()
    ]


def _make_lora_rule(
    config: Fields,
    targets: Any,
    rank: int,
    alpha: float,
    layers: Sequence[int] | None,
    uses: str = "all",
    exclude: tuple[str, ...] = (),
) -> LoraRule:
    """Makes a LoraRule from these settings and those that all modules share."""
    variant_settings = {option: config[field] for field, option in OPTION_OF_FIELD.items()}
    form = FORMS.get(config[KIND_KEY])
    if form is not None:
        variant_settings[form.VARIANT.option] = True
        variant_settings |= form.rule_settings(config[KIND_FIELDS_KEY])
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
        invocation=config[INVOCATION_FIELD],
        uses=cast(Literal["all", "lookup", "product", "each"], uses),
        **variant_settings,
    )


def _may_share_a(rule: LoraRule) -> bool:
    """Returns False if the initialiser computes A from each kernel, so that none can be shared."""
    return not init.takes_from_base(rule.init)


def _layers_for_rule(layers: Sequence[int], row: Row) -> tuple[int, ...] | None:
    """Returns a rule's `layers` for some layers of a row; None for all, or without a stack."""
    sorted_layers = tuple(sorted(set(layers)))
    is_part_of_stack = len(sorted_layers) > 0 and len(sorted_layers) < row.stack[0]
    return sorted_layers if is_part_of_stack else None


def _pattern_for_paths(paths: Sequence[str]) -> str:
    """Returns a pattern that matches only these paths."""
    return "|".join(re.escape(path) for path in paths)


def _group_by_path(adapted_modules: Sequence[Module]) -> dict[str, list[Module]]:
    """Returns the modules stored in each leaf of the tree, by its path."""
    modules_of_path: dict[str, list[Module]] = {}
    for module in adapted_modules:
        modules_of_path.setdefault(module.path, []).append(module)
    return modules_of_path


def _check_uses_agree(config: Fields, adapted_modules: Sequence[Module]) -> None:
    """Raises a PeftError if the two uses of a table have different ranks or alphas."""
    for path, members in _group_by_path(adapted_modules).items():
        has_one_use = len({module.uses for module in members}) == 1
        if has_one_use:
            continue
        for field, default_field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            default = config[default_field]
            values = [
                pattern_value(config, field, module.name_for_patterns, default)
                for module in members
            ]
            if len(set(values)) > 1:
                names = " and ".join(module.name for module in members)
                raise PeftError(
                    f"{names} are tied to one table, {path}, but {field} gives them {values}. Use "
                    "the same value for both, or target only one of them."
                )


def _check_tied_alphas(
    config: Fields, table: Sequence[Row], adapted_modules: Sequence[Module]
) -> None:
    """Raises a PeftError if a head that shares its table's A and B has another alpha."""
    module_of_path = {module.path: module.name for module in adapted_modules}

    def alpha_of(module: str) -> float:
        alpha: float = pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
        return alpha

    for row in table:
        if row.path not in module_of_path:
            continue
        module = module_of_path[row.path]
        for alias in row.aliases:
            head = alias.removesuffix(".weight")
            if alpha_of(module) != alpha_of(head):
                raise PeftError(
                    f"alpha_pattern gives {module} {alpha_of(module)} and {head} "
                    f"{alpha_of(head)}, but the two share an adapter. Use the same alpha for both."
                )


def tensors_of_saved_modules(config: Fields, names: Sequence[str]) -> list[str]:
    """Lists the tensors among `names` that belong to modules_to_save.

    As in PEFT, an entry matches the end of a module's name, even within a word. So "norm" also
    matches every layer's input_layernorm.
    """
    entries = [f"{entry}." for entry in config["modules_to_save"] or ()]
    return [name for name in names if any(entry in name for entry in entries)]


def _make_saved_module_rules(config: Fields, table: Sequence[Row]) -> list[TrainRule]:
    """Makes rules that train modules_to_save in full."""
    if not config["modules_to_save"]:
        return []
    row_and_index = locate_tensors(table)
    tensors = tensors_of_saved_modules(config, list(row_and_index))
    aliases = [alias for row in table for alias in row.aliases]
    tied_tensors = tensors_of_saved_modules(config, aliases)
    for tensor in tensors:
        row, _ = row_and_index[tensor]
        if row.aliases:
            tied_tensors.append(tensor)
    if tied_tensors and not ties_tables(config):
        raise PeftError(
            f"modules_to_save holds {tied_tensors[0].removesuffix('.weight')}, which is tied. PEFT "
            "saves a copy for only one of its two uses, which is not supported. Train it in PEFT "
            "with ensure_weight_tying=True."
        )
    if not tensors:
        raise PeftError(
            f"modules_to_save={config['modules_to_save']!r} matches none of the model's modules. "
            "Correct the names."
        )
    layers_of_row: dict[Row, list[int]] = {}
    for tensor in tensors:
        row, index = row_and_index[tensor]
        layers_of_row.setdefault(row, []).extend(index[:1])
    paths_of_layers: dict[tuple[int, ...] | None, list[str]] = {}
    for row, layers in layers_of_row.items():
        paths_of_layers.setdefault(_layers_for_rule(layers, row), []).append(row.path)
    return [
        TrainRule(targets=_pattern_for_paths(paths), layers=layers)
        for layers, paths in paths_of_layers.items()
    ]


def token_rows(config: Fields, all_modules: Sequence[Module]) -> dict[str, list[int]]:
    """Returns trainable_token_indices by the name of the embedding."""
    tokens = config["trainable_token_indices"]
    if tokens is None:
        return {}
    embeddings = [module.name for module in all_modules if module.is_embedding]
    if isinstance(tokens, list):
        if not embeddings:
            raise PeftError(
                "trainable_token_indices is set, but the model has no embedding. Remove the field."
            )
        return {embeddings[0]: tokens}
    rows_of_embedding = {}
    for key, rows in tokens.items():
        named_embeddings = [name for name in embeddings if name == key or name.endswith(f".{key}")]
        if named_embeddings:
            rows_of_embedding[named_embeddings[0]] = rows
        elif any(_has_name(m, key) for m in all_modules if m.kind == "head" and m.uses == "all"):
            raise PeftError(
                f"trainable_token_indices names {key!r}, a head of its own. Some tokens of such a "
                f"head cannot train here. Train the whole head in PEFT with "
                f"modules_to_save=[{key!r}]."
            )
        elif not _repeats_table(key, tokens, all_modules):
            raise PeftError(
                f"trainable_token_indices names {key!r}, which is no embedding of this model. Use "
                f"{', '.join(embeddings)}."
            )
    return rows_of_embedding


def _repeats_table(
    key: str, tokens: Mapping[str, list[int]], all_modules: Sequence[Module]
) -> bool:
    """Returns True if a key names a tied head with the same tokens as its table.

    PEFT saves such tokens once, for the table.

    Raises:
      PeftError: the head has other tokens than its table.
    """
    head_paths = [m.path for m in all_modules if m.uses == "product" and _has_name(m, key)]
    tables = [m for m in all_modules if m.path in head_paths and m.is_embedding]
    rows_of_tables = []
    for name, rows in tokens.items():
        rows_of_tables += [rows for table in tables if _has_name(table, name)]
    if not rows_of_tables:
        return False
    if sorted(rows_of_tables[0]) != sorted(tokens[key]):
        raise PeftError(
            f"trainable_token_indices has other tokens for {key!r} than for {tables[0].name}, but "
            "the two are tied. Use the same tokens for both."
        )
    return True


def _has_name(module: Module, name: str) -> bool:
    """Returns True if a name is that of a module, or its end."""
    return module.name == name or ends_with(module.name, [name])


def _make_token_rules(config: Fields, all_modules: Sequence[Module]) -> list[TrainRule]:
    """Makes rules that train rows of embeddings in full."""
    paths = {module.name: module.path for module in all_modules if module.is_embedding}
    rows_of_embedding = token_rows(config, all_modules)
    return [
        TrainRule(targets=re.escape(paths[name]), rows=rows)
        for name, rows in rows_of_embedding.items()
    ]


def takes_from_base(config: Fields) -> bool:
    """Returns True if PEFT subtracts the initial factors from the base at each load."""
    return config["init_lora_weights"] in DECOMPOSING_INITS
