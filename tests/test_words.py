"""Docstrings, messages and help texts begin with a subject or a verb, in one dialect."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "lora_jax").rglob("*.py"), *(ROOT / "train").rglob("*.py")])
# A relative clause, or a part of a sentence, that stands for a subject.
RIDDLE = re.compile(
    r"(What|That (of|which)|Those|Whether|Where|Which|Whose|Who|How|Of|In which|The same)\b"
)
# Sections have a line of their own: "Raises:", then what is raised, indented.
INLINE_SECTION = re.compile(r"^\s*(Raises|Returns) +[A-Z]\w+", re.MULTILINE)
# An argument described by a genitive or a pointer alone: "optimizer: of the adapter."
BARE = re.compile(r"^\s+\*{0,2}\w+(?:, \*{0,2}\w+)*: (of|those|see there|whose)\b", re.MULTILINE)
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


def test_no_text_begins_as_a_riddle():
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        texts = [*docstrings(tree), *help_texts(tree), *messages(tree)]
        found += [f"{path}:{n}: {t.splitlines()[0]}" for n, t in texts if RIDDLE.match(t)]
    assert found == []


def test_sections_stand_on_lines_of_their_own():
    found = [
        f"{path}:{line}: write a section, 'Raises:'"
        for path in SOURCES
        for line, text in docstrings(ast.parse(path.read_text()))
        if INLINE_SECTION.search(text.partition("\n")[2])
    ]
    assert found == []


def test_arguments_are_described_by_nouns():
    found = [
        f"{path}:{line}: {match[0].strip()} …: name the thing, 'dtype: dtype of the result'"
        for path in SOURCES
        for line, text in docstrings(ast.parse(path.read_text()))
        for match in BARE.finditer(text)
    ]
    assert found == []


def test_the_judge_sees_riddles():
    tree = ast.parse('def f():\n    """What one process cannot do."""\n    raise E(f"Of {f}")')
    assert [bool(RIDDLE.match(t)) for _, t in [*docstrings(tree), *messages(tree)]] == [True] * 2
    assert INLINE_SECTION.search("Does it.\n\n    Raises ValueError where it cannot.")
    bare = ["optimizer: of the adapter.", "inner: see there.", "tensors, n: those that move."]
    assert all(BARE.search(f"Does it.\n\nArgs:\n  {text}") for text in bare)
    assert not BARE.search("Does it.\n\nArgs:\n  dtype: dtype of the result; see `fit`.")
