"""Reads the file of --many: one run per row, whose columns override the command line."""

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
    """The options of one run of a table.

    Attributes:
      name: the name of the run's folder.
      where: the row, for messages: "--many runs.csv, line 3".
      given: the names of the options in the row.
      options: the options of the command line with the values of the row and the run's folder.
    """

    name: str
    where: str
    given: frozenset[str]
    options: Config


def read_table(config: Config, plain: Config, on_line: Collection[str]) -> list[RunOptions[Config]]:
    """Returns the runs of the file of --many.

    Args:
      config: the options of the command line and of --config.
      plain: the script's default options.
      on_line: the names of the options on the command line and in the file of --config.

    Raises:
      UserError: the file cannot be read, or has a column or a value that no option takes; a name is
        missing or repeated; a column is an option that all runs share; or an option has no effect.
    """
    path = config.run.many  # type: ignore[attr-defined]
    for name, traits in traits_of(config).items():
        if traits.single and value_of(config, name):
            raise UserError(
                f"{flag('many', path)} trains a table of runs in one process, but {flag(name)} is "
                "for a single run. Remove one of the two options."
            )
    rows = []
    for location, cells in _read_cells(path, kinds_of(config)):
        rows.append(_parse_row(config, plain, location, cells))
    if not rows:
        raise UserError(f"{flag('many', path)} has no rows. Write one row per run.")
    _check_unique_names(rows)
    _check_command_line_options(rows, on_line)
    return rows


def check_one_base(rows: Sequence[RunOptions[Any]]) -> None:
    """Raises a UserError for a row whose adapter has another base than the first row's adapter.

    Args:
      rows: the runs with all defaults, some of which come from --init-adapter.
    """
    first_row = rows[0]
    traits = traits_of(first_row.options)
    base_options = [name for name, trait in traits.items() if trait.shared is SharedOption.BASE]
    for row in rows[1:]:
        for name in base_options:
            value = _comparable_value(row.options, name)
            first_value = _comparable_value(first_row.options, name)
            if value == first_value:
                continue
            subject = f"{row.where}: the adapter of {flag('init_adapter')}"
            first_location = _location_in_file(first_row)
            if name == "chat_template":
                raise UserError(
                    f"{subject} uses another chat template than the adapter of {first_location}, "
                    f"but all runs of a table share one base and template. Pass {flag(name)} on "
                    "the command line, or write a table for each template."
                )
            raise UserError(
                f"{subject} was trained with {flag(name)} {value}, but the adapter of "
                f"{first_location} was trained with {first_value}. All runs of a table share one "
                f"base. Pass {flag(name)} on the command line to choose one value for all runs, or "
                "write two tables."
            )


def _comparable_value(options: Options, name: str) -> object:
    """Returns the value of an option; for --chat-template, the text of the file."""
    value = value_of(options, name)
    if name == "chat_template" and value:
        return read_template(str(value))
    return value


def _parse_row(
    config: Config, plain: Config, where: str, cells: Mapping[str, yaml.Node]
) -> RunOptions[Config]:
    """Returns the run that a row describes.

    Args:
      config: the options of the command line and of --config.
      plain: the script's default options.
      where: the row, for messages.
      cells: the values of the row, by column.
    """
    values = _parse_cells(config, where, cells)
    name = _checked_name(values.pop(NAME, None), where)
    given = frozenset(option for option, value in values.items() if value is not None)
    # An option of the command line that excludes one of the row gets its default again.
    for option in excluded(config, given):
        values[option] = value_of(plain, option)
    values["output"] = str(Path(config.run.output) / name)
    options = replace_options(config, values)
    with as_user_errors(UserError, prefix=f"{where}: "):
        check_paths(options)
    if options.adapter.full:
        raise UserError(
            f"{where}: --full trains the base itself, which all runs of a table share. Start this "
            "run by itself, without --many."
        )
    if options.adapter.weight_tying:
        raise UserError(
            f"{where}: --weight-tying trains one vector for several weights, which adapters that "
            "train side by side do not support. Start this run by itself, without --many."
        )
    with as_user_errors(TrainingError, prefix=f"{where}: "):
        check_many(options.run.report_to, "a table of runs")
        check_effects(options, dataset_facts(options), given)
    return RunOptions(name=name, where=where, given=given, options=options)


def _parse_cells(config: Options, where: str, cells: Mapping[str, yaml.Node]) -> dict[str, Any]:
    """Returns the values of a row's options and of its name, in the options' types."""
    kinds = {**kinds_of(config), NAME: str}
    traits = traits_of(config)
    values: dict[str, Any] = {}
    for column, node in cells.items():
        option = _option_of_column(column)
        if option != NAME:
            _check_column(column, option, where, traits)
        if option in values:
            raise UserError(f"{where}: {column} is set twice. Remove one of the two columns.")
        values[option] = read_value(column, node, kinds[option], where)
    return values


def _check_column(column: str, option: str, where: str, traits: Mapping[str, Traits]) -> None:
    """Raises a UserError for a column that is not an option, or an option that all runs share."""
    if option not in traits:
        options_of_rows = [name for name, trait in traits.items() if trait.shared is None]
        raise UserError(f"{where}: {no_such_option(column, [NAME, *options_of_rows])}")
    reason = traits[option].shared
    if reason:
        raise UserError(
            f"{where}: {column} cannot differ between rows, because {reason.value}. Pass "
            f"{flag(option)} on the command line."
        )


def _checked_name(name: str | None, where: str) -> str:
    """Returns the name of a run's folder; raises a UserError for one that is missing or invalid."""
    if name is None:
        raise UserError(f"{where}: `{NAME}` is missing. Write a name for the run's folder.")
    if not re.fullmatch(r"[\w+=@-][\w .,+=@-]*", name) or name.endswith((" ", ".")):
        raise UserError(
            f"{where}: {NAME} is {name!r}, which is not a valid name of a folder. Use letters, "
            "digits and the characters . _ - + = @"
        )
    if name.casefold() == RESULTS:
        raise UserError(
            f"{where}: {NAME} is {name!r}, which is the file of the results. Choose another name."
        )
    return name


def _check_unique_names(rows: list[RunOptions[Any]]) -> None:
    """Raises a UserError for a name that two runs have."""
    rows_by_name: dict[str, RunOptions[Any]] = {}
    for row in rows:
        name = row.name.casefold()  # not every file system tells cases apart
        if name in rows_by_name:
            location = _location_in_file(rows_by_name[name])
            raise UserError(
                f"{row.where}: {NAME} is {row.name!r}, as in {location}, but each run needs a "
                "different folder. Choose another name."
            )
        rows_by_name[name] = row


def _check_command_line_options(rows: list[RunOptions[Any]], on_line: Collection[str]) -> None:
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


def _location_in_file(row: RunOptions[Any]) -> str:
    """Returns the location of a row in its file, such as "line 3"."""
    return row.where.rpartition(", ")[2]


def _read_cells(path: str, kinds: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the location of each row, and its cells that are not empty, by column."""
    file = Path(path).expanduser()
    option = flag("many", path)
    file_name = file.name.lower()
    if not file_name.endswith((*_TABLES, *_JSON, *_YAML)):
        endings = ", ".join((*_TABLES, *_JSON, *_YAML))
        raise UserError(f"{option} has an unknown file type. Use one of {endings}")
    if not file.is_file():
        raise UserError(f"{option}: there is no such file. Check the path.")
    if file_name.endswith(_YAML):
        yield from _read_yaml_cells(file, option)
    elif file_name.endswith(_TABLES):
        yield from _read_csv_cells(file, option, kinds)
    else:
        yield from _read_json_cells(file, option)


def _read_csv_cells(
    file: Path, option: str, kinds: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the location and the cells of each row of a CSV or TSV file; see `_read_cells`."""
    for row in read_csv(file):
        cells = {}
        for column, text in row.items():
            if text.strip():
                kind = kinds.get(_option_of_column(column.strip()))
                cells[column.strip()] = _parse_csv_cell(text.strip(), kind)
        yield f"{option}, {row.place[1]}", cells


def _read_json_cells(file: Path, option: str) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the location and the cells of each row of a JSON file; see `_read_cells`."""
    for row in read_json(file):
        location = str(row.place[1])
        # A file in one line: the name of the run tells rows apart.
        has_several_in_line = " row " in location
        if has_several_in_line and isinstance(row.get(NAME), str):
            location += f" ({row[NAME]})"
        cells = {name: _json_node(value) for name, value in row.items() if value is not None}
        yield f"{option}, {location}", cells


def _read_yaml_cells(file: Path, option: str) -> Iterator[tuple[str, dict[str, yaml.Node]]]:
    """Yields the location and the cells of each run of a YAML file; see `_read_cells`."""
    root = read_yaml(file, option)
    if not isinstance(root, yaml.SequenceNode):
        raise UserError(
            f"{option} is not a list of runs. Write a list in which each run has its options by "
            "their names."
        )
    for row in root.value:
        where = f"{option}, line {row.start_mark.line + 1}"
        if not isinstance(row, yaml.MappingNode):
            raise UserError(
                f"{where} has no options by their names. Write options such as 'rank: 8'."
            )
        cells: dict[str, yaml.Node] = {}
        for key, value, _ in entries(row, option):
            if key in cells:
                raise UserError(f"{where}: {key} is set twice. Remove one of the two lines.")
            if value.tag != f"{_TAG}null":
                cells[key] = value
        yield where, cells


def _parse_csv_cell(text: str, kind: Any) -> yaml.Node:
    """Returns the YAML node of a cell, which is a list for an option that takes several values."""
    takes_several = typing.get_origin(kind) is tuple
    if not takes_several:
        return _plain_scalar(text)
    # Split at spaces, except within quotes.
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError:  # a quotation mark that is part of a word
        words = text.split()
    return yaml.SequenceNode(f"{_TAG}seq", [_plain_scalar(word) for word in words])


def _plain_scalar(text: str) -> yaml.ScalarNode:
    """Returns the YAML node of a text without quotes."""
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def _json_node(value: Any) -> yaml.Node:
    """Returns the YAML node of a JSON value."""
    if isinstance(value, dict):
        pairs = [(_json_node(key), _json_node(item)) for key, item in value.items()]
        return yaml.MappingNode(f"{_TAG}map", pairs)
    if isinstance(value, list):
        return yaml.SequenceNode(f"{_TAG}seq", [_json_node(item) for item in value])
    if isinstance(value, str):
        return yaml.ScalarNode(f"{_TAG}str", value, style='"')
    return _plain_scalar(json.dumps(value))


def _option_of_column(column: str) -> str:
    """Returns the name of the option that a column sets."""
    return column.replace("-", "_")
