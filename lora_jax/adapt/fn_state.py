"""The state of a function: the values that it reads besides its arguments.

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

_MAX_VALUES = 2_000  # that are looked at
_MAX_ARRAY_BYTES = 1 << 16  # of a NumPy array, whose elements may change

_SIMPLE: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type(...))
_SIMPLE += (range, enum.Enum, np.dtype, np.generic)
# Types whose values stay the same as long as they are the same object.
_CONSTANT: tuple[type, ...] = (jax.Array, types.ModuleType, types.CodeType, np.ufunc)
_CONSTANT += (type(jax.jit(lambda: 0)),)
_CONSTANT += (types.WrapperDescriptorType, types.MethodDescriptorType)
_CONSTANT += (types.GetSetDescriptorType, types.MemberDescriptorType)
# Modules whose functions may return something else on each call, and such submodules of a package.
_CHANGING_MODULES = frozenset({"datetime", "os", "random", "secrets", "time", "uuid"})
_CHANGING_SUBMODULE = {"numpy": "random"}


class UnknownStateError(Exception):
    """Raised if a function reads a value that may change without notice."""


class FunctionState:
    """The state of some values; equal to a later state if no value that they read has changed."""

    def __init__(self, *values: object) -> None:
        """Reads the values, and all values that they refer to.

        Raises:
          UnknownStateError: one of them may change unseen (a generator, a random source), or they
            refer to too much.
        """
        self._visited: dict[
            int, object
        ] = {}  # by identity; held, so that no identity is given twice
        self._key = tuple(self._state_of_values(values))
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionState) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def arrays(self) -> list[jax.Array | np.ndarray]:
        """Returns the arrays that the values refer to."""
        return [
            value for value in self._visited.values() if isinstance(value, (jax.Array, np.ndarray))
        ]

    def _state_of_value(self, value: object) -> Iterator[Hashable]:
        """Yields the state of a value, and the state of the values it refers to."""
        yield id(type(value))
        if isinstance(value, _SIMPLE):
            yield value
        elif isinstance(value, jax.core.Tracer):
            raise UnknownStateError("a traced array is closed over")
        elif id(value) in self._visited or isinstance(value, _CONSTANT):
            self._visited[id(value)] = value
            yield id(value)
        elif len(self._visited) > _MAX_VALUES:
            raise UnknownStateError("there is too much to look at")
        else:
            self._visited[id(value)] = value
            yield from self._state_of_new_object(value)

    def _state_of_new_object(self, value: object) -> Iterator[Hashable]:
        """Yields the state of an object that is met for the first time."""
        match value:
            case np.ndarray():
                if value.nbytes > _MAX_ARRAY_BYTES or value.dtype.hasobject:
                    raise UnknownStateError("the elements of a large NumPy array may change")
                yield from (value.shape, value.dtype, value.tobytes())
            case types.FunctionType():
                yield from self._state_of_function(value)
            case types.BuiltinFunctionType():
                yield value.__name__
                yield from self._state_of_value(value.__self__)
            case types.MethodType():
                yield from self._state_of_values((value.__func__, value.__self__))
            case functools.partial():
                yield from self._state_of_values((value.func, value.args, value.keywords))
            case property():
                yield from self._state_of_value(value.fget)
            case staticmethod() | classmethod():
                yield from self._state_of_value(value.__func__)
            case type():
                yield from self._state_of_class(value)
            case list() | tuple() | set() | frozenset():
                yield len(value)
                yield from self._state_of_values(value)
            case dict() | types.MappingProxyType():
                yield len(value)
                yield from self._state_of_values(value.keys())
                yield from self._state_of_values(value.values())
            case _:
                yield from self._state_of_instance(value)

    def _state_of_values(self, values: Iterable[object]) -> Iterator[Hashable]:
        for value in values:
            yield from self._state_of_value(value)

    def _state_of_instance(self, value: object) -> Iterator[Hashable]:
        """Yields an instance's class, and its attributes or its own equality."""
        cls = type(value)
        yield from self._state_of_class(cls)
        hash_of_identity: object = object.__hash__
        has_own_hash = cls.__hash__ not in (None, hash_of_identity)
        if has_own_hash and is_hashable(value):
            yield _ByEquality(value)
            return
        slots: list[str] = []
        for base in cls.__mro__:
            slots += vars(base).get("__slots__", ())
        has_visible_attributes = hasattr(value, "__dict__") or slots
        is_of_changing_module = any(base.__module__ in _CHANGING_MODULES for base in cls.__mro__)
        if not has_visible_attributes or is_of_changing_module:
            raise UnknownStateError(f"a {cls.__name__} may change unseen")
        yield from self._state_of_value(getattr(value, "__dict__", None))
        yield from self._state_of_values(getattr(value, name, None) for name in slots)

    def _state_of_class(self, cls: type) -> Iterator[Hashable]:
        """Yields the state of a class: what it and its bases define outside packages."""
        yield id(cls)
        for base in cls.__mro__:
            if not is_packaged(base.__module__):
                written_attributes = {
                    name: value
                    for name, value in vars(base).items()
                    if not _is_set_by_python(name, value)
                }
                yield from self._state_of_value(written_attributes)

    def _state_of_function(self, fn: types.FunctionType) -> Iterator[Hashable]:
        """Yields the state of a function: code, defaults, what it closes over, its globals."""
        yield from self._state_of_values((fn.__code__, fn.__defaults__, fn.__kwdefaults__))
        yield from self._state_of_values(map(_value_of_cell, fn.__closure__ or ()))
        if fn.__module__ is None or not is_packaged(fn.__module__):
            yield from self._state_of_globals(fn.__globals__, _names_in_code(fn.__code__))

    def _state_of_globals(
        self, module_globals: dict[str, object], names: frozenset[str]
    ) -> Iterator[Hashable]:
        """Yields the state of the globals with these names."""
        for name in sorted(names & module_globals.keys()):
            value = module_globals[name]
            yield from self._state_of_value(value)
            if not isinstance(value, types.ModuleType):
                continue
            module = value.__name__
            if module in _CHANGING_MODULES or _CHANGING_SUBMODULE.get(module) in names:
                raise UnknownStateError(f"what {module} gives may change")
            if not is_packaged(module):
                attributes = vars(value)
                attribute_names = sorted(names & attributes.keys())
                yield from self._state_of_values(attributes[name] for name in attribute_names)


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


def _is_set_by_python(name: str, value: object) -> bool:
    """Returns True for an attribute of a class that Python sets by itself."""
    is_method = isinstance(value, (types.FunctionType, staticmethod, classmethod, property))
    is_dunder = name[:2] == name[-2:] == "__"
    return name == "_abc_impl" or (is_dunder and not is_method)


def _value_of_cell(cell: types.CellType) -> object:
    """Returns the value of a variable that a function closes over."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


@functools.cache
def _names_in_code(code: types.CodeType) -> frozenset[str]:
    """Returns the names of globals and attributes in a function, and in functions inside it."""
    inner_codes = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return frozenset(code.co_names).union(*map(_names_in_code, inner_codes))
