"""The options that turn variants of LoRA on: one for each declaration in `lora_jax.variants`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from lora_jax.variants import VARIANTS, Variants

if TYPE_CHECKING:
    VariantOptions = Variants
else:
    VariantOptions = dataclasses.make_dataclass(
        "VariantOptions",
        [(each.option, Annotated[bool, arg(help=each.help)], False) for each in VARIANTS],
        bases=(Variants,),
        frozen=True,
        kw_only=True,
    )
