"""Writes names and data into Markdown as plain text."""

import re

# An underscore within a word, as in lora_alpha, is no markup.
_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")


def escape_markdown(text: str) -> str:
    """Returns a text as one line of Markdown that shows just it: no markup, HTML or new line."""
    line = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return re.sub(r"^([-+]|\d+[.)])(?= )", r"\\\1", line)
