"""Imports a user's files in separate programs, which load this file by its path.

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
    """The error for a file without the named function, or with an unusable one."""


class FileFinder:
    """A finder of modules that imports the command line's files as `_user_0`, `_user_1`, ….

    A file is a package, with the files beside it as its modules: relative imports find them.
    """

    @staticmethod
    def find_spec(name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of one of the files, or None for other modules."""
        match = _MODULE.fullmatch(name)
        if match is None:
            return None
        path = _files_on_command_line()[int(match[1])]
        folder = str(Path(path).absolute().parent)
        return importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[folder]
        )


def _files_on_command_line() -> list[str]:
    """Returns the distinct files of the specs on the command line."""
    paths = []
    for argument in sys.argv[1:]:
        path, colon, _ = argument.rpartition(":")
        if colon:
            paths.append(path)
    return [*dict.fromkeys(paths)]


def load(spec: str) -> Any:
    """Returns the function or class that ``file.py:name`` names.

    A name with dots, such as ``judge.score``, names a method of an object or of a class.

    Raises:
      NoFunction: the file has no such function, or a method has no object.
      BaseException: whatever the file raises.
    """
    path, _, name = spec.rpartition(":")
    module = _import_file(path)
    owner: Any = None
    target: Any = module
    for attribute in name.split("."):
        owner = target
        target = getattr(owner, attribute, None)
    if not callable(target):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise NoFunction(
            f"The file has no function {name!r}. Name one of its functions: "
            f"{', '.join(functions) or 'it has none'}."
        )
    if inspect.isclass(owner) and _needs_object(owner, attribute):
        raise NoFunction(
            f"{name} is a method of the objects of {owner.__name__}. Create an object in the file, "
            f"such as `my_object = {owner.__name__}(…)`, and name my_object.{attribute}."
        )
    return target


def _needs_object(owner: type[Any], method: str) -> bool:
    """Returns True for a method that takes an object, and False for static and class methods."""
    return inspect.isfunction(inspect.getattr_static(owner, method, None))


def _import_file(path: str) -> Any:
    """Imports a file once, with its folder on the import path; returns its module."""
    name = f"_user_{_files_on_command_line().index(path)}"
    if name in sys.modules:
        return sys.modules[name]
    sys.path.insert(0, str(Path(path).absolute().parent))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        frames = _user_frames(error)
        line = (frames[-1].line or "") if frames else ""
        relative_import = re.match(r"from (\.\.+)\s*(.*)", line)
        if not relative_import or "relative import" not in str(error):
            raise
        dots, target = relative_import.groups()
        statement = target if target.startswith("import ") else f"from {target}"
        package_folder = Path(frames[-1].filename).absolute().parents[len(dots) - 1]
        raise NoFunction(
            f"{describe_error(error)}. Relative imports reach only files in the same folder. Write "
            f"`{statement}`, and set PYTHONPATH={package_folder}."
        ) from error


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the frames of a traceback that are in users' files."""
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        is_generated = frame.filename.startswith("<")
        if frame.filename not in PROGRAMS and not is_generated:
            frames.append(frame)
    return frames


def find_keywords(function: Callable[..., Any]) -> tuple[frozenset[str] | None, list[str]]:
    """Returns the keywords that a function accepts (None for all), and its required keywords."""
    names = []
    required_names = []
    takes_all = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.append(parameter.name)
            if parameter.default is parameter.empty:
                required_names.append(parameter.name)
    return None if takes_all else frozenset(names), required_names


def select_keywords(values: Mapping[str, Any], keywords: frozenset[str] | None) -> dict[str, Any]:
    """Returns the values that a function accepts; see `find_keywords`."""
    if keywords is None:
        return dict(values)
    return {name: value for name, value in values.items() if name in keywords}


def describe_error(error: BaseException) -> str:
    """Describes an error in one line, with the user's file and line."""
    if isinstance(error, NoFunction):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    frames = _user_frames(error)
    if not frames or isinstance(error, SyntaxError):  # which says itself where it is
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def module_values(modules: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields the values in the user's modules and their classes, with their names.

    A name is as "game.py:Game.n". Other modules than the user's own yield nothing.

    Args:
      modules: names of modules in `sys.modules`.
    """
    for module in modules:
        values = dict(getattr(sys.modules[module], "__dict__", {}))
        file = Path(values.get("__file__") or os.__file__)
        is_installed = "site-packages" in file.parts or "dist-packages" in file.parts
        if is_installed or _STANDARD in file.parents:
            continue
        for name, value in [*values.items()]:
            if isinstance(value, type) and value.__module__ == module:
                for member, member_value in vars(value).items():
                    values[f"{name}.{member}"] = member_value
        for name, value in values.items():
            if "__" not in name and not isinstance(value, types.ModuleType):
                yield f"{file.name}:{name}", value


def generators(modules: Iterable[str]) -> dict[str, Any]:
    """Returns the random generators in the user's modules, by name."""
    numpy_random = sys.modules.get("numpy.random")  # perhaps in part: its import may be under way
    kinds = [random.Random]
    for name in ("Generator", "RandomState"):
        kinds.append(getattr(numpy_random, name, random.Random))
    generators_by_name = {}
    for name, value in module_values(modules):
        is_seedable = not isinstance(value, random.SystemRandom)
        if is_seedable and isinstance(value, tuple(kinds)):
            generators_by_name[name] = value
    return generators_by_name


def fingerprints(modules: Iterable[str]) -> dict[str, int]:
    """Returns a hash of each value in the user's modules except random generators, by name.

    Of a value that has no pickle, its `repr` is hashed, or that of its attributes.
    """
    hashes: dict[str, int] = {}
    generator_names = generators(modules).keys()
    for name, value in module_values(modules):
        if name in generator_names:
            continue
        try:
            hashes[name] = hash(pickle.dumps(value))
        except Exception:
            hashes[name] = hash(repr(getattr(value, "__dict__", value)))
    return hashes


class EpisodeSeeds:
    """Seeds `random`, NumPy, and the random generators in the user's modules.

    It is a finder of modules, too, which comes before all others. So the generators of a module
    that is imported later are seeded once that module has run.
    """

    def __init__(self, seed: int) -> None:
        """Seeds the generators in the modules that are imported already."""
        self._seed = seed
        random.seed(seed)
        for name in [*sys.modules]:
            self._seed_module(name)
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, *arguments: Any) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a module, whose generators are seeded after its import."""
        spec: importlib.machinery.ModuleSpec | None = None
        for finder in [*sys.meta_path]:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, *arguments)
                if spec is not None:
                    break
        if spec is None or not spec.has_location or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_seed(module: types.ModuleType) -> None:
            run_module(module)
            self._seed_module(name)

        spec.loader.exec_module = run_and_seed  # type: ignore[method-assign]
        return spec

    def _seed_module(self, module: str) -> None:
        """Seeds the generators in a module, each by its name."""
        if module == "numpy.random":
            sys.modules[module].seed(self._seed % 2**32)
        for name, generator in generators([module]).items():
            entropy = [self._seed, *f"{module} {name}".encode()]
            if isinstance(generator, random.Random):
                generator.seed(repr(entropy))
            elif hasattr(generator, "bit_generator"):
                bit_generator = generator.bit_generator
                bit_generator.state = type(bit_generator)(entropy).state
            else:  # NumPy's RandomState, which tells its bit generator by name alone
                numpy_random = sys.modules["numpy.random"]
                class_name = generator.get_state(legacy=False)["bit_generator"]
                bit_generator = getattr(numpy_random, class_name)(entropy)
                seeded = numpy_random.RandomState(bit_generator)
                generator.set_state(seeded.get_state(legacy=False))


def requests(source: TextIO) -> Iterator[Any]:
    """Yields the request in each line. The process ends when its input ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        """Reads lines until the input ends, and then ends this process and its children."""
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
    """Reserves stdin and stdout for requests and answers, out of reach of user functions."""
    source = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    return source, answers
