"""Docstrings, messages and help texts begin with a subject or a verb, in one dialect."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "lora_jax").rglob("*.py"), *(ROOT / "train").rglob("*.py")])
# A relative clause, or a part of a sentence, that stands for a subject.
RIDDLE = re.compile(
    r"(What|That (of|which)|Those|Whether|Where|Which|Whose|Who|How|Of|In which|The same)\b"
)
# Sections have a line of their own: "Raises:", then what is raised, indented.
INLINE_SECTION = re.compile(r"^\s*(Raises|Returns) +[A-Z]\w+", re.MULTILINE)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def help_texts(tree):
    """The strings that stand below a field of a class: `tyro` shows them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for one in node.body[1:]:
                if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                    yield one.lineno, str(one.value.value)


def messages(tree):
    """The texts of errors that are raised, from their first words on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            first = node.exc.args[0]
            if isinstance(first, ast.JoinedStr) and first.values:
                first = first.values[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_text_begins_as_a_riddle(path):
    tree = ast.parse(path.read_text())
    texts = [*docstrings(tree), *help_texts(tree), *messages(tree)]
    assert [f"{line}: {t.splitlines()[0]}" for line, t in texts if RIDDLE.match(t)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sections_stand_on_lines_of_their_own(path):
    for line, text in docstrings(ast.parse(path.read_text())):
        _, _, rest = text.partition("\n")
        assert not INLINE_SECTION.search(rest), f"line {line}: write a section, 'Raises:'"


def test_the_judge_sees_riddles():
    tree = ast.parse('def f():\n    """What one process cannot do."""\n    raise E(f"Of {f}")')
    assert [bool(RIDDLE.match(t)) for _, t in [*docstrings(tree), *messages(tree)]] == [True] * 2
    assert INLINE_SECTION.search("Does it.\n\n    Raises ValueError where it cannot.")
