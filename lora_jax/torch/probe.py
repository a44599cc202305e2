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

_PROBE = 8  # tokens of the row by which layers are compared


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
    before = [(part, vars(part).copy()) for part in module.modules()]
    shared: dict[Any, Any] = {}
    try:
        for part, own in before:
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    array = _host_array(value)
                    key = array.dtype, array.shape, array.tobytes()
                    vars(part)[name] = shared.setdefault(key, to_torch(array))

        def holds_others() -> bool:
            values = (value for part, _ in before for value in vars(part).values())
            tensors = (value for value in values if isinstance(value, torch.Tensor))
            given = set(map(id, shared.values()))
            return any(x.device.type == "jax" and id(x) not in given for x in tensors)

        yield holds_others
    finally:
        for part, own in before:
            vars(part).clear()
            vars(part).update(own)


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
    found: dict[str, LayerPeriods | str] = {}
    shapes = {n: _shape(p) for n, p in module.named_parameters(remove_duplicate=False)}
    for each in lists:
        try:
            found[each] = _probe(name, module, each, {**shapes, **buffers}) or "they differ"
        except (TorchModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            found[each] = f"they cannot be compared: {str(error).partition(chr(10))[0]}"
    return found


def _shape(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    dtype = {torch.int64: np.int32, torch.bool: np.bool_}.get(tensor.dtype, np.float32)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)


def _probe(
    name: str, module: torch.nn.Module, each: str, shapes: Mapping[str, Any]
) -> LayerPeriods | None:
    """Returns the stack of a list of layers, by a trace of the whole module."""
    result: list[LayerPeriods | None] = []
    layers: Any = module.get_submodule(each)

    def traced(values: Mapping[str, Any], ids: jax.Array) -> None:
        own = [within(shapes, f"{each}.{i}.") for i in range(len(layers))]
        with running(name), attending(Attending(keeps_masks=True)), loose(module):
            inputs = {"input_ids": ids, "use_cache": False}
            run = functools.partial(call_module, module, values, (), inputs)
            result.append(find_stack(each, list(layers), own, run))

    jax.eval_shape(traced, dict(shapes), jax.ShapeDtypeStruct((1, _PROBE), np.int32))
    return result[0]


def stack_buffers(
    stacks: Sequence[LayerPeriods], buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns buffers, those of layers of a kind stacked under the first one's name."""
    kept: dict[str, np.ndarray] = {}
    for name, buffer in buffers.items():
        placed = place_of(name, stacks)
        if placed is None:
            kept[name] = buffer
        elif placed.turn == 0:
            kept[name] = np.stack([buffers[each] for each in placed.all_names])
    return kept
