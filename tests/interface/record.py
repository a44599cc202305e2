"""The public interface as the code has it: names with their parameters, and options of commands.

``python -m tests.interface.record FILE`` writes it to a file, for a release.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import lora_jax
from tests.train import test_help

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "lora_jax" / "names.md"


def interface():
    """Returns the public interface.

    Returns:
      A dictionary of "names", the parameters of each public name (none where it is no function and
      no class), and "options", the options of each command.
    """
    names = {f"lora_jax.{name}" for name in lora_jax.__all__} | names_of_page(PAGE.read_text())
    return {
        "names": {name: parameters_of(value_of(name)) for name in sorted(names)},
        "options": {command: options_of(command) for command in sorted(test_help.PAGES)},
    }


def names_of_page(text):
    """Returns the full names in the first column of the tables of a page."""
    names = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            first_cell = re.split(r"(?<!\\)\|", line)[1]
            for code in re.findall("`([^`]+)`", first_cell):
                name = re.match(r"[A-Za-z_][\w.]*", code)
                is_argument = name and code[name.end() :].startswith("=")
                if name and not is_argument:
                    names.add(f"lora_jax.{name[0]}")
    return names


def value_of(name):
    """Returns the value of a full name, whose beginning may be a module not yet imported.

    Raises:
      AttributeError: if there is no such name.
    """
    module, _, rest = name.partition(".")
    value = importlib.import_module(module)
    for part in rest.split("."):
        if inspect.ismodule(value) and not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except ModuleNotFoundError as error:
                raise AttributeError(f"{name} does not exist") from error
        value = getattr(value, part)
    return value


def parameters_of(value):
    """Returns the names of the parameters of a function or a class; * stands before keywords."""
    is_error = inspect.isclass(value) and issubclass(value, BaseException)
    if is_error or not callable(value):
        return []
    names, keywords = [], False
    for name, parameter in inspect.signature(value).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            names.append("*")
            keywords = True
        names.append(name)
    return [name for name in names if name == "*" or not name.startswith("_")]


def options_of(command):
    """Returns the options of a command, as its help shows them."""
    text = test_help.page_of(command, everything=True, columns=200)
    return sorted(set(re.findall(r"^\s*(--[a-z][\w-]*)", text, re.MULTILINE)))


def missing(recorded, current):
    """Returns what a change removes or renames, a line each.

    Args:
      recorded: the interface of a release.
      current: the interface of the code.
    """
    lines = []
    for name, parameters in recorded["names"].items():
        if name not in current["names"]:
            lines.append(f"{name} is missing.")
            continue
        now = current["names"][name]
        gone = [parameter for parameter in parameters if parameter not in now]
        lines += [f"{name} has no parameter {parameter}." for parameter in gone]
        positional, positional_now = (by_position(names) for names in (parameters, now))
        if not gone and positional_now[: len(positional)] != positional:
            order = ", ".join(positional)
            lines.append(f"{name} does not take its parameters in the order {order}.")
    for command, options in recorded["options"].items():
        now = current["options"].get(command, [])
        lines += [f"{command} has no {option}." for option in options if option not in now]
    return lines


def by_position(parameters):
    """Returns the parameters that can be passed by position."""
    return parameters[: parameters.index("*")] if "*" in parameters else parameters


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(interface(), indent=1) + "\n")
