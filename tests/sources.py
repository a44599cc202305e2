"""The statements of a file: judges of imports, names and texts need no expressions."""

import ast
from collections.abc import Iterator

_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a module or statement and those inside it; `ast.walk` takes ten times as long."""
    waiting = [node]
    while waiting:
        statement = waiting.pop()
        yield statement
        for name in _BLOCKS:
            waiting += getattr(statement, name, ())
