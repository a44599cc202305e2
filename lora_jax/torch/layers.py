"""Finds layers of a torch module that run the same program, and runs them as one scan."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

    def place(self, states: Sequence[jax.Array]) -> list[jax.Array]:
        """Shards hidden states, [batch, seq, width]; other arrays stay as they are."""
        return [self.placement.constrain(x, "residual") if x.ndim == 3 else x for x in states]

    def __call__(self, body: Callable[..., Any], *, scans: bool) -> Callable[..., Any]:
        """Returns ``body(inputs, arrays)``, recomputed in the backward pass.

        Args:
          body: computes a layer from its inputs, a list of arrays.
          scans: whether `body` is the body of a scan. Elsewhere a barrier keeps XLA from merging
            the recomputation with the forward pass.
        """
        if self.remat is False:
            return body

        def with_marked_inputs(inputs: Sequence[jax.Array], arrays: Any) -> Any:
            return body([name_layer_input(x, self.remat) for x in inputs], arrays)

        return jax.checkpoint(
            with_marked_inputs, policy=remat_policy(self.remat), prevent_cse=not scans
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


class LayerCall:
    """One call of a layer, as a function of its parameters and of some of its arguments.

    Attributes:
      arguments: the leaves of all arguments.
      carried: the indices of the leaves that are inputs of this function.
      inputs: these leaves, as JAX's arrays.
    """

    def __init__(self, layer: torch.nn.Module, args: Any, kwargs: Any, carried: Sequence[int]):
        self._layer = layer
        self.arguments, self._argument_tree = torch_tree.tree_flatten((args, kwargs))
        self.carried = carried
        self.inputs: list[jax.Array] = [self.arguments[i].jax() for i in carried]
        # The output's leaves, with `_ARRAY_MARK` for each array, and their tree. A call sets both.
        self._output_leaves: list[Any] = []
        self._output_tree: Any = None

    def __call__(self, arrays: Arrays, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        arguments = [*self.arguments]
        for i, array in zip(self.carried, inputs, strict=True):
            arguments[i] = to_torch(array)
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


def _traced_arguments(args: Any, kwargs: Any) -> list[int]:
    """Returns the indices of the leaves that a trace does not know, among all arguments."""
    leaves = torch_tree.tree_leaves((args, kwargs))
    return [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and isinstance(to_jax(leaf), jax.core.Tracer)
    ]


def _hidden_argument(args: Any, kwargs: Any) -> list[int]:
    """Returns a list with the index of the hidden states among the leaves of all arguments.

    The hidden states are the argument ``hidden_states``, or else the first array. The list is empty
    if no argument is an array.
    """
    leaves = torch_tree.tree_leaves((args, kwargs))
    hidden = None if args else kwargs.get("hidden_states")
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and (hidden is None or leaf is hidden):
            return [i]
    return []


class _ProbedCall(NamedTuple):
    """A call of a layer in a trace of the module, for comparison with other layers' calls.

    Attributes:
      layer: the index of the layer in its list.
      signature: equal for two calls that compute the same program.
      arguments: the identity or the text of each argument.
      carried: tuple of argument indices. These arguments are the outputs of the previous layer, in
        the order of the outputs. None if an output is not passed on, or is passed on twice.
      alive: the objects whose ids are in the signature and the arguments.
    """

    layer: int
    signature: Any
    arguments: Sequence[Any]
    carried: tuple[int, ...] | None
    alive: Any


def find_stacks_of_list(
    name: str,
    layers: Sequence[torch.nn.Module],
    arrays: Sequence[Arrays],
    run: Callable[[], Any],
    *,
    to_end: bool,
) -> list[LayerPeriods]:
    """Finds the layers of a list that run the same programs.

    Two layers are alike if they have the same class and the same settings, compute the same program
    with the same constants, and get the same arguments. Only those arguments differ that are the
    outputs of the layer before. Modules that all get the same input are no layers.

    Args:
      name: the list's name.
      layers: the modules of the list.
      arrays: the shapes of the parameters and buffers of each module.
      run: runs the whole module.
      to_end: whether a stack must reach the end of the list, and begin among its first four layers.
    """
    calls: list[_ProbedCall] = []
    outputs: list[jax.Array] = []  # of the layer before

    def record(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Traces a layer's call, and records its signature."""
        call = LayerCall(layer, args, kwargs, _traced_arguments(args, kwargs))
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(arrays[i], call.inputs)
        calls.append(
            _ProbedCall(
                layer=i,
                signature=_signature(layer, traced),
                arguments=[
                    id(x) if isinstance(x, torch.Tensor) else repr(x) for x in call.arguments
                ],
                carried=_carried_arguments(call, outputs),
                alive=(call, traced.consts),
            )
        )
        outputs[:] = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        return call.restore(outputs)

    with patch_forwards(layers, record):
        run()
    n_layers = len(layers)
    if [call.layer for call in calls] != list(range(n_layers)):
        return []  # the module calls its layers in another order, or not once each
    stacks: list[LayerPeriods] = []
    start = 0
    while start < n_layers - 1 and not (to_end and (stacks or start > 3)):
        stack = _longest_stack(name, start, calls)
        if stack is None or (to_end and stack.end < n_layers):
            start += 1
        else:
            stacks.append(stack)
            start = stack.end
    return stacks


def _carried_arguments(call: LayerCall, outputs: Sequence[jax.Array]) -> tuple[int, ...] | None:
    """Returns the index of the argument that is each output; None unless each is one argument."""
    carried: list[int] = []
    for output in outputs:
        indices = [i for i, x in zip(call.carried, call.inputs, strict=True) if x is output]
        if len(indices) != 1:
            return None
        carried += indices
    return tuple(carried)


def _longest_stack(name: str, start: int, calls: Sequence[_ProbedCall]) -> LayerPeriods | None:
    """Returns the stack of the most layers from a layer on; None if no layers repeat."""
    longest: LayerPeriods | None = None
    for period in range(1, (len(calls) - start) // 2 + 1):
        carried = _carried_in_period(start, period, calls)
        if carried is None:
            continue
        n_repeated = 0  # layers that repeat the layer one period before
        for before, call in zip(calls[start:], calls[start + period :], strict=False):
            kind = (call.layer - start) % period
            if call.carried != carried[kind] or not _is_repeated(before, call):
                break
            n_repeated += 1
        stack = LayerPeriods(name, start, period, 1 + n_repeated // period, carried)
        if stack.repeats > 1 and (longest is None or stack.end > longest.end):
            longest = stack
    return longest


def _carried_in_period(
    start: int, period: int, calls: Sequence[_ProbedCall]
) -> tuple[tuple[int, ...], ...] | None:
    """Returns the carried arguments of each kind; None if a layer does not follow the one before.

    The first layer gets its arguments from other code, so those of its repetition count.
    """
    carried: list[tuple[int, ...]] = []
    for kind in range(period):
        indices = calls[start + period + kind].carried
        follows = kind == 0 or calls[start + kind].carried == indices
        if not indices or not follows:
            return None
        carried.append(indices)
    return tuple(carried)


def _is_repeated(call: _ProbedCall, later: _ProbedCall) -> bool:
    """Returns True if a later call computes the same, from the same arguments but those carried."""
    carried = later.carried or ()
    pairs = zip(call.arguments, later.arguments, strict=False)
    differing = {i for i, (argument, other) in enumerate(pairs) if argument != other}
    has_equal_programs = call.signature == later.signature
    has_equal_count = len(call.arguments) == len(later.arguments)
    return has_equal_programs and has_equal_count and differing <= set(carried)


def _signature(layer: torch.nn.Module, traced: Any) -> Any:
    """Returns a key that is equal for layers that compute the same program."""
    constants = [_contents_of_constant(constant) for constant in traced.consts]
    return str(traced), constants, _settings_of_layer(layer)


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
    transposed: Sequence[Collection[str]],
    recomputed: Recomputation,
    cache: CachedCall | None = None,
) -> Iterator[None]:
    """Runs the layers of a stack as one scan, in the call of the last layer of its period.

    Args:
      stack: the layers that run.
      layers: a layer of each kind.
      arrays: parameters and buffers of each kind, stacked on axis 0.
      transposed: the names of each kind's arrays whose last two axes torch has in the other order.
      recomputed: what the backward pass recomputes.
      cache: the tokens so far; None without a cache.
    """
    calls: list[LayerCall] = []
    with_entries = contextlib.nullcontext if cache is None else cache.use_entries

    def reorder_as_torch(i: int, layer_arrays: Arrays) -> Arrays:
        """Returns the arrays of one layer with the order of axes that torch has."""
        return {
            name: x.swapaxes(-1, -2) if name in transposed[i] else x
            for name, x in layer_arrays.items()
        }

    def run_period(carry: Sequence[jax.Array], slices: Any) -> tuple[list[jax.Array], Any]:
        """Runs one period of layers; the body of the scan."""
        arrays_of_layers, entries = slices
        outputs = [*carry]
        with with_entries(entries) as added_entries:
            for i, call in enumerate(calls):
                layer_arrays = reorder_as_torch(i, arrays_of_layers[i])
                outputs = recomputed.place(call(layer_arrays, outputs))
        return outputs, added_entries

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Collects the calls of a period, and runs the scan at the last one."""
        if i == 0:
            calls.clear()
        call = LayerCall(layer, args, kwargs, stack.carried[i])
        calls.append(call)
        if i < stack.period - 1:
            # The scan will run this layer. A trace only finds the structure of its output.
            layer_shapes = jax.eval_shape(
                lambda stacked: reorder_as_torch(i, {name: x[0] for name, x in stacked.items()}),
                dict(arrays[i]),
            )
            with with_entries({}):
                shapes = jax.eval_shape(call, layer_shapes, call.inputs)
            return call.restore([jnp.zeros(shape.shape, shape.dtype) for shape in shapes])
        # The last layer of the period runs all layers of the stack.
        body = recomputed(run_period, scans=True)
        entries = {} if cache is None else cache.entries_of(stack.first_period)
        outputs, added_entries = jax.lax.scan(body, calls[0].inputs, (list(arrays), entries))
        if cache is not None:
            cache.add(added_entries, stack.first_period)
        return call.restore(outputs)

    with patch_forwards(layers, forward):
        yield


@contextlib.contextmanager
def run_one_by_one(
    layers: Sequence[torch.nn.Module], arrays: Sequence[Arrays], recomputed: Recomputation
) -> Iterator[None]:
    """Runs each layer separately, recomputed in the backward pass."""

    def forward(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = LayerCall(layer, args, kwargs, _hidden_argument(args, kwargs))
        body = recomputed(lambda inputs, layer_arrays: call(layer_arrays, inputs), scans=False)
        return call.restore(body(recomputed.place(call.inputs), arrays[i]))

    with patch_forwards(layers, forward):
        yield
