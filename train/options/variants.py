"""The options of variants of LoRA: a switch for each, and the numbers that some take."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from lora_jax.variants import VARIANTS, Variants
from lora_jax.variants.variant import Setting, Variant
from train.options.conditions import NoEffect
from train.options.field import FACTORS, PLAIN, option


def _field(variant: Variant) -> Any:
    """Returns the field of the option that turns a variant on."""
    compared_by = "methods" if variant.is_compared else None
    return option(False, FACTORS if variant.alone else PLAIN, compared_by=compared_by)


def _fields() -> list[tuple[str, Any, Any]]:
    """Returns the name, type and field of each option."""
    fields: list[tuple[str, Any, Any]] = []
    for variant in VARIANTS:
        fields.append((variant.option, Annotated[bool, arg(help=variant.help)], _field(variant)))
        fields += [_number(variant, setting) for setting in variant.settings]
    return fields


def _number(variant: Variant, setting: Setting) -> tuple[str, Any, Any]:
    own = option(setting.default, FACTORS, NoEffect[f"NO_{variant.option.upper()}"])
    return setting.name, Annotated[type(setting.default), arg(help=setting.help)], own


if TYPE_CHECKING:
    VariantOptions = Variants
else:
    VariantOptions = dataclasses.make_dataclass(
        "VariantOptions", _fields(), bases=(Variants,), frozen=True, kw_only=True
    )
