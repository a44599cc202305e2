"""Compares the layers of a torch module by a trace of a short row, and stacks what is alike."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from lora_jax.torch.attention import Attending, attending
from lora_jax.torch.backend import call_module, running, to_torch
from lora_jax.torch.layers import find_stack
from lora_jax.torch.packages import TorchModelError
from lora_jax.torch.structure import LayerPeriods, place_of

_PROBE_TOKENS = 8  # of the row by which layers are compared


def within(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the arrays whose names begin with a prefix, under what is left of the names."""
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


@contextlib.contextmanager
def loose(module: torch.nn.Module) -> Iterator[Callable[[], bool]]:
    """Puts JAX's arrays in the place of the plain tensors among the modules' attributes.

    Buffers stay as they are. Equal tensors become one, by which layers are seen to be alike. Yields
    a function that tells whether the modules hold others by now; behind the block, all attributes
    are as before.
    """
    attributes_before = [(submodule, vars(submodule).copy()) for submodule in module.modules()]
    tensor_of_contents: dict[Any, Any] = {}
    try:
        for submodule, attributes in attributes_before:
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    array = _host_array(value)
                    contents = array.dtype, array.shape, array.tobytes()
                    tensor = tensor_of_contents.setdefault(contents, to_torch(array))
                    vars(submodule)[name] = tensor

        def holds_others() -> bool:
            exchanged_ids = set(map(id, tensor_of_contents.values()))
            return any(
                value.device.type == "jax" and id(value) not in exchanged_ids
                for submodule, _ in attributes_before
                for value in vars(submodule).values()
                if isinstance(value, torch.Tensor)
            )

        yield holds_others
    finally:
        for submodule, attributes in attributes_before:
            vars(submodule).clear()
            vars(submodule).update(attributes)


def _host_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor's values; NumPy has no bf16, of which they are fp32."""
    tensor = tensor.detach()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def buffers_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns a module's buffers by name, those that are not on the meta device."""
    return {
        name: _host_array(buffer)
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if buffer.device.type == "cpu"
    }


def find_stacks(
    name: str, module: torch.nn.Module, lists: Sequence[str], buffers: Mapping[str, np.ndarray]
) -> dict[str, LayerPeriods | str]:
    """Returns the stack of each list of layers, compared by a short row, or why it is none."""
    stack_or_reason: dict[str, LayerPeriods | str] = {}
    shapes = {n: _shape(p) for n, p in module.named_parameters(remove_duplicate=False)}
    for list_name in lists:
        try:
            stack = _probe(name, module, list_name, {**shapes, **buffers})
        except (TorchModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            stack_or_reason[list_name] = f"they cannot be compared: {reason}"
        else:
            stack_or_reason[list_name] = stack or "they differ"
    return stack_or_reason


def _shape(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    dtype = {torch.int64: np.int32, torch.bool: np.bool_}.get(tensor.dtype, np.float32)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)


def _probe(
    name: str, module: torch.nn.Module, list_name: str, shapes: Mapping[str, Any]
) -> LayerPeriods | None:
    """Returns the stack of a list of layers, by a trace of the whole module."""
    stacks: list[LayerPeriods | None] = []
    layers: Any = module.get_submodule(list_name)
    layer_shapes = [within(shapes, f"{list_name}.{i}.") for i in range(len(layers))]

    def trace(values: Mapping[str, Any], ids: jax.Array) -> None:
        with running(name), attending(Attending(keeps_masks=True)), loose(module):
            inputs = {"input_ids": ids, "use_cache": False}
            run = functools.partial(call_module, module, values, (), inputs)
            stacks.append(find_stack(list_name, list(layers), layer_shapes, run))

    jax.eval_shape(trace, dict(shapes), jax.ShapeDtypeStruct((1, _PROBE_TOKENS), np.int32))
    return stacks[0]


def stack_buffers(
    stacks: Sequence[LayerPeriods], buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns buffers, those of layers of a kind stacked under the first one's name."""
    stacked: dict[str, np.ndarray] = {}
    for name, buffer in buffers.items():
        place = place_of(name, stacks)
        if place is None:
            stacked[name] = buffer
        elif place.turn == 0:
            stacked[name] = np.stack([buffers[layer_name] for layer_name in place.all_names])
    return stacked
