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

        def begun(hidden: jax.Array, arrays: Any) -> Any:
            return body(layer_input(hidden, self.remat), arrays)

        return jax.checkpoint(begun, policy=remat_policy(self.remat), prevent_cse=not scans)


def layer_lists(module: torch.nn.Module) -> list[str]:
    """Returns the names of the lists of two or more modules that lie in no other such list."""
    names: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(part, torch.nn.ModuleList) and len(part) > 1 and not inside:
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
    own = [(layer, "forward", layer.forward) for layer in layers]

    def called(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with exchanged(own):
            return forward(i, layer, *args, **kwargs)

    with exchanged(
        (layer, "forward", functools.partial(called, i, layer)) for i, layer in enumerate(layers)
    ):
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
        first = args[0] if args else named
        self.hidden: jax.Array = first.jax()
        self._given, self._form = torch_tree.tree_flatten((args, kwargs))
        at = self._at = next(i for i, x in enumerate(self._given) if x is first)
        self.others: list[Any] = self._given[:at] + self._given[at + 1 :]
        self._out: Any = None  # the leaves that it returns, `_ARRAY` for arrays, and their tree

    def __call__(self, arrays: Arrays, hidden: jax.Array) -> list[jax.Array]:
        given = [*self._given]
        given[self._at] = to_torch(hidden)
        args, kwargs = torch_tree.tree_unflatten(given, self._form)
        out = call_module(self._layer, arrays, args, kwargs)
        leaves, form = torch_tree.tree_flatten(out)
        self._out = [_ARRAY if isinstance(x, torch.Tensor) else x for x in leaves], form
        return [to_jax(x) for x in leaves if isinstance(x, torch.Tensor)]

    def restore(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns the layer's output, with these arrays in it."""
        (leaves, form), left = self._out, iter(arrays)
        leaves = [to_torch(next(left)) if x is _ARRAY else x for x in leaves]
        return torch_tree.tree_unflatten(leaves, form)


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
    calls: list[tuple[int, Any, bool, Any]] = []
    given: list[Any] = [None]  # by the layer before

    def record(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _LayerCall(layer, args, kwargs)
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(arrays[i], call.hidden)
        same = [(x.shape, x.dtype) for x in shapes] == [(call.hidden.shape, call.hidden.dtype)]
        told = [id(x) if isinstance(x, torch.Tensor) else repr(x) for x in call.others]
        constants = [_mark(constant) for constant in traced.consts]
        sign = (str(traced), constants, told, _settings(layer)) if same else (i,)
        alive = call, traced.consts  # what is compared by its id
        calls.append((i, sign, call.hidden is given[-1], alive))
        given.extend(jnp.zeros(s.shape, s.dtype) for s in shapes)
        return call.restore(given[-len(shapes) :])

    with patched(layers, record):
        run()
    n = len(layers)
    if [i for i, *_ in calls] != list(range(n)):
        return None
    _, signs, follows, _ = zip(*calls, strict=True)
    for start in range(min(n - 1, 4)):
        for period in range(1, (n - start) // 2 + 1):
            alike = all(signs[i] == signs[start + (i - start) % period] for i in range(start, n))
            if (n - start) % period == 0 and alike and all(follows[start + 1 :]):
                return LayerPeriods(name, start, period, (n - start) // period)
    return None


def _mark(constant: Any) -> Any:
    """Returns the contents of a constant of a program; of one that is traced, its identity."""
    if isinstance(constant, jax.core.Tracer):
        return id(constant)
    array = np.asarray(constant)
    return array.dtype, array.shape, array.tobytes()


_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx", "idx")
_PLAIN = (int, float, str, bool, type(None), tuple)


def _settings(layer: torch.nn.Module) -> list[Any]:
    """Returns the classes and the plain settings of a layer's modules, but for its number."""
    return [
        (
            name,
            type(part),
            sorted(
                (k, repr(v))
                for k, v in vars(part).items()
                if k not in _NUMBERS and isinstance(v, _PLAIN)
            ),
        )
        for name, part in layer.named_modules()
    ]


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
    numbers = range(stack.start, stack.n_layers)
    with_entries = contextlib.nullcontext if cache is None else cache.turn

    def called(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if i == 0:
            calls.clear()
        calls.append(_LayerCall(layer, args, kwargs))
        if i < stack.period - 1:
            own = {k: jax.eval_shape(lambda x: x[0], x) for k, x in arrays[i].items()}
            with with_entries({}):  # for the structure of its output
                jax.eval_shape(calls[i], own, calls[i].hidden)
            return calls[i].restore([calls[i].hidden])

        def turn(hidden: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
            with with_entries(slices[1]) as new:
                for call, own in zip(calls, slices[0], strict=True):
                    (hidden,) = call(own, hidden)
                    hidden = recomputed.placement.constrain(hidden, "residual")
            return hidden, new

        body = recomputed(turn, scans=True)
        entries = {} if cache is None else cache.entries_of(numbers)
        hidden, new = jax.lax.scan(body, calls[0].hidden, (list(arrays), entries))
        if cache is not None:
            cache.add(new, numbers)
        return calls[i].restore([hidden])

    with patched(layers, called):
        yield


@contextlib.contextmanager
def unrolled(
    layers: Sequence[torch.nn.Module], arrays: Sequence[Arrays], recomputed: Recomputed
) -> Iterator[None]:
    """Runs each layer by itself, recomputed in the backward pass."""

    def called(i: int, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _LayerCall(layer, args, kwargs)
        hidden = recomputed.placement.constrain(call.hidden, "residual")
        body = recomputed(lambda hidden, own: call(own, hidden), scans=False)
        return call.restore(body(hidden, arrays[i]))

    with patched(layers, called):
        yield
