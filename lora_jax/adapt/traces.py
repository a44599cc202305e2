"""Traces of a function: its jaxpr, with its result and its writes beside traced arrays.

In an eager call, all arrays become inputs of the jaxpr, not weights alone, and later calls that
differ in nothing but the elements of arrays use it again.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapt import eqns
from lora_jax.adapt.eqns import EagerSteps
from lora_jax.adapt.fn_state import FunctionState, UnknownStateError
from lora_jax.adapt.nnx_writes import Argument, Output, Snapshot, Writes, changes
from lora_jax.adapt.rules.flow import sources_among
from lora_jax.core.aliases import aliased, aliases, resolved
from lora_jax.core.opaque import unsealed
from lora_jax.core.types import Forward, Leaf, Tree, Value

_NEEDS_ELEMENTS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_TRACED = object()  # in the place of a traced array
_MOST_TRACES = 256  # of one function
# Each trace holds the arrays that the function closed over. Beyond a few traces, these may take so
# much memory besides those that the newest trace holds as well.
_FEW_TRACES, _MOST_BYTES = 8, 1 << 28


@dataclasses.dataclass(frozen=True)
class FlatCall:
    """A function with its arguments, flattened.

    Attributes:
      fn: the function.
      leaves, treedef: leaves and structure of (args, kwargs).
      weights: by place among the leaves, the array that stands for an adapted weight.
      others: likewise, arrays that are inputs of the jaxpr beside the weights in any case.
    """

    fn: Forward
    leaves: Sequence[Leaf]
    treedef: jax.tree_util.PyTreeDef
    weights: Mapping[int, Leaf]
    others: Mapping[int, Leaf] = field(default_factory=dict)


@dataclasses.dataclass
class TraceOutputs:
    """The result of a function and its writes, without the traced arrays that leave the jaxpr.

    Attributes:
      leaves, treedef: leaves and structure of (result, writes); an `Output` for each traced array.
      assigned: what the function puts in the place of leaves of its arguments; see `changes`.
    """

    leaves: list[Leaf]
    treedef: jax.tree_util.PyTreeDef
    assigned: dict[int, Value]

    @functools.cached_property
    def origins(self) -> dict[int, int | None]:
        """Returns the outputs of the jaxpr that are needed, each with the argument that it is."""
        return {leaf.number: leaf.origin for leaf in self.leaves if isinstance(leaf, Output)}

    def filled(self, arrays: Sequence[Value]) -> tuple[Tree, Writes]:
        """Returns the function's result and its writes, for the outputs of the jaxpr."""
        result, writes = self.treedef.unflatten(
            arrays[leaf.number] if isinstance(leaf, Output) else leaf for leaf in self.leaves
        )
        return resolved(result) if self._has_aliases else result, writes

    @functools.cached_property
    def _has_aliases(self) -> bool:
        result, _ = self.treedef.unflatten(self.leaves)
        return bool(aliases(result))


@dataclasses.dataclass
class Trace:
    """A jaxpr whose inputs are the leaves at `places`.

    Attributes:
      steps: its equations, compiled for eager calls.
    """

    jaxpr: eqns.AnyJaxpr
    places: tuple[int, ...]
    outputs: TraceOutputs
    steps: EagerSteps = field(default_factory=EagerSteps)


def trace(call: FlatCall) -> Trace:
    """Returns the trace of a call with its weights and `others` as inputs, all else closed over.

    Raises whatever the function raises while it is traced.
    """
    try:
        return _traced(call, {**call.others, **call.weights})
    except _NEEDS_ELEMENTS as error:
        error.add_note(
            "lora_jax.adapt traces the function, as jax.jit does: Python code in it cannot depend "
            "on the elements of arrays that it computes. Use jax.lax.cond or jnp.where, compute "
            "them before and pass them in, or run the function on lora_jax.merge(params)."
        )
        raise


def _traced(call: FlatCall, inputs: Mapping[int, Value]) -> Trace:
    """Returns the trace of a call.

    Args:
      call: the call.
      inputs: by place among its leaves, the arrays that are inputs of the jaxpr.
    """
    made: list[tuple[list[Leaf], jax.tree_util.PyTreeDef]] = []

    def called(args: Tree, kwargs: Tree) -> list[Leaf]:
        args, kwargs = resolved(unsealed((args, kwargs)))
        before = Snapshot.take((args, kwargs))
        result = aliased(call.fn(*args, **kwargs))
        leaves, treedef = jax.tree.flatten((result, before.writes()))
        made.append(([_TRACED if isinstance(x, jax.core.Tracer) else x for x in leaves], treedef))
        return leaves

    fn = eqns.trace_with(called, call.leaves, call.treedef, list(inputs))
    jaxpr = jax.make_jaxpr(fn)(*inputs.values())
    return Trace(jaxpr, tuple(inputs), _outputs(*made.pop(), _origins(jaxpr, inputs, call), call))


def _origins(jaxpr: eqns.AnyJaxpr, inputs: Iterable[int], call: FlatCall) -> list[int | None]:
    """Returns, for each output of a call's jaxpr, the place of the leaf that it is."""
    inner, consts = eqns.opened(jaxpr)
    of_leaf = {id(leaf): place for place, leaf in enumerate(call.leaves)}
    constants = zip(inner.constvars, consts, strict=True)
    places: dict[eqns.Atom, int] = {
        var: of_leaf[id(const)] for var, const in constants if id(const) in of_leaf
    }
    places |= zip(inner.invars, inputs, strict=True)
    return list(sources_among(jaxpr, places))


def _outputs(
    leaves: list[Leaf], treedef: jax.tree_util.PyTreeDef, origins: list[int | None], call: FlatCall
) -> TraceOutputs:
    """Returns the outputs of a function, without writes that change nothing.

    Args:
      leaves, treedef: leaves and structure of (result, writes); `_TRACED` for each output of the
        jaxpr.
      origins: see `_origins`.
      call: the call that was traced.
    """
    outputs = (Output(number, origin) for number, origin in enumerate(origins))
    leaves = [next(outputs) if leaf is _TRACED else leaf for leaf in leaves]
    result, writes = treedef.unflatten(leaves)
    assigned: dict[int, Leaf] = {}
    if writes:
        arguments = call.treedef.unflatten(map(Argument, range(len(call.leaves))))
        writes, assigned = changes(arguments, writes)
        leaves, treedef = jax.tree.flatten((result, writes))
    return TraceOutputs(leaves, treedef, assigned)


class EagerTraces:
    """The traces of one function that eager calls can use again, from any thread."""

    def __init__(self) -> None:
        # By all that a trace depends on, the latest last.
        self._known: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._is_off = False

    def __hash__(self) -> int:
        """Returns the identity: to `FunctionState`, what is kept here changes nothing."""
        return id(self)

    def __reduce__(self) -> tuple[type["EagerTraces"], tuple[()]]:
        """Pickles no trace: a copy of the function makes its own."""
        return EagerTraces, ()

    def find(self, call: FlatCall) -> Trace | None:
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
            state = FunctionState(call.fn, others)
            key = (call.treedef, types, state, _settings())
            with self._lock:
                entry = self._known.setdefault(key, _Entry(state))
                self._known.move_to_end(key)
        except RuntimeError:  # another thread changes what the function reads
            return None
        except (UnknownStateError, TypeError, ValueError):
            # The tree's static data may have no hash (TypeError), or compare by element.
            self._is_off = True
            return None
        with entry.lock:  # other threads wait for the trace rather than make their own
            if not entry.is_made:
                try:
                    entry.trace = _traced(call, inputs)
                except Exception:  # with the elements known it works, or says why it does not
                    entry.trace = None
                entry.is_made = True
                self._forget()
        return entry.trace

    def _forget(self) -> None:
        """Drops the traces that were not used for longest, where there are too many."""
        with self._lock:
            seen: set[int] = set()
            size = most = 0
            for n, (key, entry) in enumerate(list(reversed(self._known.items()))):
                held = entry.held()
                size += sum(nbytes for array, nbytes in held.items() if array not in seen)
                seen |= held.keys()
                most = most if n else size + _MOST_BYTES
                if n >= _MOST_TRACES or (n >= _FEW_TRACES and size > most):
                    del self._known[key]


@dataclasses.dataclass(eq=False)
class _Entry:
    """A trace that is made once: None where it depends on the elements of an array.

    Attributes:
      state: the state that the function reads, as it was at that trace.
    """

    state: FunctionState
    trace: Trace | None = None
    is_made: bool = False
    lock: Any = field(default_factory=threading.RLock)

    def held(self) -> dict[int, int]:
        """Returns the number of bytes of each array that is held, by its identity."""
        consts = () if self.trace is None else eqns.opened(self.trace.jaxpr)[1]
        return {id(a): getattr(a, "nbytes", 0) for a in (*self.state.arrays(), *consts)}


@jax.jit
def _nothing() -> None:
    """Returns nothing. JAX traces it once for each combination of its settings."""


def _settings() -> Hashable:
    """Returns a value that changes with any of JAX's settings: promotion, precision, a mesh, …"""
    settings: Hashable = _nothing.trace().jaxpr
    return settings


def _type_of(value: Value) -> Hashable:
    return value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)


def _is_array(leaf: Leaf) -> bool:
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, np.number)
    )
