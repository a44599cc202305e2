"""The option --rope-scaling: ``kind:factor`` and further fields of the kind."""

import re
from collections.abc import Mapping
from typing import Any

from train.console.errors import UserError


def parse_rope_scaling(text: str | None) -> dict[str, Any] | None:
    """Parses a RoPE scaling such as ``yarn:4`` or ``llama3:8,low_freq_factor=2``.

    Returns:
      The scaling, as `lora_jax.models.with_rope_scaling` takes it; None for none.

    Raises:
      UserError: the text is not of this form.
    """
    if text is None:
        return None
    kind_and_factor, *assignments = text.split(",")
    kind, _, factor = kind_and_factor.strip().partition(":")
    try:
        fields: dict[str, Any] = {"rope_type": kind}
        # `dynamic` without a factor is refused later, with the reason that it is not supported.
        if factor or kind != "dynamic":
            fields["factor"] = float(factor)
        for assignment in assignments:
            name, _, value = assignment.strip().partition("=")
            if re.fullmatch(r"\w+", name) is None or name in fields:
                raise ValueError(name)
            fields[name] = _parse_field_value(value)
    except ValueError:
        raise UserError(
            f"--rope-scaling {text} is not a kind with a factor. Pass a kind (linear, llama3 or "
            "yarn) and a factor, such as yarn:4. Fields may follow, as in yarn:4,beta_fast=16."
        ) from None
    return fields


def rope_scaling_text(scaling: Mapping[str, Any]) -> str:
    """Returns the text of --rope-scaling that stands for a scaling."""
    text = str(scaling["rope_type"])
    if "factor" in scaling:
        text += f":{scaling['factor']:g}"
    for name, value in scaling.items():
        if name not in ("rope_type", "factor"):
            text += f",{name}={value}"
    return text


def _parse_field_value(text: str) -> bool | int | float:
    """Parses the value of a field: true, false, or a number."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"\d+", text) else float(text)
