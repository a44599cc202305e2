"""VeRA's configuration in PEFT's files, translated from and to the fields of a LoraConfig."""

from collections.abc import Mapping
from typing import Any

from lora_jax.peft.errors import PeftError

# PEFT's defaults.
_HONOURED: dict[str, Any] = {
    "r": 256,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "vera_dropout": 0.0,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "task_type": None,
}
_OWN = {"projection_prng_key": 0, "save_projection": True}
_WITHOUT_EFFECT = ("d_initial", "init_weights")  # on an adapter that is loaded


def as_lora_fields(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields of a LoraConfig that adapts the same modules, and those of VeRA alone.

    Args:
      fields: of a VeraConfig.
      where: their source, for messages.

    Raises:
      PeftError: a value that PEFT would not write.
    """
    own = {name: fields.get(name, default) for name, default in _OWN.items()}
    seed, saves = own["projection_prng_key"], own["save_projection"]
    if type(seed) is not int or not 0 <= seed < 2**32 or type(saves) is not bool:
        raise PeftError(
            f"{where}: projection_prng_key={seed!r}, save_projection={saves!r}: a number from 0 to "
            "2³² − 1 and a boolean are needed"
        )
    found = {name: fields.get(name, default) for name, default in _HONOURED.items()}
    others = {
        name: value
        for name, value in fields.items()
        if name not in (*_HONOURED, *_OWN, *_WITHOUT_EFFECT, "peft_type")
    }
    found |= {"lora_alpha": found["r"], "lora_dropout": found.pop("vera_dropout")}
    if found["bias"] == "vera_only":
        found["bias"] = "lora_only"
    return others | found, own


def as_vera_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a VeraConfig for the modules that fields of a LoraConfig adapt.

    Raises:
      PeftError: a VeraConfig cannot say it.
    """
    if fields["rank_pattern"]:
        ranks = sorted({fields["r"], *fields["rank_pattern"].values()})
        raise PeftError(f"PEFT's VeRA has one r for all modules; here they have {ranks}")
    for name in ("target_parameters", "trainable_token_indices"):
        if fields[name]:
            raise PeftError(f"PEFT's VeRA has no {name}, and here it would be {fields[name]}")
    shared = ("peft_version", "inference_mode", "auto_mapping", "revision", "fan_in_fan_out")
    found = {name: fields[name] for name in (*shared, "r", "target_modules", "modules_to_save")}
    return found | {
        "peft_type": "VERA",
        "vera_dropout": fields["lora_dropout"],
        "bias": "vera_only" if fields["bias"] == "lora_only" else fields["bias"],
        "d_initial": 0.1,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "projection_prng_key": 0,
        "save_projection": True,  # the pair is not what PEFT would draw
    }
