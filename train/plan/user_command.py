"""`lora-jax plan --function file.py:make_step`: plans a function that a user wrote."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh

from train.console.errors import UserError
from train.console.help import HelpPage
from train.options.command import parse_options
from train.plan.machines import find_machine
from train.plan.user_function import mesh_of, plan_function
from train.processes.mesh import parse_mesh

OPTION = "--function"
_OPTIONS = ("shardings", "out_shardings", "donate", "static", "compiler_options")
_RETURNS = (
    "It must return (function, arguments) or (function, arguments, options), where arguments is a "
    f"tuple and options is a dictionary with any of {', '.join(_OPTIONS)}."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """Plan a function that you wrote: memory, FLOPs, time and traffic, on a machine that need not
    be here."""

    HELP = HelpPage(
        "function topology mesh json",
        "--function step.py:make_step --topology v5e:2x2 --mesh fsdp=4",
    )

    function: str
    """The file and the name of a Python function, such as step.py:make_step. make_step(mesh), or
    make_step(), returns the function to plan, its arguments as shapes, and options."""
    topology: str = "cpu:1"
    """The machine: a TPU slice such as v5e:2x2, GPUs such as rtx4090:1 or h100:8, or cpu:8."""
    mesh: str | None = None
    """The size of each axis of the mesh, such as fsdp=2,tensor=2."""
    capacity_gib: float | None = None
    """The memory of a device in GiB, in place of the topology's."""
    mem_fraction: float | None = None
    """The share of a GPU's memory that JAX reserves, by default 0.75."""
    json: bool = False
    """Print JSON instead of tables."""


def asks_for_function(args: Sequence[str] | None) -> bool:
    """Returns True if a command line has the option --function."""
    words = sys.argv[1:] if args is None else args
    return any(word == OPTION or word.startswith(f"{OPTION}=") for word in words)


def run_function_plan(args: Sequence[str] | None) -> None:
    """Plans the function of a command line, and prints the plan."""
    options = parse_options(FunctionOptions, args, "train.plan")
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to other processes
    machine = find_machine(options.topology, options.capacity_gib, None, options.mem_fraction)
    mesh = mesh_of(parse_mesh(options.mesh, names=None), machine)
    function, arguments, settings = _make_step(options.function, mesh)
    plan = plan_function(
        function, *arguments, topology=options.topology, mesh=mesh, machine=machine, **settings
    )
    if options.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        plan.show()


def _make_step(spec: str, mesh: Mesh) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """Calls the user's make_step, and returns the function with its arguments and options.

    Args:
      spec: the value of --function, ``file.py:make_step``.
      mesh: the mesh that make_step gets, if it takes one.

    Raises:
      UserError: the file or the function does not exist, fails, or returns something else.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"{OPTION} {spec} must be a file and a name, such as step.py:make_step.")
    if not Path(file).is_file():
        raise UserError(f"{OPTION} {spec}: The file {file} does not exist. Check the path.")
    with _user_errors(file, f"{OPTION} {spec}: Importing {file} failed"):
        module = _import_file(Path(file))
    make_step = getattr(module, name, None)
    if not callable(make_step):
        raise UserError(f"{OPTION} {spec}: {file} has no function {name}. Check the name.")
    takes_mesh = any(
        parameter.name == "mesh" or parameter.default is parameter.empty
        for parameter in inspect.signature(make_step).parameters.values()
    )
    with _user_errors(file, f"{OPTION} {spec}: {name} failed"):
        result = make_step(mesh) if takes_mesh else make_step()
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not callable(result[0]):
        raise UserError(f"{OPTION} {spec}: {name} returned {type(result).__name__}. {_RETURNS}")
    function, arguments = result[:2]
    settings = result[2] if len(result) == 3 else {}
    if not isinstance(arguments, tuple):
        raise UserError(
            f"{OPTION} {spec}: {name} returned {type(arguments).__name__} as arguments. {_RETURNS}"
        )
    if not isinstance(settings, dict) or not settings.keys() <= {*_OPTIONS}:
        raise UserError(
            f"{OPTION} {spec}: {name} returned {settings!r:.100} as options. {_RETURNS}"
        )
    return function, arguments, settings


def _import_file(path: Path) -> ModuleType:
    """Imports a user's file, with its folder on the import path."""
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_loader(path.stem, SourceFileLoader(path.stem, str(path)))
    assert spec is not None and spec.loader is not None, "a loader of source files has a spec"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _user_errors(file: str, problem: str) -> Iterator[None]:
    """Turns an exception of the user's code into a UserError that names the line."""
    try:
        yield
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"{problem}{place} with {type(error).__name__}: {error}") from error
