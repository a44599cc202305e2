"""The options that turn variants of LoRA on: one for each declaration in `lora_jax.variants`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from lora_jax.variants import VARIANTS, Variants
from lora_jax.variants.variant import Variant
from train.options.field import FACTORS, PLAIN, option


def _field(variant: Variant) -> Any:
    """Returns the field of the option that turns a variant on."""
    compared_by = "methods" if variant.is_compared else None
    return option(False, FACTORS if variant.alone else PLAIN, compared_by=compared_by)


if TYPE_CHECKING:
    VariantOptions = Variants
else:
    VariantOptions = dataclasses.make_dataclass(
        "VariantOptions",
        [(each.option, Annotated[bool, arg(help=each.help)], _field(each)) for each in VARIANTS],
        bases=(Variants,),
        frozen=True,
        kw_only=True,
    )
