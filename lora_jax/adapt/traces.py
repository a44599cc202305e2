"""Traces a function: its jaxpr, and the parts of its result and its writes that are not traced.

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
from lora_jax.adapt.nnx_writes import Argument, Output, Snapshot, Writes, effective_writes
from lora_jax.adapt.rules.flow import Sources, sources_among_variables
from lora_jax.core.aliases import alias_repeated_objects, aliases, resolve_aliases
from lora_jax.core.opaque import unwrap_opaque_leaves
from lora_jax.core.types import Forward, Leaf, Tree, Value

_NEEDS_ELEMENTS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_TRACED_ARRAY = object()  # in the place of a traced array
_MAX_TRACES = 256  # of one function
# Each trace holds the arrays that the function closed over. Beyond eight traces, older traces are
# dropped if their arrays take more memory than this, besides the arrays of the newest trace.
_MAX_TRACES_OF_ANY_SIZE, _MAX_OLDER_BYTES = 8, 1 << 28


@dataclasses.dataclass(frozen=True)
class FlatCall:
    """A function with its flattened arguments.

    Attributes:
      fn: the function.
      leaves, treedef: leaves and structure of (args, kwargs).
      weights: by the index of a leaf, the array that stands for an adapted weight.
      others: likewise, arrays that are inputs of the jaxpr beside the weights in any case.
    """

    fn: Forward
    leaves: Sequence[Leaf]
    treedef: jax.tree_util.PyTreeDef
    weights: Mapping[int, Leaf]
    others: Mapping[int, Leaf] = field(default_factory=dict)


@dataclasses.dataclass
class TraceOutputs:
    """The result and the writes of a function, with placeholders for traced arrays.

    Attributes:
      leaves, treedef: leaves and structure of (result, writes); an `Output` for each traced array.
      assigned: what the function puts in the place of leaves of its arguments; see `changes`.
    """

    leaves: list[Leaf]
    treedef: jax.tree_util.PyTreeDef
    assigned: dict[int, Value]

    @functools.cached_property
    def origins(self) -> dict[int, int | None]:
        """Returns the index of the argument that each needed output equals, or None."""
        return {leaf.number: leaf.origin for leaf in self.leaves if isinstance(leaf, Output)}

    def filled(self, arrays: Sequence[Value]) -> tuple[Tree, Writes]:
        """Returns the result and the writes, with arrays in place of the placeholders."""
        leaves = [arrays[leaf.number] if isinstance(leaf, Output) else leaf for leaf in self.leaves]
        result, writes = self.treedef.unflatten(leaves)
        return resolve_aliases(result) if self._has_aliases else result, writes

    @functools.cached_property
    def _has_aliases(self) -> bool:
        result, _ = self.treedef.unflatten(self.leaves)
        return bool(aliases(result))


@dataclasses.dataclass
class Trace:
    """A jaxpr of a function, and the leaves that its inputs and outputs stand for.

    Attributes:
      jaxpr: the jaxpr.
      leaf_indices: the leaf of the arguments that each of its inputs is.
      outputs: what the function returns and writes.
      steps: compiled equations of the jaxpr, for eager calls.
      is_reported: True if a call has made all reports of this trace, those too that caches kept
        from being made; see `lora_jax.adapt.reports`.
    """

    jaxpr: eqns.AnyJaxpr
    leaf_indices: tuple[int, ...]
    outputs: TraceOutputs
    steps: EagerSteps = field(default_factory=EagerSteps)
    is_reported: bool = False


def trace(call: FlatCall) -> Trace:
    """Returns the trace of a call; weights and `others` are inputs, and the rest is closed over.

    Raises whatever the function raises while it is traced.
    """
    try:
        return _trace_call(call, {**call.others, **call.weights})
    except _NEEDS_ELEMENTS as error:
        error.add_note(
            "lora_jax.adapt traces the function, as jax.jit does. Python code in the function "
            "cannot depend on the elements of arrays that the function computes. Use jax.lax.cond "
            "or jnp.where. Or compute these elements before the call and pass them as arguments, "
            "or call the function with lora_jax.merge(params)."
        )
        raise


def _trace_call(call: FlatCall, inputs: Mapping[int, Value]) -> Trace:
    """Traces a call with these leaves as inputs.

    Args:
      call: the call.
      inputs: by the index of a leaf, the arrays that are inputs of the jaxpr.
    """
    outputs: list[TraceOutputs] = []  # of the one call

    def call_and_record(args: Tree, kwargs: Tree) -> list[Leaf]:
        """Returns the traced arrays, and records the rest of result and writes."""
        args, kwargs = resolve_aliases(unwrap_opaque_leaves((args, kwargs)))
        snapshot = Snapshot.take((args, kwargs))
        result = alias_repeated_objects(call.fn(*args, **kwargs))
        leaves, treedef = jax.tree.flatten((result, snapshot.writes()))
        leaves_without_arrays = [
            _TRACED_ARRAY if isinstance(leaf, jax.core.Tracer) else leaf for leaf in leaves
        ]
        outputs.append(TraceOutputs(leaves_without_arrays, treedef, {}))
        return leaves

    fn_of_inputs = eqns.function_of_inputs(call_and_record, call.leaves, call.treedef, list(inputs))
    jaxpr = jax.make_jaxpr(fn_of_inputs)(*inputs.values())
    origins = _leaf_of_each_output(jaxpr, inputs, call)
    return Trace(jaxpr, tuple(inputs), _without_idle_writes(outputs.pop(), origins, call))


def _leaf_of_each_output(
    jaxpr: eqns.AnyJaxpr, input_indices: Iterable[int], call: FlatCall
) -> Sources:
    """Returns the index of the argument leaf that each output equals, or None.

    Args:
      jaxpr: the jaxpr.
      input_indices: the index of the leaf that each of its inputs is.
      call: the call.
    """
    inner, consts = eqns.jaxpr_and_consts(jaxpr)
    index_of_leaf = {id(leaf): index for index, leaf in enumerate(call.leaves)}
    index_of_variable: dict[eqns.Atom, int] = {}
    for variable, const in zip(inner.constvars, consts, strict=True):
        if id(const) in index_of_leaf:
            index_of_variable[variable] = index_of_leaf[id(const)]
    index_of_variable |= zip(inner.invars, input_indices, strict=True)
    return sources_among_variables(jaxpr, index_of_variable)


def _without_idle_writes(outputs: TraceOutputs, origins: Sources, call: FlatCall) -> TraceOutputs:
    """Returns the outputs of a function without writes that change nothing.

    Args:
      outputs: result and writes of the function, with `_TRACED_ARRAY` for each output of the jaxpr.
      origins: see `_leaf_of_each_output`.
      call: the call that was traced.
    """
    leaves: list[Leaf] = []
    n_arrays = 0
    for leaf in outputs.leaves:
        if leaf is _TRACED_ARRAY:
            leaf = Output(n_arrays, origins[n_arrays])
            n_arrays += 1
        leaves.append(leaf)
    result, writes = outputs.treedef.unflatten(leaves)
    if not writes:
        return TraceOutputs(leaves, outputs.treedef, {})
    # Compare the writes with the arguments, each leaf of which is replaced by its index.
    arguments = call.treedef.unflatten(Argument(index) for index in range(len(call.leaves)))
    writes, assigned = effective_writes(arguments, writes)
    leaves, treedef = jax.tree.flatten((result, writes))
    return TraceOutputs(leaves, treedef, assigned)


class EagerTraces:
    """A cache of traces of one function for eager calls, shared by threads."""

    def __init__(self) -> None:
        # The key holds all that a trace depends on. The latest entry is the last.
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._is_off = False

    def __hash__(self) -> int:
        """Returns the id, so that new traces do not change a `FunctionState`."""
        return id(self)

    def __reduce__(self) -> tuple[type["EagerTraces"], tuple[()]]:
        """Pickles no traces: an unpickled copy of the function makes its own."""
        return EagerTraces, ()

    def find(self, call: FlatCall) -> Trace | None:
        """Returns the trace of a call, with all of its arrays as inputs, or None.

        The result is None if the function's state may change unseen, or if the function needs the
        elements of an array while it is traced.
        """
        if self._is_off:
            return None
        # The key of the trace: types of the arrays, all other leaves, and what the function reads.
        arrays = {index: leaf for index, leaf in enumerate(call.leaves) if _is_numeric_array(leaf)}
        inputs = {**arrays, **call.weights}
        static_leaves = [leaf for index, leaf in enumerate(call.leaves) if index not in inputs]
        types = tuple((index, _type_of_array(value)) for index, value in inputs.items())
        try:
            state = FunctionState(call.fn, static_leaves)
            entry = self._latest_entry((call.treedef, types, state, _jax_settings()), state)
        except RuntimeError:  # another thread changes what the function reads
            return None
        except (UnknownStateError, TypeError, ValueError):
            # The tree's static data may have no hash (TypeError), or compare by element.
            self._is_off = True
            return None
        with entry.lock:  # other threads wait for the trace rather than make their own
            if not entry.is_made:
                try:
                    entry.trace = _trace_call(call, inputs)
                except Exception:  # the call without a trace succeeds, or raises a clearer error
                    entry.trace = None
                entry.is_made = True
                self._drop_oldest_traces()
        return entry.trace

    def _latest_entry(self, key: Hashable, state: FunctionState) -> "_Entry":
        """Returns the entry of a key, created if missing, as the most recent one."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(state))
            self._entries.move_to_end(key)
            return entry

    def _drop_oldest_traces(self) -> None:
        """Drops the least recently used traces if there are too many, or too large ones."""
        with self._lock:
            counted_arrays: set[int] = set()  # by identity
            n_bytes = 0
            max_bytes = 0
            # From the newest trace to the oldest, add up the bytes of all different arrays.
            for n_newer, (key, entry) in enumerate(list(reversed(self._entries.items()))):
                bytes_of_array = entry.bytes_of_array()
                for array, array_bytes in bytes_of_array.items():
                    if array not in counted_arrays:
                        n_bytes += array_bytes
                counted_arrays |= bytes_of_array.keys()
                is_newest = n_newer == 0
                if is_newest:
                    max_bytes = n_bytes + _MAX_OLDER_BYTES
                is_too_large = n_newer >= _MAX_TRACES_OF_ANY_SIZE and n_bytes > max_bytes
                if n_newer >= _MAX_TRACES or is_too_large:
                    del self._entries[key]


@dataclasses.dataclass(eq=False)
class _Entry:
    """A trace that is made once; None if the function depends on the elements of an array.

    Attributes:
      state: the state that the function read when it was traced.
    """

    state: FunctionState
    trace: Trace | None = None
    is_made: bool = False
    lock: Any = field(default_factory=threading.RLock)

    def bytes_of_array(self) -> dict[int, int]:
        """Returns the bytes of each array that the trace and the state hold, by identity."""
        arrays: list[Any] = list(self.state.arrays())
        if self.trace is not None:
            _, consts = eqns.jaxpr_and_consts(self.trace.jaxpr)
            arrays += consts
        return {id(array): getattr(array, "nbytes", 0) for array in arrays}


@jax.jit
def _return_none() -> None:
    """Returns None; JAX traces it once for each combination of its settings."""


def _jax_settings() -> Hashable:
    """Returns a key that changes with JAX's settings, such as promotion, precision or mesh."""
    settings: Hashable = _return_none.trace().jaxpr
    return settings


def _type_of_array(value: Value) -> Hashable:
    return value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)


def _is_numeric_array(leaf: Leaf) -> bool:
    is_numpy_array = isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, np.number)
    return isinstance(leaf, jax.Array) or is_numpy_array
