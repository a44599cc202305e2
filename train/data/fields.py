"""Gives the fields of rows the names that they have here."""

from collections.abc import Sequence

from lora_jax.training.data.rows import FORMS, Row, field_names, moved, name_of
from train.run.errors import UserError

_KNOWN = sorted({name for form in FORMS for name in form} | {"input", "tools"})


def renamed(rows: list[Row], fields: Sequence[str], source: str) -> list[Row]:
    """Returns rows with other names of their fields.

    Args:
      rows: the rows, as they were read.
      fields: the option --fields: `prompt=question`, one or several, also parted by commas.
      source: the name of the rows in messages.

    Raises:
      UserError: a name is none that rows have here, or a row lacks a field.
    """
    pairs = [pair.partition("=")[::2] for field in fields for pair in field.split(",")]
    if not pairs:
        return rows
    for name, own in pairs:
        if name not in _KNOWN or not own:
            raise UserError(
                f"--fields {' '.join(fields)}: give name=field, the name being one of "
                f"{', '.join(_KNOWN)}"
            )
    own_names = {own for _, own in pairs}
    found = []
    for number, row in enumerate(rows, start=1):
        for own in own_names - {*row}:
            raise UserError(
                f"--fields {' '.join(fields)}: {name_of(row, source, number)} has "
                f"{field_names(row)}, and no `{own}`"
            )
        others = {name: value for name, value in row.items() if name not in own_names}
        found.append(moved(row, others | {name: row[own] for name, own in pairs}))
    return found
