"""Queries as data, their SQL, and their mutations: queries that are one mistake away."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.environments.sql.schemas import Schema


@dataclass(frozen=True, kw_only=True)
class Term:
    """A column (`table.column`, or `*`), or an aggregate of it."""

    path: str
    function: str = ""
    distinct: bool = False


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`column operator value`; the value is a literal in SQL, or a query in parentheses."""

    path: str
    operator: str
    value: "str | Query"


@dataclass(frozen=True, kw_only=True)
class Query:
    """A SELECT over one table or, joined, over the two of a schema."""

    table: str
    select: tuple[Term, ...]
    join: str = ""  # see `Schema.join`
    where: tuple[Condition, ...] = ()
    group: str = ""
    having: str = ""
    order: Term | None = None
    descending: bool = False
    limit: int = 0


def literal(value: object) -> str:
    """Writes a text or a number as a SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value)


def write_sql(query: Query) -> str:
    """Writes a query as one line of SQL; qualifies columns only if tables are joined."""

    def column(path: str) -> str:
        return path if query.join else path.rpartition(".")[2]

    def term(item: Term) -> str:
        text = column(item.path)
        if item.distinct:
            text = f"DISTINCT {text}"
        return f"{item.function}({text})" if item.function else text

    def condition(item: Condition) -> str:
        value = f"({write_sql(item.value)})" if isinstance(item.value, Query) else item.value
        return f"{column(item.path)} {item.operator} {value}"

    selected = ", ".join(term(item) for item in query.select)
    clauses = [f"SELECT {selected} FROM {query.table}"]
    if query.join:
        clauses.append(query.join)
    if query.where:
        conditions = " AND ".join(condition(item) for item in query.where)
        clauses.append(f"WHERE {conditions}")
    if query.group:
        clauses.append(f"GROUP BY {column(query.group)}")
    if query.having:
        clauses.append(f"HAVING {query.having}")
    if query.order:
        clauses.append(f"ORDER BY {term(query.order)}{' DESC' if query.descending else ''}")
    if query.limit:
        clauses.append(f"LIMIT {query.limit}")
    return " ".join(clauses)


def order_keys(query: Query) -> Query | None:
    """Returns a query for the ORDER BY values of all rows; None if the query is unordered."""
    if query.order is None:
        return None
    return replace(query, select=(query.order,), order=None, descending=False, limit=0)


_MISTAKEN_FUNCTION = {"AVG": "MAX", "MIN": "MAX", "MAX": "MIN", "SUM": "AVG"}
_MISTAKEN_OPERATORS = {
    ">": ("<", ">="),
    "<": (">", "<="),
    "=": ("<>",),
    "LIKE": ("NOT LIKE",),
    "IN": ("NOT IN",),
    "BETWEEN": ("NOT BETWEEN",),
}


def _other_columns(schema: Schema, path: str, *, alike: bool) -> list[str]:
    """Returns a table's other columns except keys; with `alike`, only numeric ones for numbers."""
    if path == "*":
        return []
    column = schema.column(path)
    if column.kind in ("key", "link"):
        return []
    paths = []
    for candidate in schema.table(column.table).columns_of_kind("name", "text", "number", "year"):
        fits = candidate.is_number == column.is_number or not alike
        if fits and candidate != column:
            paths.append(candidate.path)
    return paths


def _mutated_where(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    """Yields queries with one condition dropped, or with a mistake in it, each with its kind."""
    for index, condition in enumerate(query.where):
        conditions_before = query.where[:index]
        conditions_after = query.where[index + 1 :]
        yield "filter", replace(query, where=conditions_before + conditions_after)
        for kind, mutation in _mutated_condition(condition, schema):
            conditions = (*conditions_before, mutation, *conditions_after)
            yield kind, replace(query, where=conditions)


def _mutated_condition(condition: Condition, schema: Schema) -> Iterator[tuple[str, Condition]]:
    """Yields conditions that are one mistake away, each with its kind."""
    has_subquery = isinstance(condition.value, Query)
    for path in _other_columns(schema, condition.path, alike=True):
        yield "column", replace(condition, path=path)
    for operator in _MISTAKEN_OPERATORS[condition.operator]:
        is_equal_mean = has_subquery and operator in (">=", "<=")  # no row need equal a mean
        if not is_equal_mean:
            yield "operator", replace(condition, operator=operator)
    if isinstance(condition.value, Query):
        for kind, subquery in mutations(condition.value, schema):
            yield kind, replace(condition, value=subquery)


def mutations(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    """Yields queries that are one mistake away, each with its kind.

    The kinds are "filter" (a condition dropped), "column" (another column of the same table),
    "order" (another direction, none, or another length), "function" (another aggregate) and
    "operator".
    """
    yield from _mutated_where(query, schema)
    if query.having:
        yield "filter", replace(query, having="")
    yield from _mutated_select(query, schema)
    if query.order:
        yield "order", replace(query, descending=not query.descending)
        yield "order", replace(query, order=None, descending=False)
        for path in _other_columns(schema, query.order.path, alike=True):
            yield "column", replace(query, order=replace(query.order, path=path))
    if query.limit:
        yield "order", replace(query, limit=0)
        yield "order", replace(query, limit=query.limit + 1)


def _mutated_select(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    """Yields queries with one mistake in a term that they select, each with its kind."""
    for index, term in enumerate(query.select):
        needs_number = term.function not in ("", "COUNT")
        for path in _other_columns(schema, term.path, alike=needs_number):
            mutation = _with_term(query, index, replace(term, path=path))
            is_grouped = term.path == query.group
            yield "column", replace(mutation, group=path) if is_grouped else mutation
        if term.function in _MISTAKEN_FUNCTION:
            function = _MISTAKEN_FUNCTION[term.function]
            yield "function", _with_term(query, index, replace(term, function=function))
        if term.distinct:
            yield "function", _with_term(query, index, replace(term, distinct=False))


def _with_term(query: Query, index: int, term: Term) -> Query:
    """Returns the query with another term in place of a selected one."""
    return replace(query, select=(*query.select[:index], term, *query.select[index + 1 :]))
