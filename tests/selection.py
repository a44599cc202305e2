"""Finds test files in which `-m` selects no test, by their text: they need not be imported.

A test has a mark only where the text shows it, and lacks a mark only where no text that the file
can reach names the mark. A file of which too little is known is imported.
"""

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Names by which a file could have tests that its text does not show.
_HIDDEN = {"TestCase", "exec", "globals", "locals", "vars"}
_UNDECORATED = re.compile(rb"^(?![@)]).*\n(async )?def test", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def selects_none(expression: str, path: Path) -> bool:
    """Returns whether a file has tests and an expression of `-m` provably selects none of them."""
    try:
        condition = ast.parse(expression.strip(), mode="eval").body
        text = path.read_bytes()
        selects_unmarked = _truth(condition, (), ()) is not False
        if selects_unmarked and b"pytestmark" not in text and _UNDECORATED.search(text):
            return False  # the file is not parsed
        source = Source(path, text)
    except (SyntaxError, ValueError):  # pytest says what is wrong
        return False
    tests = list(source.marks_of_tests())
    if not tests or source.has_hidden_tests() or not _rejects(condition, tests, ()):
        return False
    names = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name)}
    return _rejects(condition, tests, names) or _rejects(
        condition, tests, source.reachable_attributes()
    )


def _rejects(
    condition: ast.expr, tests: Iterable[Collection[str]], possible: Collection[str]
) -> bool:
    """Returns whether a condition is false for all tests, which may have further possible marks."""
    return all(_truth(condition, marks, possible) is False for marks in tests)


def _truth(node: ast.expr, marks: Collection[str], possible: Collection[str]) -> bool | None:
    """Evaluates a condition on marks by Kleene's logic; None is unknown."""
    match node:
        case ast.Name(id=mark):
            return True if mark in marks else None if mark in possible else False
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _truth(operand, marks, possible)
            return None if value is None else not value
        case ast.BoolOp(op=operator, values=operands):
            values = [_truth(operand, marks, possible) for operand in operands]
            decisive = isinstance(operator, ast.Or)
            if decisive in values:
                return decisive
            return None if None in values else not decisive
    return None


class Source:
    """The text of a file of tests, or of one that tests import."""

    def __init__(self, path: Path, text: bytes) -> None:
        """Parses the text."""
        self.path = path
        self.tree = ast.parse(text)
        self.attributes: set[str] = set()
        self.names: set[str] = set()
        self.bindings: Counter[str] = Counter()
        self.imports: dict[str, tuple[str, str]] = {}  # a name's module, and its name there
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                self.attributes.add(node.attr)
            elif isinstance(node, ast.Name):
                self.names.add(node.id)
                self.bindings[node.id] += isinstance(node.ctx, ast.Store)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (node.module or "", alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name.split(".")[0]] = (alias.name, "")
        self.definitions = {}
        for statement in self.tree.body:
            if isinstance(statement, Definition):
                self.definitions[statement.name] = statement
            else:
                self.definitions |= dict.fromkeys(_assigned(statement), statement)

    def has_hidden_tests(self) -> bool:
        """Returns whether the file may have tests that are not defined in it by name."""
        if "*" in self.imports or _HIDDEN & (self.names | self.attributes):
            return True
        imported = [name for name in self.imports if _is_of_a_test(name) and name != "tests"]
        if any(_source(".".join(self.imports[name])) is None for name in imported):
            return True
        return any(_is_of_a_test(name) for name, count in self.bindings.items() if count)

    def marks_of_tests(self) -> Iterator[set[str]]:
        """Yields the marks that each test function is known to have."""
        yield from self._marks_of_tests(self.tree, self.marks_of("pytestmark"))

    def _marks_of_tests(self, scope: ast.AST, inherited: set[str]) -> Iterator[set[str]]:
        for node in ast.iter_child_nodes(scope):
            marks = inherited
            if isinstance(node, Definition):
                marks = inherited.union(*self._decorations(node))
            if isinstance(node, Function):
                if node.name.startswith("test"):
                    yield marks
            elif isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                yield from self._marks_of_tests(node, marks)

    def _decorations(self, node: Definition) -> Iterator[set[str]]:
        """Yields the marks of the outer decorators: another one may drop those within."""
        for decorator in node.decorator_list:
            marks = self._marks(decorator)
            if not marks:
                return
            yield marks

    def marks_of(self, name: str) -> set[str]:
        """Returns the marks in the value of a name; none where it is not bound once, to marks."""
        if name in self.imports:
            module, member = self.imports[name]
            source = _source(module)
            return source.marks_of(member) if source and not self.bindings[name] else set()
        match self.definitions.get(name):
            case ast.Assign(targets=[ast.Name()], value=value) if self.bindings[name] == 1:
                return self._marks(value)
        return set()

    def _marks(self, node: ast.expr) -> set[str]:
        """Returns the marks that an expression is known to have."""
        match node:
            case ast.Attribute(value=ast.Attribute(value=ast.Name("pytest"), attr="mark")):
                return {node.attr}
            case ast.Call(func=ast.Attribute() as function):
                return self._marks(function)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return set().union(*map(self._marks, elements))
            case ast.Starred(value=value):
                return self._marks(value)
            case ast.Name(id=name):
                return self.marks_of(name)
        return set()

    def reachable_attributes(self) -> set[str]:
        """Returns the attributes that the file names, and those behind the names it imports."""
        imported = (_attributes(*where) for where in self.imports.values())
        return self.attributes.union(*imported)


def _assigned(statement: ast.stmt) -> Iterator[str]:
    """Yields the names that a statement assigns, or defines within itself."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, Definition):
            yield node.name


def _is_of_a_test(name: str) -> bool:
    return name.lower().startswith("test")


@cache
def _attributes(module: str, member: str) -> frozenset[str]:
    """Returns the attributes that a name of a module stands for, and those behind its names."""
    attributes: set[str] = set()
    _reach(module, member, attributes, set())
    return frozenset(attributes)


def _reach(module: str, member: str, attributes: set[str], visited: set[tuple[str, str]]) -> None:
    """Adds to the attributes; a module that is a member of a folder counts as a whole."""
    if (module, member) in visited:
        return
    visited.add((module, member))
    if _source(f"{module}.{member}"):
        module, member = f"{module}.{member}", ""
    if (source := _source(module)) is None:
        return
    if member in source.imports:
        return _reach(*source.imports[member], attributes, visited)
    definition = source.definitions.get(member)
    names = set() if definition else set(source.imports)
    for node in ast.walk(definition or source.tree):
        if isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.Name):
            names.add(node.id)
    for name in names:
        if name in source.imports:
            _reach(*source.imports[name], attributes, visited)
        elif name in source.definitions:
            _reach(module, name, attributes, visited)


@cache
def _source(module: str) -> Source | None:
    """Returns the file of a module of the tests, or None for another module."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not module.startswith("tests.") or not path.is_file():
        return None
    return Source(path, path.read_bytes())
