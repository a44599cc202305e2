"""Pages of the reference: the API out of docstrings, options of commands out of their fields."""

import functools
import textwrap
from pathlib import Path
from unittest import mock

import griffe

from train import command
from train.console import help as console_help

ROOT = Path(__file__).parent.parent
# The modules whose public names have docstrings for users.
MODULES = (
    "lora_jax",
    "lora_jax.init",
    "lora_jax.optim",
    "lora_jax.sharding",
    "lora_jax.quantized",
    "lora_jax.bank",
    "lora_jax.subspace",
    "lora_jax.models",
    "lora_jax.peft",
    "lora_jax.torch",
    "lora_jax.training",
    "lora_jax.training.losses",
)
# The commands whose own words name a kind of run first.
KINDS = {"compare": ("sft", "classify")}


def pages():
    """Returns the pages of the reference, by their addresses."""
    made, shown = {}, set()
    for name in MODULES:
        paths = [path for path in paths_of(module_of(name)) if path not in shown]
        shown.update(paths)
        made[f"reference/{name}.md"] = api_page(name, paths)
    return made | {f"reference/commands/{name}.md": command_page(name) for name in command.COMMANDS}


@functools.cache
def package():
    """Returns the library as griffe reads it, without an import."""
    return griffe.load("lora_jax", search_paths=[ROOT], resolve_aliases=True)


def module_of(name):
    """Returns a module by its full name."""
    return package()[name.partition(".")[2]] if "." in name else package()


def paths_of(module):
    """Yields the paths at which a module's public functions and classes are defined."""
    for name in sorted(module.members, key=str.lower):
        value = module.members[name]
        if not value.is_public or value.is_alias and not value.target_path.startswith("lora_jax."):
            continue
        value = value.final_target if value.is_alias else value
        if value.is_module:  # of which a function of the same name is imported: `lorafy`
            value = value.members.get(name, value)
        if (value.is_function or value.is_class) and value.has_docstring:
            yield value.path


def api_page(name, paths):
    """Returns the page of a module: a line for each public name, which mkdocstrings fills in."""
    about = module_of(name).docstring.value.partition("\n\n")[0]
    return "\n\n".join([f"# `{name}`", about, *(f"::: {path}" for path in paths)]) + "\n"


def command_page(name):
    """Returns the page of a command: what it does, an example, and all of its options."""
    parts = [f"# `lora-jax {name}`", command.COMMANDS[name].capitalize() + "."]
    for words in [[kind] for kind in KINDS.get(name, ())] or [[]]:
        if words:
            parts.append(f"## `lora-jax {name} {words[0]}`")
        parts += options_of(name, words)
    return "\n\n".join(parts) + "\n"


def options_of(name, words):
    """Returns the parts of a page about the options of a command.

    Args:
      name: the command.
      words: those before `--help-all`.
    """
    asked, printed = [], []

    def note(kind, script, everything, columns, default=None):
        asked.append((kind, default))
        return ""

    with (
        mock.patch.object(console_help, "help_text", note),
        mock.patch("builtins.print", lambda *texts, **how: printed.extend(texts)),
        mock.patch("sys.argv", ["lora-jax"]),
    ):
        try:
            command.main([name, *words, "--help-all"])
        except SystemExit as ended:
            assert not ended.code, (name, ended.code)
    if not asked:
        return ["```text\n" + "\n".join(map(str, printed)) + "\n```"]
    ((kind, default),) = asked
    page = kind.HELP
    parts = [f"```sh\nlora-jax {' '.join([name, *words])} {page.example}\n```"]
    for title, rows in console_help._option_groups(kind, default):
        if rows := list(rows):
            parts.append(f"## {title}")
            parts += [definition(row) for row in rows]
    return parts


def definition(row):
    """Returns an option as an item of a list of definitions."""
    text = textwrap.fill(escaped(row.text), 96, initial_indent=":   ", subsequent_indent="    ")
    return f"`{row.head}`\n{text}"


def escaped(text):
    """Returns a text in which Markdown has no marks."""
    for mark in "\\*_<[|":
        text = text.replace(mark, "\\" + mark)
    return text
