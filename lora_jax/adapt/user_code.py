"""Tells the user's code from packages' code, and finds the user's line that made an equation."""

import contextlib
import contextvars
import functools
import linecache
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.core.extend import JaxprEqn, source_info_util


def _inside(folder: str | Path) -> str:
    """Returns the prefix of the paths of files in a folder."""
    return f"{folder}{os.sep}"


_PACKAGES = tuple(
    {_inside(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
)
_OURS = _inside(Path(__file__).parent.parent)
_WALK = _inside(Path(__file__).parent)  # this folder, whose lines made no equation
_JAX = tuple(_inside(Path(module.__file__ or "").parent) for module in (jax, sys.modules["jaxlib"]))

_SHOWN = 40  # characters of a cell's line
_WARNED: dict[Any, Any] = {}  # what `warnings` needs to say a thing once

# The equations that are being evaluated, one inside the other.
_INSIDE: contextvars.ContextVar[tuple[JaxprEqn, ...]] = contextvars.ContextVar("inside", default=())


@functools.cache
def is_packaged(module: str) -> bool:
    """Returns True if a module is built in, or lies where packages are installed."""
    if module in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is not None and _is_package_file(path)


def _is_package_file(path: str) -> bool:
    return path.startswith((*_PACKAGES, _OURS)) or path.startswith("<frozen")


class SourceLine(NamedTuple):
    """A line of code.

    Attributes:
      file, line: file and line of the user.
      inside: "package/file.py:line" if the user's line calls a package that made the equation.
    """

    file: str
    line: int
    inside: str

    def __str__(self) -> str:
        called = f" (in {self.inside})" if self.inside else ""
        return f"{_named(self.file, self.line)}{called}"


def _named(file: str, line: int) -> str:
    """Returns "file:line"; of a notebook's cell, whose file exists nowhere, the line itself."""
    text = "" if os.path.exists(file) else linecache.getline(file, line).strip()
    if not text:
        return f"{file}:{line}"
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return f"line {line}, {shown!r}"


def place_of(eqn: JaxprEqn) -> SourceLine:
    """Returns the nearest line of the user's code to an equation that is evaluated.

    An equation inside a function that JAX traced by itself has no line of the user's; the equation
    that calls that function has one, or else the Python stack, of which JAX keeps only a part.
    """
    inside = ""
    for each in (eqn, *reversed(_INSIDE.get())):
        stack: Any = each.source_info.traceback
        frames = () if stack is None else stack.frames
        for frame in frames:
            if not _is_package_file(frame.file_name):
                return SourceLine(frame.file_name, frame.line_num, inside)
            if not inside and not frame.file_name.startswith((*_JAX, _WALK)):
                inside = f"{_short(frame.file_name)}:{frame.line_num}"
    return place_of_call()._replace(inside=inside)


def place_of_call() -> SourceLine:
    """Returns the nearest line of the user's code that is being run."""
    for frame, line in traceback.walk_stack(None):
        if not _is_package_file(frame.f_code.co_filename):
            return SourceLine(frame.f_code.co_filename, line, "")
    return SourceLine("a package", 1, "")


def warn(message: str, category: type[Warning], place: SourceLine) -> None:
    """Warns at a line of the user's code; once for each message, unless a filter says otherwise."""
    warnings.warn_explicit(message, category, place.file, place.line, registry=_WARNED)


def _short(path: str) -> str:
    """Returns a path from the package on."""
    roots = (*_PACKAGES, _inside(Path(_OURS).parent))
    above = [root for root in roots if path.startswith(root)]
    return path.removeprefix(max(above, key=len)) if above else path


@contextlib.contextmanager
def user_context(eqn: JaxprEqn) -> Iterator[None]:
    """Gives the equation's names and source line to all that is traced inside."""
    info = eqn.source_info
    name_stack = source_info_util.current_name_stack() + info.name_stack
    token = _INSIDE.set((*_INSIDE.get(), eqn))
    try:
        with source_info_util.user_context(info.traceback, name_stack=name_stack):
            yield
    finally:
        _INSIDE.reset(token)
