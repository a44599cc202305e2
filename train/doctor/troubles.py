"""A report: sections of facts, and troubles with remedies. It contains no secrets."""

import dataclasses
import getpass
import json
import re
import shutil
import socket
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_TOKEN = re.compile(r"\bhf_\w{6,}")
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")
_MOST_COLUMNS = 100


class Trouble(NamedTuple):
    """A problem with its remedy.

    Attributes:
      what: the thing.
      remedy: what to do about it.
      fatal: whether something that the user asked for cannot work; else it is a remark.
    """

    what: str
    remedy: str
    fatal: bool = True


@dataclasses.dataclass(kw_only=True)
class DoctorReport:
    """The sections of a report, each with its facts by name, and the troubles."""

    sections: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    troubles: list[Trouble] = dataclasses.field(default_factory=list)

    def add(self, title: str, facts: dict[str, Any], troubles: list[Trouble]) -> None:
        """Adds a section without the facts that are None."""
        self.sections[title] = {name: fact for name, fact in facts.items() if fact is not None}
        self.troubles += troubles

    @property
    def exit_code(self) -> int:
        """Returns 1 if something that the user asked for cannot work, else 0."""
        return int(any(trouble.fatal for trouble in self.troubles))

    def json(self) -> str:
        """Returns the report as JSON."""
        troubles = [trouble._asdict() for trouble in self.troubles]
        return json.dumps(without_secrets(self.sections | {"troubles": troubles}), indent=2)

    def text(self) -> str:
        """Returns the report as text, wrapped to the terminal."""
        columns = min(_MOST_COLUMNS, shutil.get_terminal_size((80, 24)).columns)
        lines = []
        for title, facts in without_secrets(self.sections).items():
            text = "; ".join(f"{name} {_fact_in_words(fact)}" for name, fact in facts.items())
            lines += _wrap_text(f"{title:11}", text, columns) if facts else []
        for trouble in sorted(self.troubles, key=lambda trouble: not trouble.fatal):
            head = "error: " if trouble.fatal else "remark: "
            lines += _wrap_text(head, without_secrets(f"{trouble.what}: {trouble.remedy}"), columns)
        if not self.troubles:
            lines.append("nothing is wrong")
        return "\n".join(lines)


def _wrap_text(head: str, text: str, columns: int) -> list[str]:
    """Returns a text after a head as wrapped lines with a hanging indent."""
    indent = " " * (11 if head.endswith(" ") and len(head) >= 11 else 2)
    return textwrap.wrap(
        head + text,
        columns,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _fact_in_words(fact: Any) -> str:
    """Returns a fact as text."""
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_fact_in_words(inner)}" for name, inner in fact.items())
    if isinstance(fact, list | tuple):
        return ", ".join(map(_fact_in_words, fact)) or "none"
    return str(fact)


def without_secrets(value: Any) -> Any:
    """Returns a value without tokens, passwords, and the names of the user and the host."""
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = _CREDENTIALS.sub("", _TOKEN.sub("hf_...", value))
    text = text.replace(str(Path.home()), "~")
    user = user_name()
    if user:  # in the name of a folder: as a word it may be any
        text = re.sub(rf"(?<=/){re.escape(user)}(?![\w.-])", "$USER", text)
    host = socket.gethostname()
    may_be_word = re.search(r"[^a-z]", host) is None
    if not may_be_word:
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])", "$HOSTNAME", text)
    return text


def user_name() -> str:
    """Returns the name of the user, or "" if the system does not report one."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def set_variables(names: Sequence[str], variables: Mapping[str, str]) -> list[str] | None:
    """Returns "NAME=value" for those of the named environment variables that are set, or None."""
    return [f"{name}={variables[name]}" for name in names if name in variables] or None
