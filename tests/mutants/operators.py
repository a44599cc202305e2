"""The mutations: changes of one expression of a module, as a person might get it wrong.

They are changed comparisons, integers that are one too large or too small, terms and arguments that
are dropped, and operands that are swapped. Annotations, `raise` and `assert` statements, `__all__`,
formatted texts and blocks for type checkers stay as they are: their changes are no faults of use.
"""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In},
}
_WITH_DROPPED_TERMS = (ast.Add, ast.Sub, ast.Mult)
_WITH_SWAPPED_OPERANDS = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Mutation(NamedTuple):
    """A change of one expression.

    Attributes:
      line: the line, from 1, in which the expression begins.
      column: the first byte of the expression in that line.
      lines: the lines of the statement, or of its head, that holds the expression.
      in_function: whether a call runs the expression; an import does otherwise.
      kind: the name of the operator.
      before: the expression.
      after: the expression that replaces it.
    """

    line: int
    column: int
    lines: range
    in_function: bool
    kind: str
    before: str
    after: str


def mutations(text: str) -> list[Mutation]:
    """Returns all mutations of a module's text, in the order of their places."""
    tree = ast.parse(text)
    if not tree.body:
        return []
    of_module = [
        Mutation(
            line=node.lineno,
            column=node.col_offset,
            lines=range(statement.lineno, _end_of_head(statement) + 1),
            in_function=in_function,
            kind=kind,
            before=ast.unparse(node),
            after=ast.unparse(changed),
        )
        for node, statement, in_function in _expressions(tree, tree.body[0], False)
        for kind, changed in _changes(node)
    ]
    return sorted(of_module, key=lambda mutation: (mutation.line, mutation.column, *mutation[4:]))


def apply(text: str, mutation: Mutation) -> str:
    """Returns a module's text with one mutation, without moving other lines.

    Raises:
      SyntaxError: no expression can stand there: a pattern of `match` holds literals alone.
    """
    node = next(
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.expr)
        and (node.lineno, node.col_offset) == (mutation.line, mutation.column)
        and ast.unparse(node) == mutation.before
    )
    assert node.end_lineno is not None and node.end_col_offset is not None
    lines = text.encode().splitlines(keepends=True)
    head = lines[node.lineno - 1][: node.col_offset]
    tail = lines[node.end_lineno - 1][node.end_col_offset :]
    # The parentheses keep the operators around the expression from taking a part of it.
    blank = b"\n" * (node.end_lineno - node.lineno)
    lines[node.lineno - 1 : node.end_lineno] = [
        head + b"(" + mutation.after.encode() + blank + b")" + tail
    ]
    changed = b"".join(lines).decode()
    ast.parse(changed)
    return changed


def _expressions(
    node: ast.AST, statement: ast.stmt, in_function: bool
) -> Iterator[tuple[ast.expr, ast.stmt, bool]]:
    """Yields the expressions that may change, the statement of each, and whether calls run it."""
    for name, value in ast.iter_fields(node):
        is_body = isinstance(node, _FUNCTIONS) and name == "body"
        if name in ("annotation", "returns", "type_params", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_skipped(child):
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            if isinstance(child, ast.expr):
                yield child, inner, in_function or is_body
            yield from _expressions(child, inner, in_function or is_body)


def _is_skipped(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(name, ast.Name) and name.id == "__all__" for name in node.targets)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, _SKIPPED)


def _changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yields the name and the result of each change of one expression."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            changed = copy.copy(node)
            changed.ops = [_COMPARISONS[type(operator)]()]
            yield "comparison", changed
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            yield "plus one", ast.Constant(number + 1)
            yield "minus one", ast.Constant(number - 1)
        case ast.BinOp(left=left, op=operator, right=right):
            if isinstance(operator, _WITH_DROPPED_TERMS):
                yield "dropped term", left
            if isinstance(operator, (ast.Add, ast.Mult)):
                yield "dropped term", right
            if isinstance(operator, _WITH_SWAPPED_OPERANDS):
                yield "swapped operands", ast.BinOp(right, operator, left)
        case ast.BoolOp(op=operator, values=values):
            for index in range(len(values)):
                others = [*values[:index], *values[index + 1 :]]
                is_single = len(others) == 1
                yield "dropped term", others[0] if is_single else ast.BoolOp(operator, others)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            for index in range(len(keywords)):
                others = [*keywords[:index], *keywords[index + 1 :]]
                yield "dropped argument", ast.Call(function, arguments, others)
            if len(arguments) > 1:
                yield "dropped argument", ast.Call(function, arguments[:-1], keywords)


def _end_of_head(statement: ast.stmt) -> int:
    """Returns the last line of a statement, without the statements that it holds."""
    body = getattr(statement, "body", None)
    if isinstance(body, list) and body:
        return max(statement.lineno, body[0].lineno - 1)
    assert statement.end_lineno is not None
    return statement.end_lineno
