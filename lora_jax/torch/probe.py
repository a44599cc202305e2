"""Compares the layers of a torch module by a trace of a short row, and stacks what is alike."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lora_jax.torch.attention import Attending, attending
from lora_jax.torch.backend import Tensor, TorchModelError, running
from lora_jax.torch.layers import find_stack
from lora_jax.torch.structure import LayerPeriods, place_of

_PROBE = 8  # tokens of the row by which layers are compared


def within(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the arrays whose names begin with a prefix, under what is left of the names."""
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


@contextlib.contextmanager
def loose(env: Any, module: torch.nn.Module) -> Iterator[None]:
    """Puts JAX's arrays in the place of the plain tensors among the modules' attributes.

    Buffers stay as they are. Equal tensors become one, by which layers are seen to be alike.
    """
    held = [
        (part, name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    ]
    shared: dict[Any, Tensor] = {}
    try:
        for part, name, value in held:
            array = _host_array(value)
            key = array.dtype, array.shape, array.tobytes()
            if key not in shared:
                shared[key] = Tensor(jnp.asarray(array), env)
            part.__dict__[name] = shared[key]
        yield
    finally:
        for part, name, value in held:
            part.__dict__[name] = value


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
) -> tuple[list[LayerPeriods], dict[str, str]]:
    """Compares the layers of each list by a short row.

    Returns:
      The stacks; and, by the names of the lists that are none, why not.
    """
    stacks: list[LayerPeriods] = []
    unlike: dict[str, str] = {}
    shapes = {n: _shape(p) for n, p in module.named_parameters(remove_duplicate=False)}
    for each in lists:
        try:
            stack = _probe(name, module, each, {**shapes, **buffers})
        except (TorchModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            unlike[each] = f"they cannot be compared: {str(error).partition(chr(10))[0]}"
            continue
        if stack is None:
            unlike[each] = "they differ"
        else:
            stacks.append(stack)
    return stacks, unlike


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
        with running(name) as env, attending(Attending(keeps_masks=True)), loose(env, module):
            tensors = {n: Tensor(jnp.asarray(x), env) for n, x in values.items()}

            def run() -> None:
                kwargs = {"input_ids": Tensor(ids, env), "use_cache": False}
                torch.func.functional_call(module, tensors, (), kwargs, tie_weights=False)

            own = [within(shapes, f"{each}.{i}.") for i in range(len(layers))]
            result.append(find_stack(env, each, list(layers), own, run))

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
