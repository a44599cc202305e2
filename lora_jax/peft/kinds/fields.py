"""Converts the configuration of an adapter type to LoraConfig fields, and back."""

import dataclasses

from lora_jax.core.types import Fields, JsonObject
from lora_jax.peft.errors import PeftError

_COMMON_FIELDS = (
    "peft_version",
    "inference_mode",
    "auto_mapping",
    "revision",
    "fan_in_fan_out",
    "r",
)


@dataclasses.dataclass(frozen=True)
class KindFields:
    """The differences between a type's configuration and a LoraConfig, with PEFT's defaults.

    Attributes:
      name: the kind's name in messages, such as "VeRA".
      rank: the default of r.
      own: the fields that the kind alone has.
      without_effect: fields that do not change a loaded adapter.
    """

    name: str
    default_rank: int
    kind_fields: Fields
    without_effect: Fields

    def to_lora_fields(self, fields: Fields) -> tuple[JsonObject, JsonObject]:
        """Splits fields into those of a LoraConfig and those of the adapter type."""
        prefix = self.name.lower()
        kind_fields = {
            name: fields.get(name, default) for name, default in self.kind_fields.items()
        }
        others = {*self.kind_fields, *self.without_effect, f"{prefix}_dropout", "peft_type"}
        lora_fields = {name: value for name, value in fields.items() if name not in others}
        r = lora_fields.setdefault("r", self.default_rank)
        lora_fields |= {"lora_alpha": r, "lora_dropout": fields.get(f"{prefix}_dropout", 0.0)}
        if lora_fields.get("bias") == f"{prefix}_only":
            lora_fields["bias"] = "lora_only"
        return lora_fields, kind_fields

    def from_lora_fields(self, config: Fields) -> JsonObject:
        """Returns the type's configuration for the modules that LoraConfig fields adapt.

        Raises:
          PeftError: the kind's configuration has no fields for these modules.
        """
        prefix = self.name.lower()
        if config["rank_pattern"]:
            ranks = sorted({config["r"], *config["rank_pattern"].values()})
            raise PeftError(
                f"PEFT's {self.name} has one r for all modules, but the tree has the ranks "
                f"{ranks}. Use one rank in all rules."
            )
        for name in ("target_parameters", "trainable_token_indices"):
            if config[name]:
                raise PeftError(
                    f"PEFT's {self.name} has no {name}, but this tree needs {name}={config[name]}. "
                    "Remove the rules for them, or merge the adapter."
                )
        return {
            **{
                name: config[name]
                for name in (*_COMMON_FIELDS, "target_modules", "modules_to_save")
            },
            **self.kind_fields,
            **self.without_effect,
            "peft_type": prefix.upper(),
            f"{prefix}_dropout": config["lora_dropout"],
            "bias": f"{prefix}_only" if config["bias"] == "lora_only" else config["bias"],
            "layers_to_transform": None,
            "layers_pattern": None,
        }
