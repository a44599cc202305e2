"""Finds layers of a torch module that run the same program, and runs them as one scan."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as torch_tree

from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.models.layers.trunk import name_layer_input, remat_policy
from lora_jax.torch.backend import call_module, set_attributes, to_torch
from lora_jax.torch.cache import CachedCall
from lora_jax.torch.structure import LayerPeriods

Arrays = Mapping[str, Any]  # of one layer, by the names within it
_ARRAY_MARK = object()  # replaces an array in the output of a layer


class Recomputation(NamedTuple):
    """The part of each layer that is recomputed, and the sharding of activations.

    Attributes:
      remat: what is recomputed; see ``models.Decoder``.
      placement: shards the activations between layers.
    """

    remat: bool | str = False
    placement: Placement = UNPLACED

    def __call__(self, body: Callable[..., Any], *, scans: bool) -> Callable[..., Any]:
        """Returns ``body(hidden, arrays)``, recomputed in the backward pass.

        Args:
          body: computes a layer.
          scans: whether `body` is the body of a scan. Elsewhere a barrier keeps XLA from merging
            the recomputation with the forward pass.
        """
        if self.remat is False:
            return body

        def with_marked_input(hidden: jax.Array, arrays: Any) -> Any:
            return body(name_layer_input(hidden, self.remat), arrays)

        return jax.checkpoint(
            with_marked_input, policy=remat_policy(self.remat), prevent_cse=not scans
        )


def layer_lists(module: torch.nn.Module) -> list[str]:
    """Returns the names of the outermost lists of two or more modules."""
    names: list[str] = []
    for name, submodule in module.named_modules():
        is_nested = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(submodule, torch.nn.ModuleList) and len(submodule) > 1 and not is_nested:
            names.append(name)
    return names


def to_jax(tree: Any) -> Any:
    """Converts outputs of torch code to JAX's arrays: mappings to dictionaries, without caches."""
    if isinstance(tree, Mapping):
        converted_types = (Mapping, list, tuple, torch.Tensor)
        return {
            name: to_jax(value)
            for name, value in tree.items()
            if isinstance(value, converted_types)
        }
    if isinstance(tree, list | tuple):
        return tuple(map(to_jax, tree))
    is_jax_tensor = isinstance(tree, torch.Tensor) and hasattr(tree, "jax")
    return tree.jax() if is_jax_tensor else tree


@contextlib.contextmanager
def patch_forwards(
    layers: Sequence[torch.nn.Module], forward: Callable[..., Any]
) -> Iterator[None]:
    """Replaces each layer's forward by ``forward(i, layer, *args, **kwargs)`` within a block.

    While `forward` runs, all layers have their own forward, so layers within layers run unchanged.
    """
    originals = [(layer, "forward", layer.forward) for layer in layers]

    def run_forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with set_attributes(originals):
            return forward(i, layer, *args, **kwargs)

    replacements = [
        (layer, "forward", functools.partial(run_forward, i, layer))
        for i, layer in enumerate(layers)
    ]
    with set_attributes(replacements):
        yield


class _LayerCall:
    """One call of a layer, as a function of its parameters and its hidden states.

    Attributes:
      hidden: the hidden states: the first argument, or the one of that name.
      other_arguments: the leaves of the other arguments.
    """

    def __init__(self, layer: torch.nn.Module, args: Any, kwargs: Any):
        self._layer = layer
        if args:
            hidden = args[0]
        else:
            first_keyword_argument = next(iter(kwargs.values()), None)
            hidden = kwargs.get("hidden_states", first_keyword_argument)
        self.hidden: jax.Array = hidden.jax()
        self._arguments, self._argument_tree = torch_tree.tree_flatten((args, kwargs))
        self._hidden_index = next(i for i, x in enumerate(self._arguments) if x is hidden)
        self.other_arguments: list[Any] = [*self._arguments]
        del self.other_arguments[self._hidden_index]
        # The output's leaves, with `_ARRAY_MARK` for each array, and their tree. A call sets both.
        self._output_leaves: list[Any] = []
        self._output_tree: Any = None

    def __call__(self, arrays: Arrays, hidden: jax.Array) -> list[jax.Array]:
        arguments = [*self._arguments]
        arguments[self._hidden_index] = to_torch(hidden)
        args, kwargs = torch_tree.tree_unflatten(arguments, self._argument_tree)
        out = call_module(self._layer, arrays, args, kwargs)
        leaves, self._output_tree = torch_tree.tree_flatten(out)
        self._output_leaves = [_ARRAY_MARK if isinstance(x, torch.Tensor) else x for x in leaves]
        return [to_jax(x) for x in leaves if isinstance(x, torch.Tensor)]

    def restore(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns the layer's output with `arrays` in place of its own arrays."""
        remaining_arrays = iter(arrays)
        leaves = []
        for leaf in self._output_leaves:
            leaves.append(to_torch(next(remaining_arrays)) if leaf is _ARRAY_MARK else leaf)
        return torch_tree.tree_unflatten(leaves, self._output_tree)


class _ProbedCall(NamedTuple):
    """A call of a layer in a trace of the module, for comparison with other layers' calls.

    Attributes:
      layer: the index of the layer in its list.
      signature: equal for two calls that compute the same.
      follows: whether its hidden states are what the layer before returned.
      alive: the objects whose ids are in the signature.
    """

    layer: int
    signature: Any
    follows: bool
    alive: Any


def find_stack(
    name: str,
    layers: Sequence[torch.nn.Module],
    arrays: Sequence[Arrays],
    run: Callable[[], Any],
) -> LayerPeriods | None:
    """Finds the layers of a list that run the same programs, or returns None.

    Two layers are alike if they have the same class and the same settings, compute the same program
    with the same constants, and get the same arguments. Only their hidden states differ: each layer
    must get the output of the layer before. Modules that all get the same input are no layers.

    Args:
      name: the list's name.
      layers: the modules of the list.
      arrays: the shapes of the parameters and buffers of each module.
      run: runs the whole module.
    """
    calls: list[_ProbedCall] = []
    outputs: list[Any] = [None]  # of all layers so far; None before the first one

    def record(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Traces a layer's call, and records its signature."""
        call = _LayerCall(layer, args, kwargs)
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(arrays[i], call.hidden)
        calls.append(
            _ProbedCall(
                layer=i,
                signature=_signature(i, layer, call, traced, shapes),
                follows=call.hidden is outputs[-1],
                alive=(call, traced.consts),
            )
        )
        layer_outputs = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        outputs.extend(layer_outputs)
        return call.restore(layer_outputs)

    with patch_forwards(layers, record):
        run()
    n_layers = len(layers)
    if [call.layer for call in calls] != list(range(n_layers)):
        return None  # the module calls its layers in another order, or not once each
    # Up to three layers at the beginning may differ from all others.
    for start in range(min(n_layers - 1, 4)):
        if not all(call.follows for call in calls[start + 1 :]):
            continue
        n_stacked = n_layers - start
        for period in range(1, n_stacked // 2 + 1):
            if n_stacked % period == 0 and _calls_repeat(calls[start:], period):
                return LayerPeriods(name, start, period, repeats=n_stacked // period)
    return None


def _signature(
    index: int,
    layer: torch.nn.Module,
    call: _LayerCall,
    traced: Any,
    shapes: Sequence[jax.ShapeDtypeStruct],
) -> Any:
    """Returns a key that is equal for layers that compute the same."""
    output_forms = [(x.shape, x.dtype) for x in shapes]
    if output_forms != [(call.hidden.shape, call.hidden.dtype)]:
        return (index,)  # its output cannot be the input of another layer
    arguments = [id(x) if isinstance(x, torch.Tensor) else repr(x) for x in call.other_arguments]
    constants = [_contents_of_constant(constant) for constant in traced.consts]
    return str(traced), constants, arguments, _settings_of_layer(layer)


def _calls_repeat(calls: Sequence[_ProbedCall], period: int) -> bool:
    """Returns True if each call computes the same as the call one period later."""
    pairs = zip(calls, calls[period:], strict=False)
    return all(call.signature == later.signature for call, later in pairs)


def _contents_of_constant(constant: Any) -> Any:
    """Returns the contents of a program's constant, or the id of a traced constant."""
    if isinstance(constant, jax.core.Tracer):
        return id(constant)
    array = np.asarray(constant)
    return array.dtype, array.shape, array.tobytes()


_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "block_idx", "idx")
_PLAIN_TYPES = (int, float, str, bool, type(None), tuple)


def _settings_of_layer(layer: torch.nn.Module) -> list[Any]:
    """Returns the classes and plain settings of a layer's modules, without the layer's index."""
    settings: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: repr(value)
            for key, value in vars(module).items()
            if key not in _INDEX_NAMES and isinstance(value, _PLAIN_TYPES)
        }
        settings.append((name, type(module), sorted(plain.items())))
    return settings


@contextlib.contextmanager
def run_as_scan(
    stack: LayerPeriods,
    layers: Sequence[torch.nn.Module],
    arrays: Sequence[Arrays],
    recomputed: Recomputation,
    cache: CachedCall | None = None,
) -> Iterator[None]:
    """Runs the layers of a stack as one scan, in the call of the last layer of its period.

    Args:
      stack: the layers that run.
      layers: a layer of each kind.
      arrays: parameters and buffers of each kind, stacked on axis 0.
      recomputed: what the backward pass recomputes.
      cache: the tokens so far; None without a cache.
    """
    calls: list[_LayerCall] = []
    layer_indices = range(stack.start, stack.n_layers)
    with_entries = contextlib.nullcontext if cache is None else cache.use_entries

    def run_period(hidden: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        """Runs one period of layers; the body of the scan."""
        arrays_of_layers, entries = slices
        with with_entries(entries) as added_entries:
            for call, layer_arrays in zip(calls, arrays_of_layers, strict=True):
                (hidden,) = call(layer_arrays, hidden)
                hidden = recomputed.placement.constrain(hidden, "residual")
        return hidden, added_entries

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Collects the calls of a period, and runs the scan at the last one."""
        if i == 0:
            calls.clear()
        call = _LayerCall(layer, args, kwargs)
        calls.append(call)
        if i < stack.period - 1:
            # The scan will run this layer. A trace only finds the structure of its output.
            layer_shapes = {k: jax.eval_shape(lambda x: x[0], x) for k, x in arrays[i].items()}
            with with_entries({}):
                jax.eval_shape(call, layer_shapes, call.hidden)
            return call.restore([call.hidden])
        # The last layer of the period runs all layers of the stack.
        body = recomputed(run_period, scans=True)
        entries = {} if cache is None else cache.entries_of(layer_indices)
        hidden, added_entries = jax.lax.scan(body, calls[0].hidden, (list(arrays), entries))
        if cache is not None:
            cache.add(added_entries, layer_indices)
        return call.restore([hidden])

    with patch_forwards(layers, forward):
        yield


@contextlib.contextmanager
def run_one_by_one(
    layers: Sequence[torch.nn.Module], arrays: Sequence[Arrays], recomputed: Recomputation
) -> Iterator[None]:
    """Runs each layer separately, recomputed in the backward pass."""

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _LayerCall(layer, args, kwargs)
        hidden = recomputed.placement.constrain(call.hidden, "residual")
        body = recomputed(lambda hidden, layer_arrays: call(layer_arrays, hidden), scans=False)
        return call.restore(body(hidden, arrays[i]))

    with patch_forwards(layers, forward):
        yield
