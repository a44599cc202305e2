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
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def write(query: Query) -> str:
    """Writes a query as one line of SQL; qualifies columns only if tables are joined."""

    def column(path: str) -> str:
        return path if query.join else path.rpartition(".")[2]

    def term(item: Term) -> str:
        inside = ("DISTINCT " if item.distinct else "") + column(item.path)
        return f"{item.function}({inside})" if item.function else inside

    def condition(item: Condition) -> str:
        value = f"({write(item.value)})" if isinstance(item.value, Query) else item.value
        return f"{column(item.path)} {item.operator} {value}"

    parts = [f"SELECT {', '.join(term(item) for item in query.select)} FROM {query.table}"]
    parts += [query.join] if query.join else []
    parts += [f"WHERE {' AND '.join(map(condition, query.where))}"] if query.where else []
    parts += [f"GROUP BY {column(query.group)}"] if query.group else []
    parts += [f"HAVING {query.having}"] if query.having else []
    if query.order:
        parts.append(f"ORDER BY {term(query.order)}{' DESC' if query.descending else ''}")
    parts += [f"LIMIT {query.limit}"] if query.limit else []
    return " ".join(parts)


def order_keys(query: Query) -> Query | None:
    """Returns the query for the ORDER BY values of all rows, to find ties; None if unordered."""
    if query.order is None:
        return None
    return replace(query, select=(query.order,), order=None, descending=False, limit=0)


_OTHER_FUNCTION = {"AVG": "MAX", "MIN": "MAX", "MAX": "MIN", "SUM": "AVG"}
_OTHER_OPERATOR = {
    ">": ("<", ">="),
    "<": (">", "<="),
    "=": ("<>",),
    "LIKE": ("NOT LIKE",),
    "IN": ("NOT IN",),
    "BETWEEN": ("NOT BETWEEN",),
}


def _other_columns(schema: Schema, path: str, *, alike: bool) -> list[str]:
    """Returns other columns of the table, without keys; if `alike`, only numbers for numbers."""
    if path == "*":
        return []
    column = schema.column(path)
    if column.kind in ("key", "link"):
        return []
    others = schema.table(column.table).columns_of_kind("name", "text", "number", "year")
    return [
        other.path
        for other in others
        if other != column and (other.is_number == column.is_number or not alike)
    ]


def _mutated_where(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    for i, condition in enumerate(query.where):
        before, after = query.where[:i], query.where[i + 1 :]
        yield "filter", replace(query, where=before + after)
        changed: list[tuple[str, Condition]] = [
            ("column", replace(condition, path=path))
            for path in _other_columns(schema, condition.path, alike=True)
        ]
        for operator in _OTHER_OPERATOR[condition.operator]:
            if operator in (">=", "<=") and isinstance(condition.value, Query):
                continue  # no row need equal a mean
            changed.append(("operator", replace(condition, operator=operator)))
        if isinstance(condition.value, Query):
            for kind, inner in mutations(condition.value, schema):
                changed.append((kind, replace(condition, value=inner)))
        for kind, other in changed:
            yield kind, replace(query, where=(*before, other, *after))


def mutations(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    """Yields queries that are one mistake away, each with its kind.

    The kinds are "filter" (a condition dropped), "column" (another column of the same table),
    "order" (another direction, none, or another length), "function" (another aggregate) and
    "operator".
    """
    yield from _mutated_where(query, schema)
    if query.having:
        yield "filter", replace(query, having="")
    for i, term in enumerate(query.select):
        before, after = query.select[:i], query.select[i + 1 :]
        for path in _other_columns(schema, term.path, alike=term.function not in ("", "COUNT")):
            grouped = path if term.path == query.group else query.group
            other = (*before, replace(term, path=path), *after)
            yield "column", replace(query, select=other, group=grouped)
        if term.function in _OTHER_FUNCTION:
            other = (*before, replace(term, function=_OTHER_FUNCTION[term.function]), *after)
            yield "function", replace(query, select=other)
        if term.distinct:
            other = (*before, replace(term, distinct=False), *after)
            yield "function", replace(query, select=other)
    if query.order:
        yield "order", replace(query, descending=not query.descending)
        yield "order", replace(query, order=None, descending=False)
        for path in _other_columns(schema, query.order.path, alike=True):
            yield "column", replace(query, order=replace(query.order, path=path))
    if query.limit:
        yield "order", replace(query, limit=0)
        yield "order", replace(query, limit=query.limit + 1)
