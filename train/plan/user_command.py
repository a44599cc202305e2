"""`lora-jax plan --function file.py:make_step`: plans a function that a user wrote."""

import dataclasses
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from train.console.errors import UserError
from train.console.help import HelpPage
from train.options.command import parse_options
from train.plan.machines import find_machine
from train.plan.user_function import full_topology, mesh_of, plan_function

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
    topology = full_topology(options.topology)
    machine = find_machine(topology, options.capacity_gib, None, options.mem_fraction)
    mesh = mesh_of(_parse_mesh(options.mesh), machine)
    function, arguments, settings = _make_step(options.function, mesh)
    plan = plan_function(
        function, *arguments, topology=topology, mesh=mesh, machine=machine, **settings
    )
    if options.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        plan.show()


def _parse_mesh(text: str | None) -> dict[str, int]:
    """Parses the axes of a mesh, such as "fsdp=2,tensor=2".

    Raises:
      UserError: the text has another form.
    """
    sizes: dict[str, int] = {}
    for word in (text or "").split(",") if text else ():
        name, _, size = word.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text}: {word!r} is no axis. Write axis=size, as in fsdp=4.")
        sizes[name.strip()] = int(size)
    return sizes


def _make_step(place: str, mesh: Any) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """Calls the user's make_step; returns the function, its arguments and options.

    Raises:
      UserError: the file or the function does not exist, or returns something else.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UserError(f"{OPTION} {place} must be a file and a name, such as step.py:make_step.")
    if not path.is_file():
        raise UserError(f"{OPTION} {place}: the file {file} does not exist. Check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a file with the suffix .py"
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{OPTION} {place}: importing {file} failed: {error!r}") from error
    make_step = getattr(module, name, None)
    if not callable(make_step):
        raise UserError(f"{OPTION} {place}: {file} has no function {name}.")
    takes_mesh = bool(inspect.signature(make_step).parameters)
    made = make_step(mesh) if takes_mesh else make_step()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise UserError(f"{OPTION} {place}: {name} returned {type(made).__name__}. {_RETURNS}")
    function, arguments, *rest = made
    settings = rest[0] if rest else {}
    unknown = [key for key in settings if key not in _OPTIONS] if isinstance(settings, dict) else []
    if not isinstance(arguments, tuple) or not isinstance(settings, dict) or unknown:
        raise UserError(
            f"{OPTION} {place}: {name} returned {type(arguments).__name__} as arguments and "
            f"{settings!r:.100} as options. {_RETURNS}"
        )
    return function, arguments, settings
