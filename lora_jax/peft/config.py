"""Reads PEFT's adapter_config.json, and rejects fields that are not supported."""

from collections.abc import Mapping
from typing import Any

from lora_jax.buckets.copies import path_to_read
from lora_jax.core.types import Fields, JsonObject
from lora_jax.hf.fields import read_json_fields
from lora_jax.peft.errors import PeftError
from lora_jax.peft.forms import FORMS
from lora_jax.variants import VARIANTS

CONFIG_FILE = "adapter_config.json"
KIND_KEY, KIND_FIELDS_KEY = "peft_type", "own"  # further entries of what `read_config` returns
INVOCATION_FIELD = "alora_invocation_tokens"
# The field of a PEFT configuration that turns a variant of LoRA on -> the option of a LoraRule.
OPTION_OF_FIELD = {v.in_peft.field: v.option for v in VARIANTS if v.in_peft and v.in_peft.field}

# The fields that change what an adapter computes, with PEFT's defaults.
_FIELD_DEFAULTS: JsonObject = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "lora_dropout": 0.0,
    **dict.fromkeys(OPTION_OF_FIELD, False),
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
    "fan_in_fan_out": False,
    "task_type": None,
    "target_parameters": None,
    "ensure_weight_tying": False,
    INVOCATION_FIELD: None,
}
# Fields without an effect on the loaded adapter.
_FIELDS_WITHOUT_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config
    lora_ga_config megatron_core peft_type peft_version qalora_group_size revision runtime_config
    """.split()
)
# Fields that are not supported, unless their value says that they are not in use.
REFUSED_FIELDS = (
    "arrow_config kasa_config layer_replication megatron_config monteclora_config use_bdlora "
    "use_qalora velora_config"
).split()
UNUSED_VALUES: tuple[object, ...] = (None, False)
# On loading, an initialiser matters only if PEFT computes factors from the base again.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "lora_ga")
DECOMPOSING_INITS = ("pissa", "olora")
_REDRAWN_INITS = ("pissa_niter", "corda")


def read_config(source: Any) -> JsonObject:
    """Reads the fields of a PEFT configuration, fills in defaults, and checks values.

    Args:
      source: a dict, a file or folder, or a `peft.LoraConfig`.

    Returns:
      Field -> value, for each field that is honoured. Of a configuration of another kind, the
      fields of a LoraConfig for the same modules, and under `KIND_FIELDS_KEY` the fields that it
      alone has.
      Under `KIND_KEY`, the kind: "LORA" or one of `lora_jax.peft.forms.FORMS`.

    Raises:
      PeftError: if the kind is not supported, or if a field that is not supported is in use.
    """
    fields, where = read_fields(source)
    kind = fields.get("peft_type", "LORA")
    kind = getattr(kind, "value", kind)  # of an enum
    if kind not in ("LORA", *FORMS):
        kinds = ", ".join(("LORA", *FORMS))
        raise PeftError(f"{where}: peft_type is {kind!r}, but lora_jax supports only {kinds}.")
    kind_fields: JsonObject = {}
    if kind in FORMS:
        fields, kind_fields = FORMS[kind].as_lora_fields(fields, where)
    _check_fields_supported(fields, where)
    config: JsonObject = {
        name: fields.get(name, default) for name, default in _FIELD_DEFAULTS.items()
    }
    config["task_type"] = getattr(config["task_type"], "value", config["task_type"])
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config[name], set | frozenset | tuple):
            config[name] = sorted(config[name])
    _check_field_values(config, where)
    return config | {KIND_KEY: kind, KIND_FIELDS_KEY: kind_fields}


def read_fields(source: Any) -> tuple[JsonObject, str]:
    """Returns the fields of a PEFT configuration, without defaults or checks.

    Args:
      source: a dict, a file or folder, or a `peft.LoraConfig`.

    Returns:
      The fields, and a name of their source for messages.

    Raises:
      PeftError: if the file is missing or cannot be read.
    """
    if isinstance(source, Mapping):
        return dict(source), "the PEFT configuration"
    if hasattr(source, "to_dict"):
        return dict(source.to_dict()), type(source).__name__
    path = path_to_read(source)
    file = path / CONFIG_FILE if path.is_dir() else path
    return read_json_fields(file, "a PEFT adapter", PeftError), str(file)


def _check_fields_supported(fields: Fields, where: str) -> None:
    """Raises a PeftError that lists fields in use that are unsupported or unknown."""
    problems = []
    for name, value in fields.items():
        if name in REFUSED_FIELDS:
            if value not in UNUSED_VALUES:
                problems.append(f"{name}={value!r} is not supported.")
            continue
        is_known = name in _FIELD_DEFAULTS or name in _FIELDS_WITHOUT_EFFECT
        is_empty = value in (None, False, {}, [])
        if not is_known and not is_empty:
            problems.append(f"{name}={value!r} is not known.")
    if problems:
        raise PeftError(f"{where}: {' '.join(problems)}")


def _check_field_values(config: Fields, where: str) -> None:
    """Raises a PeftError that lists the fields with a value of the wrong kind."""
    init = config["init_lora_weights"]
    if str(init).startswith(_REDRAWN_INITS):
        raise PeftError(
            f"{where}: With init_lora_weights={init!r}, PEFT changes the base at each load by "
            "random numbers or data that the folder lacks. Save the adapter in PEFT as plain LoRA "
            "with save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    rank = config["r"]
    alpha = config["lora_alpha"]
    dropout = config["lora_dropout"]
    rank_pattern = config["rank_pattern"]
    alpha_pattern = config["alpha_pattern"]
    layers = config["layers_to_transform"]
    tokens = config["trainable_token_indices"]
    invocation = config[INVOCATION_FIELD]
    # PEFT writes the tokens as a list, or as a list for each embedding.
    token_lists = tokens.values() if isinstance(tokens, Mapping) else [tokens]
    has_token_lists = all(_is_list_of_indices(indices) for indices in token_lists)
    is_valid = {
        "r": type(rank) is int and _is_number_from(rank, minimum=1),
        "lora_alpha": _is_number_from(alpha, minimum=0) and alpha > 0,
        "lora_dropout": _is_number_from(dropout, minimum=0) and dropout < 1,
        "bias": config["bias"] in ("none", "all", "lora_only"),
        "rank_pattern": rank_pattern is None or _is_pattern_field(rank_pattern, minimum=1),
        "alpha_pattern": alpha_pattern is None or _is_pattern_field(alpha_pattern, minimum=0),
        "layers_to_transform": layers is None or type(layers) is int or _is_list_of_indices(layers),
        "trainable_token_indices": tokens is None or has_token_lists,
        "init_lora_weights": init in (*_PLAIN_INITS, *DECOMPOSING_INITS),
        INVOCATION_FIELD: invocation is None
        or (bool(invocation) and _is_list_of_indices(invocation)),
    }
    for name in (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "target_parameters",
        "layers_pattern",
    ):
        is_valid[name] = config[name] is None or _is_list_of_names(config[name])
    # These may be a pattern, too.
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        is_valid[name] |= isinstance(config[name], str)
    for name in ("use_rslora", *OPTION_OF_FIELD, "ensure_weight_tying"):
        is_valid[name] = type(config[name]) is bool
    problems = [f"{name}={config[name]!r}" for name in is_valid if not is_valid[name]]
    if problems:
        raise PeftError(
            f"{where}: {', '.join(problems)} is not supported, or is no value that PEFT writes. "
            "Correct the configuration."
        )


def _is_number_from(value: object, *, minimum: float) -> bool:
    """Returns True for a number of at least `minimum` and below a million."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return minimum <= value < 1e6


def _is_list_of_names(value: object) -> bool:
    """Returns True for a list of non-empty strings."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_pattern_field(value: object, *, minimum: float) -> bool:
    """Returns True for a mapping from patterns of module names to numbers."""
    if not isinstance(value, Mapping):
        return False
    has_names = all(isinstance(name, str) for name in value)
    return has_names and all(_is_number_from(number, minimum=minimum) for number in value.values())


def _is_list_of_indices(value: object) -> bool:
    """Returns True for a list of non-negative integers."""
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
