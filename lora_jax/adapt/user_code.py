"""Distinguishes the user's code from packages, and finds the user's line for an equation."""

import contextvars
import functools
import linecache
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.core.extend import JaxprEqn, source_info_util


def _path_prefix(folder: str | Path) -> str:
    """Returns the path prefix of the files in a folder."""
    return f"{folder}{os.sep}"


# Prefixes of the paths of files in packages, in lora_jax, in this folder, whose lines made no
# equation, and in JAX.
_PACKAGES = tuple(
    {_path_prefix(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
)
_LORA_JAX = _path_prefix(Path(__file__).parent.parent)
_ADAPT = _path_prefix(Path(__file__).parent)
_JAX = tuple(
    _path_prefix(Path(module.__file__ or "").parent) for module in (jax, sys.modules["jaxlib"])
)

_MAX_CELL_CHARACTERS = 40  # of a line of a notebook's cell, in a message
_WARNING_REGISTRY: dict[Any, Any] = {}  # lets `warnings` show each message once

# The equations that are being evaluated, one inside the other.
_OUTER_EQUATIONS: contextvars.ContextVar[tuple[JaxprEqn, ...]] = contextvars.ContextVar(
    "outer_equations", default=()
)


@functools.cache
def is_packaged(module: str) -> bool:
    """Returns True if a module is built in or installed as a package."""
    if module in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is not None and _is_package_file(path)


@functools.cache
def _is_package_file(path: str) -> bool:
    # JAX may lie outside the folders of packages, where pip's --target or PYTHONPATH puts it.
    return path.startswith((*_PACKAGES, *_JAX, _LORA_JAX, "<frozen"))


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
        line = _line_text(self.file, self.line)
        return f"{line} (in {self.inside})" if self.inside else line


def _line_text(file: str, line: int) -> str:
    """Returns "file:line", or the code of the line in a notebook, which has no file."""
    code = "" if os.path.exists(file) else linecache.getline(file, line).strip()
    if not code:  # not a notebook's cell
        return f"{file}:{line}"
    if len(code) > _MAX_CELL_CHARACTERS:
        code = f"{code[:_MAX_CELL_CHARACTERS]}…"
    return f"line {line}, {code!r}"


def user_line_of(eqn: JaxprEqn) -> SourceLine:
    """Returns the line of the user's code that is nearest to an equation.

    An equation inside a function that JAX traced by itself has no line of the user's code. The
    equation that calls that function has one, or else the Python stack, because JAX keeps only a
    part of the stack.
    """
    package_line = ""  # the innermost line of a package other than JAX and this folder
    # Search the equation first, then the equations around it, from the innermost one on.
    for source_eqn in (eqn, *reversed(_OUTER_EQUATIONS.get())):
        stack: Any = source_eqn.source_info.traceback
        frames = () if stack is None else stack.frames
        for frame in frames:
            if not _is_package_file(frame.file_name):
                return SourceLine(frame.file_name, frame.line_num, package_line)
            if not package_line and not frame.file_name.startswith((*_JAX, _ADAPT)):
                package_line = f"{_path_from_package(frame.file_name)}:{frame.line_num}"
    return user_line_of_call()._replace(inside=package_line)


def user_line_of_call() -> SourceLine:
    """Returns the innermost line of the user's code that is running."""
    for frame, line in traceback.walk_stack(None):
        if not _is_package_file(frame.f_code.co_filename):
            return SourceLine(frame.f_code.co_filename, line, "")
    return SourceLine("a package", 1, "")


def warn(message: str, category: type[Warning], line: SourceLine) -> None:
    """Warns at a line of the user's code, once for each message by default."""
    warnings.warn_explicit(message, category, line.file, line.line, registry=_WARNING_REGISTRY)


def _path_from_package(path: str) -> str:
    """Returns the path of a file, from the name of its package on."""
    roots = (*_PACKAGES, _path_prefix(Path(_LORA_JAX).parent))
    roots_of_path = [root for root in roots if path.startswith(root)]
    return path.removeprefix(max(roots_of_path, key=len, default=""))


class UserContext:
    """Gives an equation's names, source line, mesh and metadata to everything traced inside.

    Every equation of a walk enters a context, so it is a class, which costs less than a generator.
    """

    __slots__ = ("_equation_manager", "_source_manager", "_token", "eqn")

    def __init__(self, eqn: JaxprEqn) -> None:
        self.eqn = eqn

    def __enter__(self) -> None:
        eqn = self.eqn
        info = eqn.source_info
        name_stack = source_info_util.current_name_stack() + info.name_stack
        self._token = _OUTER_EQUATIONS.set((*_OUTER_EQUATIONS.get(), eqn))
        self._source_manager = source_info_util.user_context(info.traceback, name_stack=name_stack)
        self._source_manager.__enter__()
        self._equation_manager = eqn.ctx.manager
        self._equation_manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._equation_manager.__exit__(*error)
        self._source_manager.__exit__(*error)
        _OUTER_EQUATIONS.reset(self._token)
