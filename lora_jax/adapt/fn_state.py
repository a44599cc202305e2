"""The state of a function: what it reads besides its arguments, as far as that can be seen.

Two calls of a function with the same arguments differ where a variable that it closes over, a
global, or an attribute of an object has changed in between. A trace is used again only where all of
these are the same as before. Code in packages (the standard library, JAX, Flax) counts as constant;
values that it closes over do not.
"""

import enum
import functools
import types
from collections.abc import Hashable, Iterable, Iterator

import jax
import numpy as np

from lora_jax.adapt.user_code import is_packaged
from lora_jax.core.opaque import is_hashable

_MOST = 2_000  # values that are looked at
_MOST_BYTES = 1 << 16  # of a NumPy array, whose elements may change

_SIMPLE: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type(...))
_SIMPLE += (range, enum.Enum, np.dtype, np.generic)
# What is the same as long as it is the same object: arrays, code, functions that are compiled.
_CONSTANT: tuple[type, ...] = (jax.Array, types.ModuleType, types.CodeType, np.ufunc)
_CONSTANT += (type(jax.jit(lambda: 0)),)
_CONSTANT += (types.WrapperDescriptorType, types.MethodDescriptorType)
_CONSTANT += (types.GetSetDescriptorType, types.MemberDescriptorType)
# Modules whose functions may return something else on each call, and such submodules of a package.
_CHANGING = frozenset({"datetime", "os", "random", "secrets", "time", "uuid"})
_CHANGING_INSIDE = {"numpy": "random"}


class UnknownStateError(Exception):
    """A function reads something that may change unseen."""


class FunctionState:
    """The state of some values: equal to a later one if nothing that they read has changed."""

    def __init__(self, *values: object) -> None:
        """Looks at the values, and at all that they refer to.

        Raises:
          UnknownStateError: one of them may change unseen (a generator, a random source), or they
            refer to too much.
        """
        self._seen: dict[int, object] = {}  # by identity; held, so that no identity is given twice
        self._key = tuple(part for value in values for part in self._walk(value))
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionState) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def arrays(self) -> list[jax.Array | np.ndarray]:
        """Returns the arrays that the values refer to."""
        return [v for v in self._seen.values() if isinstance(v, (jax.Array, np.ndarray))]

    def _walk(self, value: object) -> Iterator[Hashable]:
        yield id(type(value))
        if isinstance(value, _SIMPLE):
            yield value
        elif isinstance(value, jax.core.Tracer):
            raise UnknownStateError("a traced array is closed over")
        elif id(value) in self._seen or isinstance(value, _CONSTANT):
            self._seen[id(value)] = value
            yield id(value)
        elif len(self._seen) > _MOST:
            raise UnknownStateError("there is too much to look at")
        else:
            self._seen[id(value)] = value
            yield from self._inside(value)

    def _inside(self, value: object) -> Iterator[Hashable]:
        """Returns the state of an object that is met for the first time."""
        match value:
            case np.ndarray():
                if value.nbytes > _MOST_BYTES or value.dtype.hasobject:
                    raise UnknownStateError("the elements of a large NumPy array may change")
                yield from (value.shape, value.dtype, value.tobytes())
            case types.FunctionType():
                yield from self._function(value)
            case types.BuiltinFunctionType():
                yield value.__name__
                yield from self._walk(value.__self__)
            case types.MethodType():
                yield from self._all((value.__func__, value.__self__))
            case functools.partial():
                yield from self._all((value.func, value.args, value.keywords))
            case property():
                yield from self._walk(value.fget)
            case staticmethod() | classmethod():
                yield from self._walk(value.__func__)
            case type():
                yield from self._class(value)
            case list() | tuple() | set() | frozenset():
                yield len(value)
                yield from self._all(value)
            case dict() | types.MappingProxyType():
                yield len(value)
                yield from self._all(value.keys())
                yield from self._all(value.values())
            case _:
                yield from self._object(value)

    def _all(self, values: Iterable[object]) -> Iterator[Hashable]:
        for value in values:
            yield from self._walk(value)

    def _object(self, value: object) -> Iterator[Hashable]:
        kind = type(value)
        yield from self._class(kind)
        by_identity: object = object.__hash__
        if kind.__hash__ not in (None, by_identity) and is_hashable(value):
            yield _ByEquality(value)
            return
        slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
        is_open = hasattr(value, "__dict__") or slots
        if not is_open or any(base.__module__ in _CHANGING for base in kind.__mro__):
            raise UnknownStateError(f"a {kind.__name__} may change unseen")
        yield from self._walk(getattr(value, "__dict__", None))
        yield from self._all(getattr(value, name, None) for name in slots)

    def _class(self, kind: type) -> Iterator[Hashable]:
        yield id(kind)
        for base in kind.__mro__:
            if not is_packaged(base.__module__):
                named = {n: v for n, v in vars(base).items() if not _is_of_python(n, v)}
                yield from self._walk(named)

    def _function(self, fn: types.FunctionType) -> Iterator[Hashable]:
        code, module = fn.__code__, fn.__module__
        yield from self._all((code, fn.__defaults__, fn.__kwdefaults__))
        yield from self._all(map(_contents, fn.__closure__ or ()))
        if module is None or not is_packaged(module):
            yield from self._globals(fn.__globals__, _names_in(code))

    def _globals(self, known: dict[str, object], names: frozenset[str]) -> Iterator[Hashable]:
        """Returns the state of the globals of these names, and of attributes of modules."""
        for name in sorted(names & known.keys()):
            value = known[name]
            yield from self._walk(value)
            if not isinstance(value, types.ModuleType):
                continue
            if value.__name__ in _CHANGING or _CHANGING_INSIDE.get(value.__name__) in names:
                raise UnknownStateError(f"what {value.__name__} gives may change")
            if not is_packaged(value.__name__):
                there = vars(value)
                yield from self._all(there[name] for name in sorted(names & there.keys()))


class _ByEquality:
    """A value that is compared by its own ``__eq__``."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __hash__(self) -> int:
        return hash(self._value)

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, _ByEquality) and bool(self._value == other._value)
        except Exception:  # as of arrays, which compare element by element
            return False


def _is_of_python(name: str, value: object) -> bool:
    """Returns True if Python itself keeps an attribute of a class, beside what its author wrote."""
    is_written = isinstance(value, (types.FunctionType, staticmethod, classmethod, property))
    return name == "_abc_impl" or (name[:2] == name[-2:] == "__" and not is_written)


def _contents(cell: types.CellType) -> object:
    """Returns the value of a variable that a function closes over."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


@functools.cache
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Returns the names of globals and attributes in a function, and in functions inside it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*map(_names_in, inner))
