"""Renames the fields of rows, as --fields asks."""

from collections.abc import Sequence

from lora_jax.training.data.rows import FORMS, Row, field_names, moved, name_of
from train.console.errors import UserError, flag

_KNOWN = sorted({name for form in FORMS for name in form} | {"input", "tools"})

Pairs = list[tuple[str, str]]


def pairs_of(fields: Sequence[str]) -> Pairs:
    """Returns (name, the name in the rows) of each field in --fields.

    Args:
      fields: the option: `prompt=question`, one or several, also parted by commas.

    Raises:
      UserError: a name is not that of a known field.
    """
    pairs = [pair.partition("=")[::2] for field in fields for pair in field.split(",")]
    for name, own in pairs:
        if name not in _KNOWN or not own:
            raise UserError(
                f"{flag('fields', *fields)}: give name=field, where name is one of "
                f"{', '.join(_KNOWN)}"
            )
    return pairs


def found_in(rows: Sequence[Row], pairs: Pairs) -> Pairs:
    """Returns the pairs whose fields the first row has."""
    return [(name, own) for name, own in pairs if rows and own in rows[0]]


def renamed(rows: list[Row], pairs: Pairs, source: str) -> list[Row]:
    """Returns rows with their fields renamed.

    Args:
      rows: the rows, as they were read.
      pairs: the names; see `pairs_of`.
      source: the name of the rows in messages.

    Raises:
      UserError: a row lacks a field, or two fields would have one name.
    """
    if not pairs:
        return rows
    given = flag("fields", *(f"{name}={own}" for name, own in pairs))
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{given}: {source} has two fields for `{twice[0]}`")
    own_names = {own for _, own in pairs}
    found = []
    for number, row in enumerate(rows, start=1):
        for own in own_names - {*row}:
            raise UserError(
                f"{given}: {name_of(row, source, number)} has {field_names(row)}, and no `{own}`"
            )
        others = {name: value for name, value in row.items() if name not in own_names}
        found.append(moved(row, others | {name: row[own] for name, own in pairs}))
    return found
