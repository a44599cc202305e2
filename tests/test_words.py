"""Names say what they name, and texts begin with a subject or a verb, in one dialect."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.sources import statements

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
# A verb whose object is a relative clause: "Returns what was read", where a noun is meant.
CLAUSE = re.compile(
    r"(?:Returns|Yields) (?:what|how|which|whether|that|those|where|why|who|whose|when)\b"
    r"|[A-Z]\w+s (?:what|how|which|those|where|why|who|whose|when)\b"
)
# Names that begin with a preposition name neither a thing nor an action. Conversions are idiom:
# from_hf, to_hf, as_array, with_name.
PREPOSITION = re.compile(r"_?(?:of|in|at|for|on|by|under|over|between|into|per)(?:_|$)")
# Classes whose names may stand in several files.
SHARED_CLASS_NAMES = {
    "Config": "the options of a script, which each script has: `sft.Config`, `dpo.Config`"
}
# Methods of public classes, whose names users have: `Layout.of`, `Order.of`, `Examples.by_name`.
PUBLIC_METHODS = {
    "lora_jax/training/layout.py": {"of", "of_parameter", "of_batch"},
    "lora_jax/training/data/order.py": {"of"},
    "lora_jax/training/data/batches.py": {"by_name", "by_length"},
    "lora_jax/training/data/labelled.py": {"by_name"},
    "lora_jax/training/data/vision/images.py": {"by_name"},
}
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree):
    for node in statements(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def help_texts(tree):
    """The strings that stand below a field of a class: `tyro` shows them."""
    for node in statements(tree):
        if isinstance(node, ast.ClassDef):
            for one in node.body[1:]:
                if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                    yield one.lineno, str(one.value.value)


def messages(tree):
    """The texts of errors that are raised, from their first words on."""
    for node in statements(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            first = node.exc.args[0]
            if isinstance(first, ast.JoinedStr) and first.values:
                first = first.values[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


@pytest.fixture(scope="module")
def trees():
    """The parsed files, by their paths."""
    return {path: ast.parse(path.read_text()) for path in SOURCES}


@pytest.fixture(scope="module")
def documented(trees):
    """The path, line and text of each docstring."""
    return [(path, *one) for path, tree in trees.items() for one in docstrings(tree)]


def test_no_text_begins_as_a_riddle(trees):
    found = []
    for path, tree in trees.items():
        texts = [*docstrings(tree), *help_texts(tree), *messages(tree)]
        found += [f"{path}:{n}: {t.splitlines()[0]}" for n, t in texts if RIDDLE.match(t)]
    assert found == []


def test_verbs_have_nouns_for_objects(documented):
    found = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for path, line, text in documented
        if CLAUSE.match(text)
    ]
    assert found == []


def test_functions_are_named_by_verbs_or_nouns(trees):
    found = [
        f"{path}:{node.lineno}: {node.name}: name its result, or what it does"
        for path, tree in trees.items()
        for node in statements(tree)
        if isinstance(node, FUNCTION)
        and PREPOSITION.match(node.name)
        and node.name not in PUBLIC_METHODS.get(path.relative_to(ROOT).as_posix(), ())
    ]
    assert found == []


def class_owners(trees):
    """Returns the files that define each public class, by its name."""
    owners = defaultdict(set)
    for path, tree in trees.items():
        for node in statements(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].add(str(path))
    return owners


def test_a_class_name_stands_in_one_file(trees):
    owners = class_owners(trees)
    shared = {name: files for name, files in owners.items() if len(files) > 1}
    assert {k: sorted(v) for k, v in shared.items() if k not in SHARED_CLASS_NAMES} == {}
    assert shared.keys() >= SHARED_CLASS_NAMES.keys(), "an exception that nobody needs"


def test_sections_stand_on_lines_of_their_own(documented):
    found = [
        f"{path}:{line}: write a section, 'Raises:'"
        for path, line, text in documented
        if INLINE_SECTION.search(text.partition("\n")[2])
    ]
    assert found == []


def test_arguments_are_described_by_nouns(documented):
    found = [
        f"{path}:{line}: {match[0].strip()} …: name the thing, 'dtype: dtype of the result'"
        for path, line, text in documented
        for match in BARE.finditer(text)
    ]
    assert found == []


def nested_comprehensions(tree):
    """Yields comprehensions within others, but for generators that any, all and sum take."""
    for outer in ast.walk(tree):
        if not isinstance(outer, COMPREHENSION):
            continue
        of_calls = {
            id(call.args[0])
            for call in ast.walk(outer)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("any", "all", "sum")
        }
        for inner in ast.walk(outer):
            if (
                isinstance(inner, COMPREHENSION)
                and inner is not outer
                and id(inner) not in of_calls
            ):
                yield inner


def repeated_by_conditions(tree):
    """Yields products of a list or a text and a condition, which stand for an `if`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
            continue
        sides = (node.left, node.right)
        is_sequence = any(isinstance(side, (ast.List, ast.JoinedStr)) for side in sides)
        is_sequence |= any(isinstance(getattr(side, "value", 0), str) for side in sides)
        if is_sequence and any(map(_is_condition, sides)):
            yield node


def _is_condition(node):
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    is_bool = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "bool"
    return is_not or is_bool or isinstance(node, (ast.Compare, ast.BoolOp))


def test_a_line_holds_one_thought(trees):
    for path, tree in trees.items():
        nested = [f"{path}:{node.lineno}" for node in nested_comprehensions(tree)]
        assert nested == [], "a loop, or a function with a name, for the inner comprehension"
        repeated = [f"{path}:{node.lineno}" for node in repeated_by_conditions(tree)]
        assert repeated == [], "an if statement"


def test_the_judge_sees_two_thoughts():
    nested = ["[[a for a in b] for b in c]", "{a: {*(b for b in c)} for a in d}"]
    assert all(list(nested_comprehensions(ast.parse(text))) for text in nested)
    single = ["[a for b in c for a in b]", "[a for a in b if any(c in a for c in d)]"]
    assert not any(list(nested_comprehensions(ast.parse(text))) for text in single)
    repeated = ["[a] * (not b)", "x + 'text' * (n > 1)", "[a] * bool(b)"]
    assert all(list(repeated_by_conditions(ast.parse(text))) for text in repeated)
    assert not any(list(repeated_by_conditions(ast.parse(t))) for t in ["[a] * n", "2 * (a > b)"])


def test_the_judge_sees_riddles():
    tree = ast.parse('def f():\n    """What one process cannot do."""\n    raise E(f"Of {f}")')
    assert [bool(RIDDLE.match(t)) for _, t in [*docstrings(tree), *messages(tree)]] == [True] * 2
    assert CLAUSE.match("Returns whether it is.") and CLAUSE.match("Keeps what was read.")
    assert not CLAUSE.match("Returns True if it is.") and not CLAUSE.match("Checks that it is.")
    names = ["of", "_of_layer", "by_name", "offset", "inner", "from_hf", "with_slots"]
    assert [bool(PREPOSITION.match(name)) for name in names] == [True] * 3 + [False] * 4
    texts = {"a.py": "class X: ...", "b.py": "class X: ...\nclass _Y: ..."}
    owners = class_owners({path: ast.parse(text) for path, text in texts.items()})
    assert owners == {"X": {"a.py", "b.py"}}
    assert INLINE_SECTION.search("Does it.\n\n    Raises ValueError where it cannot.")
    bare = ["optimizer: of the adapter.", "inner: see there.", "tensors, n: those that move."]
    assert all(BARE.search(f"Does it.\n\nArgs:\n  {text}") for text in bare)
    assert not BARE.search("Does it.\n\nArgs:\n  dtype: dtype of the result; see `fit`.")
