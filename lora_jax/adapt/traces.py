"""Traces of a function: its jaxpr, with its result and its writes beside traced arrays.

In an eager call, all arrays become inputs of the jaxpr, not weights alone, and later calls that
differ in nothing but the elements of arrays use it again.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapt import eqns
from lora_jax.adapt.fn_state import State, UnknownStateError
from lora_jax.adapt.nnx_writes import Snapshot, Writes
from lora_jax.adapt.steps import Steps

_MOST_TRACES = 8  # of one function; each holds the arrays that it closes over


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with its arguments, flattened.

    Attributes:
      fn: the function.
      leaves, treedef: of (args, kwargs).
      weights: by place among the leaves, the array that stands for an adapted weight.
      others: likewise, arrays that are inputs of the jaxpr beside the weights in any case.
    """

    fn: Callable[..., Any]
    leaves: Sequence[Any]
    treedef: Any
    weights: Mapping[int, Any]
    others: Mapping[int, Any] = field(default_factory=dict)


@dataclasses.dataclass
class Outputs:
    """The result of a function and its writes, without the traced arrays that leave the jaxpr."""

    leaves: list[Any]  # None for each that is traced
    is_traced: list[bool]
    treedef: Any

    @functools.cached_property
    def writes(self) -> Writes:
        """Returns what the function writes, traced arrays left out."""
        return self.treedef.unflatten(self.leaves)[1]

    def filled(self, arrays: Sequence[Any]) -> tuple[Any, Writes]:
        """Returns the function's result and its writes, for the outputs of the jaxpr."""
        remaining = iter(arrays)
        return self.treedef.unflatten(
            next(remaining) if traced else leaf
            for leaf, traced in zip(self.leaves, self.is_traced, strict=True)
        )


@dataclasses.dataclass
class Trace:
    """A jaxpr whose inputs are the leaves at `places`.

    Attributes:
      steps: its equations, compiled for eager calls.
    """

    jaxpr: eqns.AnyJaxpr
    places: tuple[int, ...]
    outputs: Outputs
    steps: Steps = field(default_factory=Steps)


def trace(call: Call) -> Trace:
    """Returns the trace of a call with its weights and `others` as inputs, all else closed over.

    Raises whatever the function raises while it is traced.
    """
    try:
        return _traced(call, {**call.others, **call.weights})
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(
            "lora_jax.adapt traces the function, as jax.jit does: Python code in it cannot depend "
            "on the elements of arrays that it computes. Use jax.lax.cond or jnp.where, compute "
            "them before and pass them in, or run the function on lora_jax.merge(params)."
        )
        raise


def _traced(call: Call, inputs: Mapping[int, Any]) -> Trace:
    """Returns the trace of a call.

    Args:
      call: the call.
      inputs: by place among its leaves, the arrays that are inputs of the jaxpr.
    """
    made: list[Outputs] = []

    def called(args: Any, kwargs: Any) -> list[Any]:
        before = Snapshot.of((args, kwargs))
        result = call.fn(*args, **kwargs)
        leaves, treedef = jax.tree.flatten((result, before.writes()))
        is_traced = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
        pairs = list(zip(leaves, is_traced, strict=True))
        made.append(Outputs([None if t else leaf for leaf, t in pairs], is_traced, treedef))
        return leaves

    fn = eqns.trace_with(called, call.leaves, call.treedef, list(inputs))
    jaxpr = jax.make_jaxpr(fn)(*inputs.values())
    return Trace(jaxpr, tuple(inputs), made.pop())


class EagerTraces:
    """The traces of one function that eager calls can use again."""

    def __init__(self) -> None:
        # By all that a trace depends on; None where it depends on the elements of an array.
        self._known: collections.OrderedDict[Hashable, Trace | None] = collections.OrderedDict()
        self._is_off = False

    def find(self, call: Call) -> Trace | None:
        """Returns the trace of a call, with all of its arrays as inputs, or None.

        None where the function's state may change unseen, or where the function needs the elements
        of an array while it is traced.
        """
        if self._is_off:
            return None
        arrays = {place: leaf for place, leaf in enumerate(call.leaves) if _is_array(leaf)}
        inputs = {**arrays, **call.weights}
        others = [leaf for place, leaf in enumerate(call.leaves) if place not in inputs]
        types = tuple((place, _type_of(value)) for place, value in inputs.items())
        try:
            key = (call.treedef, types, State(call.fn, others), _settings())
            is_known = key in self._known
        except (UnknownStateError, TypeError, ValueError):
            # The tree's static data may have no hash (TypeError), or compare by element.
            self._is_off = True
            return None
        if not is_known:
            try:
                self._known[key] = _traced(call, inputs)
            except Exception:  # with the elements known it works, or says why it does not
                self._known[key] = None
            if len(self._known) > _MOST_TRACES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


@jax.jit
def _nothing() -> None:
    """Returns nothing. JAX traces it once for each combination of its settings."""


def _settings() -> Hashable:
    """Returns a value that changes with any of JAX's settings: promotion, precision, a mesh, …"""
    return _nothing.trace().jaxpr


def _type_of(value: Any) -> Hashable:
    return value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, np.number)
    )
