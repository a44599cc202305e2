"""Empty packages in the place of those that a repository imports and does not need."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _EmptyType(type):
    """The type of a class of which each name is a class like it."""

    def __getattr__(cls, name: str) -> Any:
        return _empty_class(name, cls.__module__)


def _empty_class(name: str, module: str) -> Any:
    """Returns a class that takes any arguments and does nothing."""
    if name.startswith("__"):
        raise AttributeError(name)
    members = {"__module__": module, "__init__": lambda *args, **settings: None}
    return _EmptyType(name, (), members)


class _Empty(ModuleType):
    """A module of which each name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = _empty_class(name, self.__name__)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the absent packages, and makes them empty."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == absent or name.startswith(f"{absent}.") for absent in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def leave_out(names: Sequence[str]) -> None:
    """Replaces packages or modules by empty ones, for the imports of this process."""
    sys.meta_path.insert(0, _Finder(tuple(names)))
