"""Prints how densely each package is written, and which of its names do not say what they hold.

``python -m tests.readability [FOLDER ...]`` prints a line for each package of `lora_jax` and
`train`, or for each folder that is named. The counts point at places to read again. They judge
nothing.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Adjectives, participles, adverbs, pronouns and prepositions, which could stand for anything.
VAGUE = frozenset(
    """
    after again alone apart asked at back before both each every few first found given gone here
    how kept known last least made many most named new next now numbers of old one other others
    own part parts place placed put rest said same seen shown some taken there thing things
    together told used wanted what where whether which whole why
    """.split()
)
NO_CODE = frozenset(
    getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
)
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Counts(NamedTuple):
    """The counts of some code, without docstrings, comments and imports.

    Attributes:
      n_tokens: the number of tokens.
      n_lines: the number of lines that hold them.
      names: how often each name is bound, as an argument or by an assignment.
    """

    n_tokens: int
    n_lines: int
    names: Counter[str]


def count(text: str) -> Counts:
    """Returns the counts of a file's text."""
    tree = ast.parse(text)
    skipped_lines = {line for node in _not_counted(tree) for line in _lines_of(node)}
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE and token.start[0] not in skipped_lines
    ]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return Counts(len(tokens), len(lines), Counter(_bound_names(tree)))


def _not_counted(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yields the docstrings and the imports."""
    for node in ast.walk(tree):
        if isinstance(node, Definition) and ast.get_docstring(node) is not None:
            yield node.body[0]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _lines_of(node: ast.stmt) -> range:
    """Returns the lines of a statement."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Yields the name of each argument, and of each variable where it is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def table_line(folder: Path) -> str:
    """Returns the line of a folder: its tokens, and its vague names with the most frequent ones."""
    counts = [count(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))]
    n_tokens = sum(file.n_tokens for file in counts)
    n_lines = sum(file.n_lines for file in counts)
    names = sum((file.names for file in counts), Counter())
    vague = Counter({name: n for name, n in names.items() if name in VAGUE})
    tokens_a_line = n_tokens / max(n_lines, 1)
    vague_share = vague.total() / max(names.total(), 1)
    frequent = ", ".join(f"{name} {n}" for name, n in vague.most_common(6))
    title = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return f"{title!s:24} {n_tokens:8,} {tokens_a_line:8.1f} {vague_share:8.1%}  {frequent}"


def packages() -> list[Path]:
    """Returns the folders of `lora_jax` and `train` that hold code."""
    folders = [path for top in ("lora_jax", "train") for path in sorted((ROOT / top).iterdir())]
    return [path for path in folders if (path / "__init__.py").is_file()]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    print(f"{'package':24} {'tokens':>8} {'a line':>8} {'vague':>8}  the most frequent vague names")
    for folder in [Path(name).resolve() for name in arguments] or packages():
        print(table_line(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
