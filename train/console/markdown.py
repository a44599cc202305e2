"""Writes names and data into Markdown as plain text."""

import re
from collections.abc import Iterable, Sequence

# An underscore within a word, as in lora_alpha, is no markup.
_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in GitHub's Markdown, from cells that are Markdown."""
    lines = [_table_line(header), "|---" * len(header) + "|"]
    lines += [_table_line(row) for row in rows]
    return "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    """Returns a row of a table."""
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def escape_markdown(text: str) -> str:
    """Returns text as one line of Markdown, with all markup and HTML escaped."""
    line = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return re.sub(r"^([-+]|\d+[.)])(?= )", r"\\\1", line)
