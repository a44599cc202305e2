"""A table of runs: the file of --many, a row a run, whose columns override the command line."""

import json
import re
import shlex
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

from lora_jax.training.errors import TrainingError
from train.adapters.template import read_template
from train.console.errors import UserError, as_user_errors, flag
from train.data.text_files import read_csv, read_json
from train.options.common import Options
from train.options.field import (
    SharedOption,
    Traits,
    check_effects,
    excluded,
    idle_options,
    traits_of,
)
from train.options.file import (
    entries,
    kinds_of,
    no_such_option,
    read_value,
    replace_options,
    value_of,
)
from train.options.paths import check_paths
from train.reporters.registry import check_many
from train.settings.files import read_yaml
from train.settings.tasks import dataset_facts

Config = TypeVar("Config", bound=Options)

NAME = "name"  # the column that names the runs
RESULTS = "runs.csv"  # the table of their results, beside their folders

_TABLES = (".csv", ".tsv")
_JSON = (".jsonl", ".ndjson", ".json")
_YAML = (".yaml", ".yml")
_TAG = "tag:yaml.org,2002:"


class RunOptions(NamedTuple, Generic[Config]):
    """A run of a table.

    Attributes:
      name: name of its folder.
      where: the row, for messages: "--many runs.csv, line 3".
      given: the names of the options in the row.
      options: the options of the command line, changed as the row says, with the run's own folder.
    """

    name: str
    where: str
    given: frozenset[str]
    options: Config


def read_table(config: Config, plain: Config, on_line: Collection[str]) -> list[RunOptions[Config]]:
    """Returns the runs of the file of --many.

    Args:
      config: the options of the command line and of --config.
      plain: the options of the script, none of them given.
      on_line: the names of the options on the command line and in the file of --config.

    Raises:
      UserError: the file cannot be read, or has a column or a value that no option takes; a name is
        missing or stands there twice; a column is about what all runs share; or an option has no
        effect.
    """
    path = config.run.many  # type: ignore[attr-defined]
    for name, traits in traits_of(config).items():
        if traits.single and value_of(config, name):
            raise UserError(
                f"{flag('many', path)}: {flag(name)} is for a single run, and a table of runs has "
                "one process: leave out one of them"
            )
    rows = [_row(config, plain, where, cells) for where, cells in _cells(path, kinds_of(config))]
    if not rows:
        raise UserError(f"{flag('many', path)}: the file has no rows: give a run a row")
    _check_names(rows)
    _check_line(rows, on_line)
    return rows


def check_one_base(rows: Sequence[RunOptions[Any]]) -> None:
    """Raises a UserError for a row whose adapter begins on another base than the first row's.

    Args:
      rows: with all defaults, some of which are those of --init-adapter.
    """
    traits = traits_of(rows[0].options)
    of_base = [name for name, trait in traits.items() if trait.shared is SharedOption.BASE]
    for row in rows[1:]:
        for name in of_base:
            here, there = (_base_option(each.options, name) for each in (row, rows[0]))
            if here != there and name == "chat_template":
                raise UserError(
                    f"{row.where}: {flag('init_adapter')}: this adapter goes with another chat "
                    f"template than that of {_place(rows[0])}; all runs of a table share one base "
                    f"with its template: give {flag(name)} on the command line, or a table to each "
                    "template"
                )
            if here != there:
                raise UserError(
                    f"{row.where}: {flag('init_adapter')}: this adapter is over a base with "
                    f"{flag(name)} {here}, and that of {_place(rows[0])} over one with {there}; "
                    f"all runs of a table share one base: give {flag(name)} on the command line, "
                    "or a table to each base"
                )


def _base_option(options: Options, name: str) -> object:
    """Returns the value of an option; of --chat-template the text of the file."""
    value = value_of(options, name)
    return read_template(str(value)) if name == "chat_template" and value else value


def _row(
    config: Config, plain: Config, where: str, cells: Mapping[str, yaml.Node]
) -> RunOptions[Config]:
    kinds, traits = kinds_of(config), traits_of(config)
    values: dict[str, Any] = {}
    for column, node in cells.items():
        option = _option(column)
        if option != NAME:
            _check_column(column, option, where, traits)
        if option in values:
            raise UserError(f"{where}: {column} is given twice: leave out one")
        values[option] = read_value(column, node, str if option == NAME else kinds[option], where)
    name = _checked_name(values.pop(NAME, None), where)
    given = frozenset(option for option, value in values.items() if value is not None)
    values |= {option: value_of(plain, option) for option in excluded(config, given)}
    changed = replace_options(config, {**values, "output": str(Path(config.run.output) / name)})
    with as_user_errors(UserError, prefix=f"{where}: "):
        check_paths(changed)
    if changed.adapter.full:
        raise UserError(
            f"{where}: --full trains the base itself, which the runs of a table share: run it "
            "alone, without --many"
        )
    if changed.adapter.weight_tying:
        raise UserError(
            f"{where}: --weight-tying trains one vector for several weights, which adapters side "
            "by side cannot: run it alone, without --many"
        )
    with as_user_errors(TrainingError, prefix=f"{where}: "):
        check_many(changed.run.report_to, "a table of runs")
        check_effects(changed, dataset_facts(changed), given)
    return RunOptions(name, where, given, changed)


def _check_column(column: str, option: str, where: str, traits: Mapping[str, Traits]) -> None:
    if option not in traits:
        known = [name for name, trait in traits.items() if trait.shared is None]
        raise UserError(f"{where}: {no_such_option(column, [NAME, *known])}")
    if why := traits[option].shared:
        raise UserError(
            f"{where}: {column} cannot differ between rows: {why.value}. Give {flag(option)} on "
            "the command line"
        )


def _checked_name(name: str | None, where: str) -> str:
    if name is None:
        raise UserError(f"{where}: `{NAME}` is missing: the name of the run's folder is needed")
    if not re.fullmatch(r"[\w+=@-][\w .,+=@-]*", name) or name.endswith((" ", ".")):
        raise UserError(
            f"{where}: {NAME} is {name!r}: the name of a folder is needed, of letters, digits and "
            "any of . _ - + = @"
        )
    if name.casefold() == RESULTS:
        raise UserError(
            f"{where}: {NAME} is {name!r}, where the results are written: choose another"
        )
    return name


def _check_names(rows: list[RunOptions[Any]]) -> None:
    seen: dict[str, RunOptions[Any]] = {}
    for row in rows:
        first = seen.setdefault(row.name.casefold(), row)  # not every file system tells cases apart
        if first is not row:
            raise UserError(
                f"{row.where}: {NAME} is {row.name!r}, and so it is in {_place(first)}: each run "
                "has a folder of its own"
            )


def _check_line(rows: list[RunOptions[Any]], on_line: Collection[str]) -> None:
    """Raises a UserError for an option on the command line that has an effect in no row."""
    for option in sorted(on_line):
        if all(
            option in row.given or option in idle_options(row.options, dataset_facts(row.options))
            for row in rows
        ):
            of_none = next((row for row in rows if option not in row.given), None)
            if of_none is not None:
                check_effects(of_none.options, dataset_facts(of_none.options), {option})


def _place(row: RunOptions[Any]) -> str:
    return row.where.rpartition(", ")[2]


def _cells(path: str, kinds: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the place of each row and its cells, by column; leaves out cells that are empty."""
    file, asked = Path(path).expanduser(), flag("many", path)
    kind = file.name.lower()
    if not kind.endswith((*_TABLES, *_JSON, *_YAML)):
        endings = ", ".join((*_TABLES, *_JSON, *_YAML))
        raise UserError(f"{asked}: a file of one of the kinds {endings} is needed")
    if not file.is_file():
        raise UserError(f"{asked}: there is no such file")
    if kind.endswith(_YAML):
        yield from _yaml_cells(file, asked)
        return
    if kind.endswith(_TABLES):
        for row in read_csv(file):
            texts = {column.strip(): text.strip() for column, text in row.items()}
            given = {
                c: _text_node(text, kinds.get(_option(c))) for c, text in texts.items() if text
            }
            yield f"{asked}, {row.place[1]}", given
        return
    for row in read_json(file):
        values = {column: value for column, value in row.items() if value is not None}
        where = str(row.place[1])
        if " row " in where and isinstance(values.get(NAME), str):  # of several in one line
            where += f" ({values[NAME]})"
        yield f"{asked}, {where}", {c: _json_node(value) for c, value in values.items()}


def _yaml_cells(file: Path, asked: str) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    root = read_yaml(file, asked)
    if not isinstance(root, yaml.SequenceNode):
        raise UserError(f"{asked}: a list of runs is needed, each with its options by their names")
    for row in root.value:
        where = f"{asked}, line {row.start_mark.line + 1}"
        if not isinstance(row, yaml.MappingNode):
            raise UserError(f"{where}: a run needs options by their names, such as 'rank: 8'")
        cells: dict[str, yaml.Node] = {}
        for key, value, _ in entries(row, asked):
            if key in cells:
                raise UserError(f"{where}: {key} is given twice: leave out one")
            if value.tag != f"{_TAG}null":
                cells[key] = value
        yield where, cells


def _text_node(text: str, kind: Any) -> yaml.Node:
    """Returns a cell as YAML has it; that of an option that takes several words is their list."""
    if typing.get_origin(kind) is not tuple:
        return _scalar(text)
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters, words.escape = True, "", ""
    try:
        return yaml.SequenceNode(f"{_TAG}seq", [_scalar(word) for word in words])
    except ValueError:  # a quotation mark that is part of a word
        return yaml.SequenceNode(f"{_TAG}seq", [_scalar(word) for word in text.split()])


def _scalar(text: str) -> yaml.ScalarNode:
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def _json_node(value: Any) -> yaml.Node:
    if isinstance(value, dict):
        pairs = [(_json_node(key), _json_node(item)) for key, item in value.items()]
        return yaml.MappingNode(f"{_TAG}map", pairs)
    if isinstance(value, list):
        return yaml.SequenceNode(f"{_TAG}seq", [_json_node(item) for item in value])
    if isinstance(value, str):
        return yaml.ScalarNode(f"{_TAG}str", value, style='"')
    return _scalar(json.dumps(value))


def _option(column: str) -> str:
    return column.replace("-", "_")
