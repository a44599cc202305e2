"""A user's files, imported by programs of their own; such a program loads this file by its path.

It imports the standard library alone, and is no module of `train` there: a user's file is the only
one to import more, and finds a `train` of its own beside it.
"""

import base64
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import pickle
import queue
import random
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

_MODULE = re.compile(r"_user_(\d+)")
_STANDARD = Path(os.__file__).parent  # Python's own modules


# Files that run a user's functions: their frames are not the user's.
PROGRAMS = {__file__}


class NoFunction(Exception):
    """A file has no such function, or one that cannot be used as it is."""


class FileFinder:
    """Imports the files of the command line as `_user_0`, …, in order: a finder of modules.

    A file is a package, with the files beside it as its modules: relative imports find them.
    """

    @staticmethod
    def find_spec(name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of one of the files; None for other modules."""
        if (match := _MODULE.fullmatch(name)) is None:
            return None
        path = _paths()[int(match[1])]
        beside = [str(Path(path).absolute().parent)]
        return importlib.util.spec_from_file_location(name, path, submodule_search_locations=beside)


def _paths() -> list[str]:
    specs = (argument for argument in sys.argv[1:] if ":" in argument)
    return [*dict.fromkeys(spec.rpartition(":")[0] for spec in specs)]


def load(spec: str) -> Any:
    """Returns the function or class that ``file.py:name`` names.

    Raises:
      NoFunction: the file has no such function.
      BaseException: whatever the file raises.
    """
    path, _, name = spec.rpartition(":")
    module = _import(path)
    target = getattr(module, name, None)
    if not callable(target):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise NoFunction(f"it has no function {name!r}, but: {', '.join(functions) or 'none'}")
    return target


def _import(path: str) -> Any:
    """Returns the module of a file, imported once; its folder is where it finds others."""
    name, folder = f"_user_{_paths().index(path)}", Path(path).absolute().parent
    if name in sys.modules:
        return sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        own = _own_frames(error)
        match = own and re.match(r"from (\.\.+)\s*(.*)", own[-1].line or "")
        if not match or "relative import" not in str(error):
            raise
        dots, rest = match.groups()
        absolute = rest if rest.startswith("import ") else f"from {rest}"
        above = Path(own[-1].filename).absolute().parents[len(dots) - 1]
        raise NoFunction(
            f"{said(error)}: relative imports reach the files beside it alone; write `{absolute}`, "
            f"and set PYTHONPATH={above}"
        ) from error


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the frames of a traceback that are of files of others, not of this one."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f for f in frames if f.filename not in PROGRAMS and not f.filename.startswith("<")]


def keywords_of(function: Callable[..., Any]) -> tuple[frozenset[str] | None, list[str]]:
    """Returns the keywords that a function takes, None for all, and those without a default."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = None if takes_all else frozenset(p.name for p in named)
    return names, [p.name for p in named if p.default is p.empty]


def taken(values: Mapping[str, Any], keywords: frozenset[str] | None) -> dict[str, Any]:
    """Returns the values that a function takes; see `keywords_of`."""
    return {name: x for name, x in values.items() if keywords is None or name in keywords}


def said(error: BaseException) -> str:
    """Returns the last line of a traceback, with the file and the line that it is about."""
    if isinstance(error, NoFunction):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    own = _own_frames(error)
    if not own or isinstance(error, SyntaxError):  # which says itself where it is
        return text
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def module_values(modules: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields the values that the user's own modules and their classes hold, with their names.

    A name is as "game.py:Game.n". Other modules than the user's own yield nothing.

    Args:
      modules: names of modules in `sys.modules`.
    """
    for name in modules:
        values = dict(getattr(sys.modules[name], "__dict__", {}))
        file = Path(values.get("__file__") or os.__file__)
        if _STANDARD in file.parents or {"site-packages", "dist-packages"} & {*file.parts}:
            continue
        for owner, value in [*values.items()]:
            if isinstance(value, type) and value.__module__ == name:
                values |= {f"{owner}.{member}": inner for member, inner in vars(value).items()}
        for label, value in values.items():
            if "__" not in label and not isinstance(value, types.ModuleType):
                yield f"{file.name}:{label}", value


def generators(modules: Iterable[str]) -> dict[str, Any]:
    """Returns the random generators that the user's own modules hold, by name."""
    numpy = sys.modules.get("numpy.random")  # perhaps not all of it: its import may be under way
    of_numpy = (getattr(numpy, name, random.Random) for name in ("Generator", "RandomState"))
    kinds = (random.Random, *of_numpy)
    return {
        name: value
        for name, value in module_values(modules)
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom)
    }


def fingerprints(modules: Iterable[str]) -> dict[str, int]:
    """Returns a hash of each value of the user's own modules, but for random generators, by name.

    Of a value that has no pickle, its `repr` is hashed, or that of its attributes.
    """
    hashes, seeded = dict[str, int](), generators(modules)
    for name, value in module_values(modules):
        if name in seeded:
            continue
        try:
            hashes[name] = hash(pickle.dumps(value))
        except Exception:
            hashes[name] = hash(repr(getattr(value, "__dict__", value)))
    return hashes


class EpisodeSeeds:
    """Seeds `random`, NumPy, and the generators in modules of the user's files.

    It is a finder of modules, too, which comes before all others. So the generators of a module
    that is imported later are seeded once that module has run.
    """

    def __init__(self, seed: int) -> None:
        """Seeds the generators that there are."""
        self._seed = seed
        random.seed(seed)
        for name in [*sys.modules]:
            self._seed_module(name)
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, *arguments: Any) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec that the other finders find."""
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (
            finder.find_spec(name, *arguments) for finder in finders if hasattr(finder, "find_spec")
        )
        spec = next(filter(None, specs), None)
        if spec is not None and spec.has_location and spec.loader is not None:
            run_module = spec.loader.exec_module

            def run_and_seed(module: types.ModuleType) -> None:
                run_module(module)
                self._seed_module(name)

            spec.loader.exec_module = run_and_seed  # type: ignore[method-assign]
        return spec

    def _seed_module(self, module: str) -> None:
        if module == "numpy.random":
            sys.modules[module].seed(self._seed % 2**32)
        for name, generator in generators([module]).items():
            entropy = [self._seed, *f"{module} {name}".encode()]
            if isinstance(generator, random.Random):
                generator.seed(repr(entropy))
            elif hasattr(generator, "bit_generator"):
                bits = generator.bit_generator
                bits.state = type(bits)(entropy).state
            else:  # NumPy's RandomState, which tells its bit generator by name alone
                numpy = sys.modules["numpy.random"]
                bits = getattr(numpy, generator.get_state(legacy=False)["bit_generator"])(entropy)
                generator.set_state(numpy.RandomState(bits).get_state(legacy=False))


def requests(source: TextIO) -> Iterator[Any]:
    """Yields requests, a line each; when the lines end, ends this process, whatever it does."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        # An asker that was killed before it read an answer resets the connection.
        with contextlib.suppress(OSError):
            for line in source:
                lines.put(line)
        if sys.platform != "win32":
            os.killpg(0, signal.SIGKILL)  # and what it has started
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return (pickle.loads(base64.b64decode(line)) for line in iter(lines.get, None))


def take_pipes() -> tuple[TextIO, TextIO]:
    """Returns stdin and stdout, which a function that reads or prints then cannot meddle with."""
    source, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    return source, answers
