"""Compares the layers of a torch module by a trace of a short row, and stacks what is alike."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lora_jax.torch.attention import attending
from lora_jax.torch.backend import Tensor, TorchModelError, running
from lora_jax.torch.layers import find_stack
from lora_jax.torch.structure import LayerPeriods

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
    for each in lists:
        layers: Any = module.get_submodule(each)

        def arrays(i: int, each: str = each, layers: Any = layers) -> dict[str, Any]:
            own = {k: _shape(p) for k, p in layers[i].named_parameters(remove_duplicate=False)}
            return own | within(buffers, f"{each}.{i}.")

        try:
            shapes = {n: _shape(p) for n, p in module.named_parameters(remove_duplicate=False)}
            stack = _probe(name, module, each, layers, arrays, shapes | dict(buffers))
        except (TorchModelError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            first, _, _ = str(error).partition("\n")
            unlike[each] = f"they cannot be compared: {first}"
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
    name: str,
    module: torch.nn.Module,
    each: str,
    layers: Any,
    arrays: Any,
    shapes: Mapping[str, Any],
) -> LayerPeriods | None:
    """Returns the stack of a list of layers, by a trace of the whole module."""
    result: list[LayerPeriods | None] = []

    def traced(values: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        with running(name) as env, attending(keeps_masks=True), loose(env, module):
            tensors = {n: Tensor(jnp.asarray(x), env) for n, x in values.items()}

            def run() -> None:
                kwargs = {"input_ids": Tensor(ids, env), "use_cache": False}
                torch.func.functional_call(module, tensors, (), kwargs, tie_weights=False)

            result.append(find_stack(env, each, list(layers), arrays, run))
        return ids

    jax.eval_shape(traced, dict(shapes), jax.ShapeDtypeStruct((1, _PROBE), np.int32))
    return result[0]


def stack_buffers(stack: LayerPeriods, buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns buffers, with those of a stack's layers stacked under the first one's name."""
    kept = {}
    for name, buffer in buffers.items():
        number, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
        if not name.startswith(f"{stack.name}.") or int(number) < stack.start:
            kept[name] = buffer
        elif int(number) < stack.n_layers:
            kind = int(number) - stack.start
            names = [f"{stack.name}.{layer}.{rest}" for layer in stack.numbers(kind)]
            kept[name] = np.stack([buffers[n] for n in names])
    return kept
