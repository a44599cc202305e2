"""Experiments of PEFT's method_comparison as arms: what to run to compare with its results.

An experiment is a folder, as `method_comparison/MetaMathQA/experiments/lora/llama-3.2-3B-rank32`,
with an adapter_config.json and a training_params.json. Fields that cannot be honoured are refused.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.models.families import FAMILIES
from lora_jax.peft.config import read_config
from lora_jax.peft.errors import PeftError
from train.compare.result import Arm
from train.console.errors import UserError, as_user_errors

CONFIG, PARAMS = "adapter_config.json", "training_params.json"
DEFAULTS = "default_training_params.json"

_RATIO = 16  # of the learning rates of LoRA+
_DECAYS = ("weight_decay", "beta1", "beta2", "eps")
_OF_CONFIG = ("r", "lora_alpha")  # what the optimiser of LoRA-FA is told again
_WARMUP = 0.1  # of the steps, in PEFT's script, before a cosine
# Optimisers: what PEFT's script decays by default, and what each sets here.
_OPTIMIZERS: dict[str, tuple[float, str | None]] = {
    "AdamW": (0.01, None),
    "lora+": (0.0, "lora-plus"),
    "lora-fa": (0.0, "lora-fa"),
}
# Options of training: the field in PEFT's script, its kind, and the values that can be honoured.
_OPTIONS: dict[str, tuple[str, type, tuple[str, ...]]] = {
    "steps": ("max_steps", int, ()),
    "model": ("model_id", str, ()),
    "dtype": ("dtype", str, ("float32", "bfloat16")),
    "seq_len": ("max_seq_length", int, ()),
    "eval_every": ("eval_steps", int, ()),
    "grad_clip": ("grad_norm_clip", float, ()),
}
_WANTED = {str: "a string", int: "an integer", float: "a number"}
_HONOURED = (
    *(field for field, _, _ in _OPTIONS.values()),
    *("batch_size", "seed", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_gc"),
)
# Fields without an effect on training, and the data's template.
_UNREAD = frozenset(
    ("batch_size_eval", "compile", "generation_kwargs", "attn_implementation", "query_template")
)
# Fields that have one value that can be honoured.
_FIXED: dict[str, Any] = {
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "init_kv_cache_prefix": None,
    "fast_forward": False,
}
# Fields of the adapter beyond an arm.
_BEYOND = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters"),
)


class Experiment(NamedTuple):
    """A run to make: of the grid of settings, or an experiment of PEFT's, as `train.sft` runs it.

    Attributes:
      arm: its configuration.
      seed: its seed.
      options: other options of training, by the names of their fields.
    """

    arm: Arm
    seed: int
    options: dict[str, Any]


def read_experiment(folder: Path) -> Experiment:
    """Reads an experiment of PEFT's method_comparison.

    Its parameters are those of training_params.json, over those of default_training_params.json in
    the nearest folder above that has one. The data and their template are not read.

    Args:
      folder: with adapter_config.json; without it, the experiment trains in full.

    Raises:
      UserError: a file is missing or damaged, or a field, which is named, cannot be honoured.
    """
    if not (folder / CONFIG).exists() and not (folder / PARAMS).exists():
        raise UserError(
            f"{folder} has neither {CONFIG} nor {PARAMS}: give an experiment's folder of PEFT's "
            "method_comparison"
        )
    params = _Params(folder)
    options, rate, variant = _training(params)
    batch_size, seed = params.value("batch_size", int), params.value("seed", int)
    if not (folder / CONFIG).exists():
        if variant is not None:
            raise params.error("optimizer_type", "trains adapters alone, and none is configured")
        return Experiment(Arm("full", None, None, None, rate, batch_size), seed, options)
    with as_user_errors(PeftError):
        config = read_config(folder)
    where = folder / CONFIG
    method = _method(config, variant, where)
    if config["lora_dropout"]:
        options["dropout"] = float(config["lora_dropout"])
    targets = _targets(config["target_modules"], options["model"], where)
    arm = Arm(method, config["r"], targets, float(config["lora_alpha"]), rate, batch_size)
    for name, value in (("r", arm.rank), ("lora_alpha", arm.alpha)):
        if params.fields["optimizer_kwargs"].get(name, value) != value:
            raise params.error("optimizer_kwargs", f"has another {name} than {where}")
    return Experiment(arm, seed, options)


class _Params:
    """The parameters of training, over the defaults.

    Attributes:
      fields: name -> value.
    """

    def __init__(self, folder: Path) -> None:
        defaults = [above / DEFAULTS for above in folder.resolve().parents]
        present = [path for path in defaults if path.exists()][:1]
        self._where = folder / PARAMS
        self.fields: dict[str, Any] = {"optimizer_type": "AdamW", "optimizer_kwargs": {}}
        for path in [*present, self._where]:
            if path.exists():
                self.fields |= _object(path)
        for name, value in self.fields.items():
            if name in _FIXED:
                if value != _FIXED[name]:
                    raise self.error(name, f"only {json.dumps(_FIXED[name])} is supported")
            elif name not in _HONOURED and name not in _UNREAD:
                raise self.error(name, "is not known")
        if not isinstance(self.fields["optimizer_kwargs"], dict):
            raise self.error("optimizer_kwargs", "must be an object")

    def error(self, name: str, why: str) -> UserError:
        """Returns an error that names a field."""
        return UserError(f"{self._where}: {name}={self.fields.get(name)!r}: {why}")

    def value(self, name: str, kind: type, allowed: Collection[str] = ()) -> Any:
        """Returns a field that is a string, or a number from 0 on."""
        if name not in self.fields:
            raise UserError(
                f"{self._where}: {name} is missing, and no folder above has a {DEFAULTS} with it: "
                "give a copy of PEFT's, or the field"
            )
        value = self.fields[name]
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and (not allowed or value in allowed) and (kind is str or value >= 0)
        if not fits or isinstance(value, bool):
            raise self.error(name, f"{' or '.join(allowed) or _WANTED[kind]} is needed")
        return kind(value)


def _object(path: Path) -> dict[str, Any]:
    with as_user_errors(OSError, ValueError, prefix=f"{path} cannot be read: "):
        fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise UserError(f"{path} must hold an object, and holds a {type(fields).__name__}")
    return fields


def _training(params: _Params) -> tuple[dict[str, Any], float, str | None]:
    """Returns options of training, the learning rate, and the method that the optimiser means."""
    options = {name: params.value(*of) for name, of in _OPTIONS.items()}
    options |= {"schedule": "constant", "warmup": 0}
    if params.fields.get("lr_scheduler") is not None:
        options["schedule"] = params.value("lr_scheduler", str, ("cosine",))
        options["warmup"] = int(_WARMUP * options["steps"])
    if params.fields.get("use_gc"):
        options["remat"] = "full"
    decay, variant = _OPTIMIZERS[params.value("optimizer_type", str, _OPTIMIZERS)]
    given = dict(params.fields["optimizer_kwargs"])
    ratio = _RATIO
    if variant == "lora-plus":  # PEFT's function takes torch's options apart
        given = {**given.pop("optimizer_kwargs", {}), **given}
        ratio = given.pop("loraplus_lr_ratio", None)
    rate = given.pop("lr", None)
    options["weight_decay"] = given.pop("weight_decay", decay)
    beta1, beta2 = given.pop("betas", (0.9, 0.999))
    options |= {"beta1": beta1, "beta2": beta2, "eps": given.pop("eps", 1e-8)}
    if variant == "lora-fa":
        given = {name: value for name, value in given.items() if name not in _OF_CONFIG}
    if ratio != _RATIO:
        raise params.error("optimizer_kwargs", f"loraplus_lr_ratio: only {_RATIO} is an arm")
    if given:
        raise params.error("optimizer_kwargs", f"{', '.join(given)}: not known")
    for name, value in {"lr": rate, **{name: options[name] for name in _DECAYS}}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise params.error("optimizer_kwargs", f"{name} must be a number")
    return options, float(rate), variant


def _method(config: Mapping[str, Any], variant: str | None, where: Path) -> str:
    beyond = [name for name in _BEYOND if config[name]]
    beyond += ["bias"] * (config["bias"] != "none")
    init = config["init_lora_weights"]
    beyond += ["init_lora_weights"] * (init not in (True, "pissa", "olora"))
    if beyond:
        settings = ", ".join(f"{name}={config[name]!r}" for name in beyond)
        raise UserError(f"{where}: {settings}: train.compare has no such arms")
    methods = [name for name in ("dora", "rslora") if config[f"use_{name}"]]
    methods += [name for name in (init, variant) if isinstance(name, str)]
    if len(methods) > 1:
        raise UserError(f"{where}: {' and '.join(methods)} together: an arm has one of them")
    return methods[0] if methods else "lora"


def _targets(targets: Any, model: str, where: Path) -> tuple[str, ...]:
    """Returns the targets; PEFT's default ones where none are named."""
    if targets is None:
        known = {name: family.default_targets for name, family in FAMILIES.items()}
        families = [name for name, targets in known.items() if targets and name in model.lower()]
        if not families:
            raise UserError(
                f"{where}: target_modules is null, and PEFT's default for {model} is not known: "
                "name the modules"
            )
        return known[max(families, key=len)] or ()
    if isinstance(targets, str):
        if targets != "all-linear":
            raise UserError(
                f"{where}: target_modules={targets!r}: PEFT matches an expression with its own "
                "names of modules: list the modules"
            )
        return (targets,)
    return tuple(name.replace(".", "/") for name in targets)
