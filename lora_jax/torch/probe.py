"""Compares the layers of a torch module in a trace of a short row, to find stacks of layers."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from lora_jax.torch.attention import AttentionSettings, use_attention
from lora_jax.torch.backend import call_module, run_with_jax, set_attributes, to_torch
from lora_jax.torch.layers import find_stacks_of_list
from lora_jax.torch.packages import TorchModelError
from lora_jax.torch.structure import LayerPeriods, stack_position_of

_PROBE_TOKENS = 8  # the length of the row that is traced


def arrays_under(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the arrays with a name prefix, by their names without the prefix."""
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


@contextlib.contextmanager
def exchange_tensors(module: torch.nn.Module) -> Iterator[Callable[[], bool]]:
    """Replaces plain tensors in modules' attributes by JAX arrays, within a block.

    Buffers stay as they are. Equal tensors become the same object, so that layers can be compared.
    Yields a function that returns True if the modules have got other JAX tensors meanwhile. After
    the block, all attributes are as before.
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

        def holds_new_tensors() -> bool:
            """Returns True if an attribute holds a JAX tensor made in the block."""
            exchanged_ids = set(map(id, tensor_of_contents.values()))
            for submodule, _ in attributes_before:
                for value in vars(submodule).values():
                    is_jax_tensor = isinstance(value, torch.Tensor) and value.device.type == "jax"
                    if is_jax_tensor and id(value) not in exchanged_ids:
                        return True
            return False

        yield holds_new_tensors
    finally:
        for submodule, attributes in attributes_before:
            vars(submodule).clear()
            vars(submodule).update(attributes)


@contextlib.contextmanager
def without_caches(module: torch.nn.Module) -> Iterator[None]:
    """Replaces cached methods of modules by the functions themselves within a block.

    Otherwise a cache would keep arrays of a trace for the next trace.
    """
    uncached: list[tuple[Any, str, Any]] = []
    for module_class in {
        base for submodule in module.modules() for base in type(submodule).__mro__
    }:
        for name, method in vars(module_class).items():
            function = _uncached_function(method)
            if function is not None:
                uncached.append((module_class, name, function))
    with set_attributes(uncached):
        yield


def _uncached_function(method: Any) -> Any:
    """Returns the function whose results a method caches by ``functools.lru_cache``, or None.

    A decorator around ``lru_cache`` holds the cache in its closure, as that of diffusers does.
    """
    function = getattr(method, "__wrapped__", None)
    cells = getattr(method, "__closure__", None) or ()
    for cache in (method, *(cell.cell_contents for cell in cells)):
        is_cache = hasattr(cache, "cache_clear")
        if is_cache and cache.__wrapped__ is function:
            return function
    return None


def _host_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as a NumPy array; bf16 becomes fp32, because NumPy has no bf16."""
    tensor = tensor.detach()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def buffers_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the buffers of a module that are not on the meta device, by name."""
    return {
        name: _host_array(buffer)
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if buffer.device.type == "cpu"
    }


def find_stacks(
    name: str,
    module: torch.nn.Module,
    lists: Sequence[str],
    buffers: Mapping[str, np.ndarray],
    example: Mapping[str, Any] | None,
) -> dict[str, list[LayerPeriods] | str]:
    """Returns the stacks of each list of layers, or the reason why it has none.

    Args:
      name: the name of the model in messages.
      module: the whole module.
      lists: the names of its lists of layers.
      buffers: the buffers of the module.
      example: arguments of the module by name, with shapes for arrays. None for a causal language
        model, which has one stack at most.
    """
    stacks_or_reason: dict[str, list[LayerPeriods] | str] = {}
    shapes: dict[str, Any] = {
        n: _abstract_array(p) for n, p in module.named_parameters(remove_duplicate=False)
    }
    shapes |= buffers
    for list_name in lists:
        try:
            stacks = _find_stacks_by_trace(name, module, list_name, shapes, example)
        except (TorchModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            stacks_or_reason[list_name] = f"they cannot be compared: {reason}"
        else:
            stacks_or_reason[list_name] = stacks or "they differ"
    return stacks_or_reason


def _abstract_array(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    dtype = {torch.int64: np.int32, torch.bool: np.bool_}.get(tensor.dtype, np.float32)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)


def _find_stacks_by_trace(
    name: str,
    module: torch.nn.Module,
    list_name: str,
    shapes: Mapping[str, Any],
    example: Mapping[str, Any] | None,
) -> list[LayerPeriods]:
    """Finds the stacks of a list of layers, by a trace of the whole module."""
    stacks: list[LayerPeriods] = []
    layers: Any = module.get_submodule(list_name)
    layer_shapes = [arrays_under(shapes, f"{list_name}.{i}.") for i in range(len(layers))]
    constants: dict[str, Any] = {"use_cache": False}
    input_shapes: dict[str, Any] = {"input_ids": jax.ShapeDtypeStruct((1, _PROBE_TOKENS), np.int32)}
    if example is not None:
        input_shapes = {k: x for k, x in example.items() if isinstance(x, jax.ShapeDtypeStruct)}
        constants = {k: x for k, x in example.items() if k not in input_shapes}

    def trace(values: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> None:
        """Traces the module."""
        with (
            run_with_jax(name),
            use_attention(AttentionSettings(keeps_masks=True)),
            exchange_tensors(module),
            without_caches(module),
        ):
            arguments = {**inputs, **constants}
            run = functools.partial(call_module, module, values, (), arguments)
            stacks.extend(
                find_stacks_of_list(
                    list_name, list(layers), layer_shapes, run, to_end=example is None
                )
            )

    jax.eval_shape(trace, dict(shapes), input_shapes)
    return stacks


def stack_buffers(
    stacks: Sequence[LayerPeriods], buffers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Stacks the buffers of layers of a kind, under the first layer's name."""
    stacked: dict[str, np.ndarray] = {}
    for name, buffer in buffers.items():
        position = stack_position_of(name, stacks)
        if position is None:
            stacked[name] = buffer
        elif position.scan_step == 0:
            layer_names = position.names_in_all_layers
            stacked[name] = np.stack([buffers[layer_name] for layer_name in layer_names])
    return stacked
