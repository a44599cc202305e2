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
    rows = []
    for location, cells in _cells(path, kinds_of(config)):
        rows.append(_row(config, plain, location, cells))
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
    first_row = rows[0]
    traits = traits_of(first_row.options)
    base_options = [name for name, trait in traits.items() if trait.shared is SharedOption.BASE]
    for row in rows[1:]:
        for name in base_options:
            value = _base_option(row.options, name)
            first_value = _base_option(first_row.options, name)
            if value == first_value:
                continue
            start = f"{row.where}: {flag('init_adapter')}: this adapter"
            first_place = _place_of(first_row)
            if name == "chat_template":
                raise UserError(
                    f"{start} goes with another chat template than that of {first_place}; all runs "
                    f"of a table share one base with its template: give {flag(name)} on the "
                    "command line, or a table to each template"
                )
            raise UserError(
                f"{start} is over a base with {flag(name)} {value}, and that of {first_place} over "
                f"one with {first_value}; all runs of a table share one base: give {flag(name)} on "
                "the command line, or a table to each base"
            )


def _base_option(options: Options, name: str) -> object:
    """Returns the value of an option; of --chat-template the text of the file."""
    value = value_of(options, name)
    if name == "chat_template" and value:
        return read_template(str(value))
    return value


def _row(
    config: Config, plain: Config, where: str, cells: Mapping[str, yaml.Node]
) -> RunOptions[Config]:
    """Returns the run of a row.

    Args:
      config: the options of the command line and of --config.
      plain: the options of the script, none of them given.
      where: the row, for messages.
      cells: the values of the row, by column.
    """
    values = _values_of_row(config, where, cells)
    name = _checked_name(values.pop(NAME, None), where)
    given = frozenset(option for option, value in values.items() if value is not None)
    for option in excluded(config, given):
        values[option] = value_of(plain, option)
    values["output"] = str(Path(config.run.output) / name)
    options = replace_options(config, values)
    with as_user_errors(UserError, prefix=f"{where}: "):
        check_paths(options)
    if options.adapter.full:
        raise UserError(
            f"{where}: --full trains the base itself, which the runs of a table share: run it "
            "alone, without --many"
        )
    if options.adapter.weight_tying:
        raise UserError(
            f"{where}: --weight-tying trains one vector for several weights, which adapters side "
            "by side cannot: run it alone, without --many"
        )
    with as_user_errors(TrainingError, prefix=f"{where}: "):
        check_many(options.run.report_to, "a table of runs")
        check_effects(options, dataset_facts(options), given)
    return RunOptions(name=name, where=where, given=given, options=options)


def _values_of_row(config: Options, where: str, cells: Mapping[str, yaml.Node]) -> dict[str, Any]:
    """Returns the values of a row's options and of its name, each of its type."""
    kinds = {**kinds_of(config), NAME: str}
    traits = traits_of(config)
    values: dict[str, Any] = {}
    for column, node in cells.items():
        option = _option(column)
        if option != NAME:
            _check_column(column, option, where, traits)
        if option in values:
            raise UserError(f"{where}: {column} is given twice: leave out one")
        values[option] = read_value(column, node, kinds[option], where)
    return values


def _check_column(column: str, option: str, where: str, traits: Mapping[str, Traits]) -> None:
    """Raises a UserError for a column that is no option, or one that all runs share."""
    if option not in traits:
        options_of_rows = [name for name, trait in traits.items() if trait.shared is None]
        raise UserError(f"{where}: {no_such_option(column, [NAME, *options_of_rows])}")
    reason = traits[option].shared
    if reason:
        raise UserError(
            f"{where}: {column} cannot differ between rows: {reason.value}. Give {flag(option)} on "
            "the command line"
        )


def _checked_name(name: str | None, where: str) -> str:
    """Returns the name of a run's folder; raises a UserError for one that is missing or invalid."""
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
    """Raises a UserError for a name that two runs have."""
    rows_by_name: dict[str, RunOptions[Any]] = {}
    for row in rows:
        name = row.name.casefold()  # not every file system tells cases apart
        if name in rows_by_name:
            location = _place_of(rows_by_name[name])
            raise UserError(
                f"{row.where}: {NAME} is {row.name!r}, and so it is in {location}: each run has a "
                "folder of its own"
            )
        rows_by_name[name] = row


def _check_line(rows: list[RunOptions[Any]], on_line: Collection[str]) -> None:
    """Raises a UserError for an option on the command line that has an effect in no row."""
    for option in sorted(on_line):
        rows_without = [row for row in rows if option not in row.given]
        has_effect = any(
            option not in idle_options(row.options, dataset_facts(row.options))
            for row in rows_without
        )
        if rows_without and not has_effect:
            options = rows_without[0].options
            check_effects(options, dataset_facts(options), {option})


def _place_of(row: RunOptions[Any]) -> str:
    """Returns the place of a row in its file: "line 3"."""
    return row.where.rpartition(", ")[2]


def _cells(path: str, kinds: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the place of each row and its cells, by column; leaves out cells that are empty."""
    file = Path(path).expanduser()
    option = flag("many", path)
    file_name = file.name.lower()
    if not file_name.endswith((*_TABLES, *_JSON, *_YAML)):
        endings = ", ".join((*_TABLES, *_JSON, *_YAML))
        raise UserError(f"{option}: a file of one of the kinds {endings} is needed")
    if not file.is_file():
        raise UserError(f"{option}: there is no such file")
    if file_name.endswith(_YAML):
        yield from _yaml_cells(file, option)
    elif file_name.endswith(_TABLES):
        yield from _csv_cells(file, option, kinds)
    else:
        yield from _json_cells(file, option)


def _csv_cells(
    file: Path, option: str, kinds: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the place and the cells of each row of a CSV or TSV file; see `_cells`."""
    for row in read_csv(file):
        cells = {}
        for column, text in row.items():
            if text.strip():
                kind = kinds.get(_option(column.strip()))
                cells[column.strip()] = _text_node(text.strip(), kind)
        yield f"{option}, {row.place[1]}", cells


def _json_cells(file: Path, option: str) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the place and the cells of each row of a JSON file; see `_cells`."""
    for row in read_json(file):
        location = str(row.place[1])
        has_several_in_line = " row " in location
        if has_several_in_line and isinstance(row.get(NAME), str):
            location += f" ({row[NAME]})"
        cells = {name: _json_node(value) for name, value in row.items() if value is not None}
        yield f"{option}, {location}", cells


def _yaml_cells(file: Path, option: str) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the place and the cells of each run of a YAML file; see `_cells`."""
    root = read_yaml(file, option)
    if not isinstance(root, yaml.SequenceNode):
        raise UserError(f"{option}: a list of runs is needed, each with its options by their names")
    for row in root.value:
        where = f"{option}, line {row.start_mark.line + 1}"
        if not isinstance(row, yaml.MappingNode):
            raise UserError(f"{where}: a run needs options by their names, such as 'rank: 8'")
        cells: dict[str, yaml.Node] = {}
        for key, value, _ in entries(row, option):
            if key in cells:
                raise UserError(f"{where}: {key} is given twice: leave out one")
            if value.tag != f"{_TAG}null":
                cells[key] = value
        yield where, cells


def _text_node(text: str, kind: Any) -> yaml.Node:
    """Returns a cell as YAML has it; that of an option that takes several words is their list."""
    takes_several = typing.get_origin(kind) is tuple
    if not takes_several:
        return _scalar(text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError:  # a quotation mark that is part of a word
        words = text.split()
    return yaml.SequenceNode(f"{_TAG}seq", [_scalar(word) for word in words])


def _scalar(text: str) -> yaml.ScalarNode:
    """Returns a text as YAML reads it without quotes."""
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def _json_node(value: Any) -> yaml.Node:
    """Returns a value of JSON as YAML has it."""
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
