"""Example arguments of modules, with which their layers are compared."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Sizes of the examples. They differ, so that arrays of different kinds have different shapes.
_BATCH, _TEXT_TOKENS, _ROWS, _COLUMNS = 1, 3, 2, 4


class Example:
    """Arguments of a module by name, arrays as their shapes. Equal examples have equal hashes."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.arguments = {name: _without_values(x) for name, x in arguments.items()}
        self._text = repr(sorted(self.arguments.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def _without_values(argument: Any) -> Any:
    """Returns the shape of an array; returns other arguments unchanged."""
    if hasattr(argument, "shape") and hasattr(argument, "dtype"):
        dtype = np.dtype(str(argument.dtype).removeprefix("torch."))
        return jax.ShapeDtypeStruct(tuple(argument.shape), jax.dtypes.canonicalize_dtype(dtype))
    return argument


def example_of(module: Any) -> Example | None:
    """Returns the example of a module of Flux, SD3 or Qwen-Image; None for other modules."""
    make_arguments = _MAKERS.get(type(module).__name__)
    return None if make_arguments is None else Example(make_arguments(module.config))


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _flux_arguments(config: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden_states": _floats(_BATCH, _ROWS * _COLUMNS, config.in_channels),
        "encoder_hidden_states": _floats(_BATCH, _TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _floats(_BATCH, config.pooled_projection_dim),
        "timestep": _floats(_BATCH),
        "img_ids": _floats(_ROWS * _COLUMNS, 3),
        "txt_ids": _floats(_TEXT_TOKENS, 3),
        "return_dict": False,
    }
    if config.guidance_embeds:
        arguments["guidance"] = _floats(_BATCH)
    return arguments


def _sd3_arguments(config: Any) -> dict[str, Any]:
    height = _ROWS * config.patch_size
    width = _COLUMNS * config.patch_size
    return {
        "hidden_states": _floats(_BATCH, config.in_channels, height, width),
        "encoder_hidden_states": _floats(_BATCH, _TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _floats(_BATCH, config.pooled_projection_dim),
        "timestep": _floats(_BATCH),
        "return_dict": False,
    }


def _qwen_image_arguments(config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _floats(_BATCH, _ROWS * _COLUMNS, config.in_channels),
        "encoder_hidden_states": _floats(_BATCH, _TEXT_TOKENS, config.joint_attention_dim),
        "timestep": _floats(_BATCH),
        "img_shapes": [[(1, _ROWS, _COLUMNS)]] * _BATCH,
        "return_dict": False,
    }


_MAKERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux_arguments,
    "SD3Transformer2DModel": _sd3_arguments,
    "QwenImageTransformer2DModel": _qwen_image_arguments,
}
