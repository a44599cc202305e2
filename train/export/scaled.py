"""Tells other tools of a scaled RoPE, for which PEFT's files have no field."""

import json
from typing import Any

from train.adapters.source import AdapterSource


def scaled_fields(adapter: AdapterSource, model: Any) -> dict[str, Any]:
    """Returns the fields of config.json that differ from the base's if the run scaled RoPE."""
    if adapter.rope_scaling is None:
        return {}
    written = model.config.to_hf()
    theta = {"rope_theta": written["rope_theta"]}
    return {
        "rope_parameters": written["rope_scaling"] | theta,
        "max_position_embeddings": written["max_position_embeddings"],
    }


def rope_problem(scaled: dict[str, Any]) -> str:
    """Returns the line of --check-serving about a scaled RoPE."""
    return (
        "the adapter was trained with a scaled RoPE, and the base's config.json has another: "
        f"serve it with --hf-overrides '{json.dumps(scaled)}', or write a whole model with --merged"
    )
