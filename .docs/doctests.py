"""Shows the examples of docstrings as code."""

import re

import griffe

# Lines of an example, from its first prompt to the end of its paragraph.
EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n *\n|\Z)", re.DOTALL | re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts fences around examples."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(match):
    """Returns an example between fences as far to the right as it is."""
    return f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"
