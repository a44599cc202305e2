"""Variants of LoRA. Each file declares the arrays of one variant, and how they are saved.

To add a variant of your own to a tree, write a `lora_jax.Part` and give it to a rule,
``LoraRule(extras=[part], …)``. This one trains a factor for each column of rank, s·A·diag(d)·B:

    def with_core(weight, node, d):                       # d [batch…, r]
        return weight.replace(a=weight.a * jnp.expand_dims(d, range(d.ndim, weight.a.ndim)))

    CORE = Part("core", ("batch", "rank"), lambda node: jnp.ones(node.shape_of("core")), with_core)

To add one to the library, write a file with its `Variant` and add it to `Variants`, the registry.
"""

import dataclasses
from typing import Any

from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.bias_on_b import BIAS_ON_B
from lora_jax.variants.dora import DORA
from lora_jax.variants.lora_fa import LORA_FA
from lora_jax.variants.tinylora import TINYLORA
from lora_jax.variants.variant import Derived, Variant
from lora_jax.variants.vera import VERA
from lora_jax.variants.xs import LORA_XS


def _switch_field(variant: Variant) -> Any:
    """Returns the dataclass field that enables a variant; False by default."""
    return dataclasses.field(default=False, metadata={"variant": variant})


def _setting_field(variant: Variant, name: str) -> Any:
    """Returns the dataclass field of a variant's setting."""
    default = next(setting.default for setting in variant.settings if setting.name == name)
    return dataclasses.field(default=default, metadata={"setting of": variant})


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Variants:
    """The enabled variants, as fields that the dataclasses of rules inherit.

    Args:
      dora: rescale each column of W + s·AB to a trained magnitude (DoRA, arXiv 2402.09353).
      freeze_a: A stays as it was drawn, and x is not kept for its gradient (LoRA-FA,
        arXiv 2308.03303).
      bias_on_b: train a bias on B as well: xW + s·((xA)B + c) (PEFT's ``lora_bias``).
      xs: W + s·ARB, where A = U_rΣ_r and B = V_rᵀ of W's singular value decomposition are frozen
        and R [r, r] trains (LoRA-XS, arXiv 2405.17604); W stays whole. See `init.truncated`.
      vera: W + s·A·diag(d)·B·diag(b), where A and B are frozen random matrices that all weights of
        this rank share, and d [r] and b [out] train (VeRA, arXiv 2310.11454, which takes a large
        rank, such as 256). Leave out alpha, so that s = 1, as in PEFT.
      tinylora: W + s·A(Σᵢ vᵢPᵢ)B, where A = U_r√Σ_r and B = √Σ_rV_rᵀ are frozen, the matrices P
        [u, r, r] are random, and v [u] trains (TinyLoRA, arXiv 2602.04118, which takes a rank of
        2). Leave out alpha, so that s = 1, as in PEFT.
      u: with tinylora, the length of v.
      weight_tying: with tinylora, the share of vectors that is saved, as weights of neighbouring
        layers train one together: 0 for a v for each weight, 1 for one v for all.
    """

    dora: bool = _switch_field(DORA)
    freeze_a: bool = _switch_field(LORA_FA)
    bias_on_b: bool = _switch_field(BIAS_ON_B)
    xs: bool = _switch_field(LORA_XS)
    vera: bool = _switch_field(VERA)
    tinylora: bool = _switch_field(TINYLORA)
    u: int = _setting_field(TINYLORA, "u")
    weight_tying: float = _setting_field(TINYLORA, "weight_tying")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The enabled variants."""
        return tuple(variant for variant in VARIANTS if getattr(self, variant.option))

    def settings_of(self, variant: Variant) -> dict[str, Any]:
        """Returns the settings of a variant, by name."""
        return {setting.name: getattr(self, setting.name) for setting in variant.settings}


VARIANTS: tuple[Variant, ...] = tuple(
    field.metadata["variant"]
    for field in dataclasses.fields(Variants)
    if "variant" in field.metadata
)
PARTS: dict[str, Part] = {part.name: part for variant in VARIANTS for part in variant.parts}


def variant_of(part: Part) -> Variant | None:
    """Returns the variant that defines a part; None for a user's own part."""
    return next((variant for variant in VARIANTS if part in variant.parts), None)


def variants_of(weight: LoraWeight) -> list[Variant]:
    """Returns the variants whose parts a weight has."""
    return [
        variant
        for variant in VARIANTS
        if variant.parts and set(variant.parts) <= set(weight.extras)
    ]


def derived_of(weight: LoraWeight) -> Derived | None:
    """Returns the declaration of a weight's derived arrays; None without any."""
    return next((variant.derived for variant in variants_of(weight) if variant.derived), None)
