"""The layers of a torch module: those that are alike run as one scan, and all can be recomputed."""

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
from lora_jax.models.layers.trunk import layer_input, remat_policy
from lora_jax.torch.backend import call_module, exchanged, to_torch
from lora_jax.torch.cache import CachedCall
from lora_jax.torch.structure import LayerPeriods

Arrays = Mapping[str, Any]  # of one layer, by the names within it
_ARRAY = object()  # an array's place in what a layer returns


class Recomputed(NamedTuple):
    """The part of each layer that the backward pass computes anew, and the place of activations.

    Attributes:
      remat: what is recomputed; see ``models.Decoder``.
      placement: places the activations between layers.
    """

    remat: bool | str = False
    placement: Placement = UNPLACED

    def __call__(self, body: Callable[..., Any], *, scans: bool) -> Callable[..., Any]:
        """Returns ``body(hidden, arrays)``, recomputed in the backward pass.

        Args:
          body: computes a layer.
          scans: whether it is the body of a scan. Elsewhere only a barrier keeps XLA from merging
            what is computed again with the forward pass.
        """
        if self.remat is False:
            return body

        def with_marked_input(hidden: jax.Array, arrays: Any) -> Any:
            return body(layer_input(hidden, self.remat), arrays)

        return jax.checkpoint(
            with_marked_input, policy=remat_policy(self.remat), prevent_cse=not scans
        )


def layer_lists(module: torch.nn.Module) -> list[str]:
    """Returns the names of the lists of two or more modules that lie in no other such list."""
    names: list[str] = []
    for name, submodule in module.named_modules():
        is_nested = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(submodule, torch.nn.ModuleList) and len(submodule) > 1 and not is_nested:
            names.append(name)
    return names


def to_jax(tree: Any) -> Any:
    """Returns outputs of torch code with JAX's arrays: named ones as a dictionary, less caches."""
    if isinstance(tree, Mapping):
        kinds = (Mapping, list, tuple, torch.Tensor)
        return {name: to_jax(value) for name, value in tree.items() if isinstance(value, kinds)}
    if isinstance(tree, list | tuple):
        return tuple(map(to_jax, tree))
    return tree.jax() if isinstance(tree, torch.Tensor) and hasattr(tree, "jax") else tree


@contextlib.contextmanager
def patched(layers: Sequence[torch.nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Runs ``forward(i, layer, *args, **kwargs)`` in the place of each layer that no other calls.

    While it runs, all layers are as they were.
    """
    originals = [(layer, "forward", layer.forward) for layer in layers]

    def run_forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with exchanged(originals):
            return forward(i, layer, *args, **kwargs)

    replacements = [
        (layer, "forward", functools.partial(run_forward, i, layer))
        for i, layer in enumerate(layers)
    ]
    with exchanged(replacements):
        yield


class _LayerCall:
    """One call of a layer, as a function of its parameters and the hidden states that it is given.

    Attributes:
      hidden: the hidden states: its first argument, or the one of that name.
      others: the leaves of its other arguments.
    """

    def __init__(self, layer: torch.nn.Module, args: Any, kwargs: Any):
        self._layer = layer
        named = kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        hidden = args[0] if args else named
        self.hidden: jax.Array = hidden.jax()
        self._arguments, self._argument_tree = torch_tree.tree_flatten((args, kwargs))
        self._hidden_index = next(i for i, x in enumerate(self._arguments) if x is hidden)
        self.others: list[Any] = [*self._arguments]
        del self.others[self._hidden_index]
        # The leaves of the output, `_ARRAY` for each array, and their tree: known after a call.
        self._output_leaves: list[Any] = []
        self._output_tree: Any = None

    def __call__(self, arrays: Arrays, hidden: jax.Array) -> list[jax.Array]:
        arguments = [*self._arguments]
        arguments[self._hidden_index] = to_torch(hidden)
        args, kwargs = torch_tree.tree_unflatten(arguments, self._argument_tree)
        out = call_module(self._layer, arrays, args, kwargs)
        leaves, self._output_tree = torch_tree.tree_flatten(out)
        self._output_leaves = [_ARRAY if isinstance(x, torch.Tensor) else x for x in leaves]
        return [to_jax(x) for x in leaves if isinstance(x, torch.Tensor)]

    def restore(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns the layer's output, with these arrays in it."""
        remaining = iter(arrays)
        leaves = [to_torch(next(remaining)) if x is _ARRAY else x for x in self._output_leaves]
        return torch_tree.tree_unflatten(leaves, self._output_tree)


class _ProbedCall(NamedTuple):
    """A call of a layer, as it is compared with the calls of other layers.

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
    """Returns the stack of the layers of a list whose programs are alike; None if they differ.

    Two layers are alike if they are of one class with the same settings, compute the same program
    of the same constants, and get the very same arguments but for the hidden states, which are
    what the layer before gives: modules that all take the same input are no layers.

    Args:
      name: the list's name.
      layers: its modules.
      arrays: the shapes of each one's parameters and buffers.
      run: runs the whole module.
    """
    calls: list[_ProbedCall] = []
    outputs: list[Any] = [None]  # those of all layers so far; None before the first one

    def record(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
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

    with patched(layers, record):
        run()
    n = len(layers)
    if [call.layer for call in calls] != list(range(n)):
        return None
    for start in range(min(n - 1, 4)):
        if not all(call.follows for call in calls[start + 1 :]):
            continue
        for period in range(1, (n - start) // 2 + 1):
            if (n - start) % period == 0 and _repeats(calls[start:], period):
                return LayerPeriods(name, start, period, (n - start) // period)
    return None


def _signature(
    index: int,
    layer: torch.nn.Module,
    call: _LayerCall,
    traced: Any,
    shapes: Sequence[jax.ShapeDtypeStruct],
) -> Any:
    """Returns a value that is equal for two layers that compute the same."""
    output_forms = [(x.shape, x.dtype) for x in shapes]
    if output_forms != [(call.hidden.shape, call.hidden.dtype)]:
        return (index,)  # its output is no input of another layer
    arguments = [id(x) if isinstance(x, torch.Tensor) else repr(x) for x in call.others]
    constants = [_mark(constant) for constant in traced.consts]
    return str(traced), constants, arguments, _settings(layer)


def _repeats(calls: Sequence[_ProbedCall], period: int) -> bool:
    """Returns True if each call computes the same as the call one period later."""
    pairs = zip(calls, calls[period:], strict=False)
    return all(call.signature == later.signature for call, later in pairs)


def _mark(constant: Any) -> Any:
    """Returns the contents of a constant of a program; of one that is traced, its identity."""
    if isinstance(constant, jax.core.Tracer):
        return id(constant)
    array = np.asarray(constant)
    return array.dtype, array.shape, array.tobytes()


_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "block_idx", "idx")
_PLAIN = (int, float, str, bool, type(None), tuple)


def _settings(layer: torch.nn.Module) -> list[Any]:
    """Returns the classes and the plain settings of a layer's modules, but for its number."""
    settings: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: repr(value)
            for key, value in vars(module).items()
            if key not in _INDEX_NAMES and isinstance(value, _PLAIN)
        }
        settings.append((name, type(module), sorted(plain.items())))
    return settings


@contextlib.contextmanager
def scanned(
    stack: LayerPeriods,
    layers: Sequence[torch.nn.Module],
    arrays: Sequence[Arrays],
    recomputed: Recomputed,
    cache: CachedCall | None = None,
) -> Iterator[None]:
    """Runs the layers of a stack as one scan, when the last one of its first turn is called.

    Args:
      stack: says which layers.
      layers: a layer of each kind.
      arrays: parameters and buffers of each kind, stacked on axis 0.
      recomputed: what the backward pass recomputes.
      cache: the tokens so far; None without a cache.
    """
    calls: list[_LayerCall] = []
    layer_indices = range(stack.start, stack.n_layers)
    with_entries = contextlib.nullcontext if cache is None else cache.turn

    def run_period(hidden: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        arrays_of_layers, entries = slices
        with with_entries(entries) as added_entries:
            for call, layer_arrays in zip(calls, arrays_of_layers, strict=True):
                (hidden,) = call(layer_arrays, hidden)
                hidden = recomputed.placement.constrain(hidden, "residual")
        return hidden, added_entries

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if i == 0:
            calls.clear()
        call = _LayerCall(layer, args, kwargs)
        calls.append(call)
        if i < stack.period - 1:  # the last layer of the period runs this one
            layer_shapes = {k: jax.eval_shape(lambda x: x[0], x) for k, x in arrays[i].items()}
            with with_entries({}):
                jax.eval_shape(call, layer_shapes, call.hidden)  # for the structure of its output
            return call.restore([call.hidden])
        body = recomputed(run_period, scans=True)
        entries = {} if cache is None else cache.entries_of(layer_indices)
        hidden, added_entries = jax.lax.scan(body, calls[0].hidden, (list(arrays), entries))
        if cache is not None:
            cache.add(added_entries, layer_indices)
        return call.restore([hidden])

    with patched(layers, forward):
        yield


@contextlib.contextmanager
def unrolled(
    layers: Sequence[torch.nn.Module], arrays: Sequence[Arrays], recomputed: Recomputed
) -> Iterator[None]:
    """Runs each layer by itself, recomputed in the backward pass."""

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _LayerCall(layer, args, kwargs)
        hidden = recomputed.placement.constrain(call.hidden, "residual")
        body = recomputed(lambda hidden, layer_arrays: call(layer_arrays, hidden), scans=False)
        return call.restore(body(hidden, arrays[i]))

    with patched(layers, forward):
        yield
