"""Writes names and data into Markdown as plain text."""

import re
from collections.abc import Iterable, Sequence

# An underscore within a word, as in lora_alpha, is no markup.
_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in GitHub's Markdown; the cells are Markdown already."""
    lines = [header, *rows]
    head, *body = ("".join(f"| {cell} " if cell else "| " for cell in line) for line in lines)
    return "\n".join(f"{line}|" for line in (head, "|---" * len(header), *body))


def escape_markdown(text: str) -> str:
    """Returns a text as one line of Markdown that shows just it: no markup, HTML or new line."""
    line = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return re.sub(r"^([-+]|\d+[.)])(?= )", r"\\\1", line)
