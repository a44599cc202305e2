"""Finds the tools and the environment that --tools and --environment name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import train.environments
from train.console.errors import UserError
from train.console.output import tell
from train.processes import hosts
from train.tools.host import ProcessHost

_FOLDER = Path(train.environments.__file__).parent
# The environments of ours by name: the file, and the class in it.
OURS = {"sql": f"{_FOLDER}/sql/session.py:SqlSession", "guess": f"{_FOLDER}/guess.py:GuessingGame"}


class ToolOptions(Protocol):
    """The options that name tools.

    Attributes:
      tools: ``file.py:function``, and further functions of that file by their names alone.
      environment: ``file.py:Class``, or the name of one of ours; None for none.
      tool_timeout: seconds that a tool may take.
    """

    @property
    def tools(self) -> Sequence[str]: ...

    @property
    def environment(self) -> str | None: ...

    @property
    def tool_timeout(self) -> float: ...


def find_tools(options: ToolOptions) -> ProcessHost:
    """Finds tools and an environment, and describes them to the model.

    Raises:
      UserError: one is not there, cannot be imported, or lacks a docstring or types.
    """
    environment = options.environment
    if environment is not None:
        environment = OURS.get(environment) or _checked("environment", environment, "Class", *OURS)
    host = ProcessHost(environment, list_tools(options.tools), options.tool_timeout)
    if host.generators:
        names = ", ".join(host.generators)
        tell(hosts.console(), f"each episode seeds these random generators by its row: {names}")
    return host


def list_tools(given: Sequence[str]) -> list[str]:
    """Returns each tool with its file.

    >>> from train.tools.find import list_tools
    >>> list_tools(["/no/mine.py:f", "g"])
    Traceback (most recent call last):
        ...
    train.console.errors.UserError: --tools /no/mine.py:f: there is no file /no/mine.py
    """
    specs, path = list[str](), ""
    for spec in given:
        if ":" not in spec and path and not spec.endswith(".py"):
            spec = f"{path}:{spec}"
        else:
            path = _checked("tools", spec, "function").rpartition(":")[0]
        if spec in specs:
            raise UserError(f"--tools {spec} is named twice")
        specs.append(spec)
    return specs


def _checked(option: str, spec: str, kind: str, *ours: str) -> str:
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        known = f", or one of ours: {', '.join(ours)}" if ours else ""
        raise UserError(f"--{option} {spec}: file.py:{kind} is needed{known}")
    if not Path(path).is_file():
        raise UserError(f"--{option} {spec}: there is no file {path}")
    return spec
