"""The query forms: each draws a query on a schema, and the words of its question.

A form draws its table, columns and values from a `Scene`. It need not check that the query has a
result on every database: `train.environments.sql.examples` runs it, and adds the table's words.

The phrasings of each form are the lines of `phrasings.txt`. `{things}` and `{thing}` are the rows
of a table, `{owner}` and `{owners}` the rows of its parent table, and `{name}` is the column that
names a row; the other words in braces come from the form. Words such as `{above}` fit the column:
"above" a price, "after" a year.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from train.environments.sql.databases import FilledRow, Value
from train.environments.sql.query import Condition, Query, Term, literal
from train.environments.sql.schemas import Column, Draw, Schema, Table, plural, read_blocks

N_TRAINED = 8  # the first phrasings of each form; the others are held out of training

PHRASINGS = {
    form: [*map(str.strip, text.splitlines())]
    for form, text in read_blocks("phrasings.txt").items()
}


def write_question(form: str, phrasing: int, words: dict[str, str]) -> str:
    """Returns the question of a phrasing, with the words filled in."""
    question = PHRASINGS[form][phrasing].format_map(words)
    question = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", question)  # "an" before a vowel
    return question[0].upper() + question[1:]


Words = dict[str, str]


class DoesNotFit(Exception):
    """The error for a schema without a column of the required kind."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A schema, the rows of one of its databases, and a random stream for choices."""

    schema: Schema
    rows: dict[str, list[FilledRow]]
    draw: Draw

    def table(self, *kinds: str) -> Table:
        """Draws a table with columns of these kinds; mostly the child, which has more rows."""
        tables = [self.schema.child, self.schema.child, self.schema.parent]
        candidates = [
            table for table in tables if all(table.columns_of_kind(kind) for kind in kinds)
        ]
        if not candidates:
            raise DoesNotFit(f"{self.schema.name}: {kinds}")
        return self.draw.pick(candidates)

    def column(self, table: Table, *kinds: str, summable: bool = False) -> Column:
        """Draws a column of one of these kinds; with `summable`, one whose sum is meaningful."""
        candidates = table.columns_of_kind(*kinds)
        if summable:
            candidates = [column for column in candidates if column.summable]
        if not candidates:
            raise DoesNotFit(f"{table.name}: {kinds}")
        return self.draw.pick(candidates)

    def number(self, table: Table) -> Column:
        """Draws a column of numbers or years."""
        return self.column(table, "number", "year")

    def values(self, column: Column, count: int = 1) -> list[Value]:
        """Draws distinct values of the column."""
        table = self.schema.table(column.table)
        column_index = table.columns.index(column)
        rows = self.rows[table.name]
        distinct_values = list(dict.fromkeys(row[column_index] for row in rows))
        if len(distinct_values) < count:
            raise DoesNotFit(f"{column.path}: {count} values")
        return self.draw.sample(distinct_values, count)


def _title_words(table: Table, prefix: str = "") -> Words:
    wording = table.title.wording
    return {f"{prefix}name": wording, f"{prefix}names": plural(wording)}


def table_words(table: Table) -> Words:
    """Returns words for the table's rows and for the column that names them."""
    return {"thing": table.singular, "things": table.plural} | _title_words(table)


def owner_words(table: Table) -> Words:
    """Returns words for the rows of the parent table."""
    return {"owner": table.singular, "owners": table.plural} | _title_words(table, "owner_")


def category_words(column: Column, prefix: str = "") -> Words:
    """Returns words for a column of texts that several rows share."""
    return {f"{prefix}category": column.wording, f"{prefix}categories": plural(column.wording)}


_COMPARATIVES = {  # (for numbers, for years)
    "above": ("above", "after"),
    "over": ("more than", "later than"),
    "below": ("below", "before"),
    "under": ("less than", "earlier than"),
    "higher": ("higher", "later"),
    "lower": ("lower", "earlier"),
    "lowest": ("lowest", "earliest"),
    "highest": ("highest", "latest"),
}


def number_words(column: Column, *, descending: bool = False) -> Words:
    """Returns words for a column of numbers; `first` and `last` depend on the sorting order."""
    is_year = column.kind == "year"
    words = {
        key: year_word if is_year else number_word
        for key, (number_word, year_word) in _COMPARATIVES.items()
    }
    return words | {
        "number": column.wording,
        "ascending": "descending" if descending else "ascending",
        "first": words["highest" if descending else "lowest"],
        "last": words["lowest" if descending else "highest"],
    }


Form = Callable[[Scene], tuple[Query, Words]]


def _select_titles(table: Table, *where: Condition) -> Query:
    """Selects the naming column of the rows that meet the conditions."""
    return Query(table=table.name, select=(Term(path=table.title.path),), where=where)


def _select_joined(scene: Scene, *select: Term, where: tuple[Condition, ...] = ()) -> Query:
    """Selects columns of both tables, joined."""
    schema = scene.schema
    return Query(table=schema.child.name, select=select, join=schema.join, where=where)


def _compare_column(column: Column, value: object, operator: str = "=") -> Condition:
    """Returns the condition that compares a column with a value."""
    return Condition(path=column.path, operator=operator, value=literal(value))


def _draw_filter(scene: Scene, table: Table, prefix: str = "") -> tuple[Condition, Words]:
    """Draws a condition that several rows meet, and its words."""
    category = scene.column(table, "text")
    [value] = scene.values(category)
    words = category_words(category, prefix) | {"value": str(value)}
    return _compare_column(category, value), words


def _two_columns(scene: Scene) -> tuple[Query, Words]:
    table = scene.table()
    column = scene.column(table, "text", "number", "year")
    select = (Term(path=table.title.path), Term(path=column.path))
    return replace(_select_titles(table), select=select), {"other": column.wording}


def _lookup(scene: Scene) -> tuple[Query, Words]:
    """Asks for the value of another column in a row that is given by its name."""
    table = scene.table()
    column = scene.column(table, "text", "number", "year")
    [value] = scene.values(table.title)
    titles = _select_titles(table, _compare_column(table.title, value))
    query = replace(titles, select=(Term(path=column.path),))
    return query, {"other": column.wording, "value": str(value)}


def _equals(scene: Scene) -> tuple[Query, Words]:
    table = scene.table("text")
    condition, words = _draw_filter(scene, table)
    return _select_titles(table, condition), words


def _comparison_form(operator: str) -> Form:
    """Returns the form that asks for rows above or below a number."""

    def form(scene: Scene) -> tuple[Query, Words]:
        table = scene.table()
        number = scene.number(table)
        [value] = scene.values(number)
        words = number_words(number) | {"value": str(value)}
        return _select_titles(table, _compare_column(number, value, operator)), words

    return form


def _range(scene: Scene) -> tuple[Query, Words]:
    """Asks for the rows between two numbers."""
    table = scene.table()
    number = scene.number(table)
    low, high = sorted(scene.values(number, 2), key=float)
    condition = Condition(path=number.path, operator="BETWEEN", value=f"{low} AND {high}")
    words = number_words(number) | {"low": str(low), "high": str(high)}
    return _select_titles(table, condition), words


def _contains(scene: Scene) -> tuple[Query, Words]:
    """Asks for the rows whose names contain a word."""
    table = scene.table()
    [value] = scene.values(table.title)
    title_words = str(value).split()
    if len(title_words) < 2:
        raise DoesNotFit(f"{table.title.path} holds single words")
    word = scene.draw.pick(title_words)
    condition = _compare_column(table.title, f"%{word}%", "LIKE")
    return _select_titles(table, condition), {"value": word}


def _one_of(scene: Scene) -> tuple[Query, Words]:
    """Asks for the rows with one of two texts."""
    table = scene.table("text")
    category = scene.column(table, "text")
    value, second_value = scene.values(category, 2)
    literals = f"({literal(value)}, {literal(second_value)})"
    condition = Condition(path=category.path, operator="IN", value=literals)
    words = {"value": str(value), "value2": str(second_value)}
    return _select_titles(table, condition), category_words(category) | words


def _both_filters(scene: Scene) -> tuple[Query, Words]:
    """Asks for the rows with a text, and above a number."""
    table = scene.table("text")
    condition, words = _draw_filter(scene, table)
    number = scene.number(table)
    [bound] = scene.values(number)
    words |= number_words(number) | {"bound": str(bound)}
    return _select_titles(table, condition, _compare_column(number, bound, ">")), words


def _count(scene: Scene) -> tuple[Query, Words]:
    query, words = _equals(scene)
    return replace(query, select=(Term(path="*", function="COUNT"),)), words


def _count_distinct(scene: Scene) -> tuple[Query, Words]:
    table = scene.table("text")
    category = scene.column(table, "text")
    count = Term(path=category.path, function="COUNT", distinct=True)
    return replace(_select_titles(table), select=(count,)), category_words(category)


def _aggregate(function: str) -> Form:
    """Returns the form that asks for an aggregate over the rows with a text."""

    def form(scene: Scene) -> tuple[Query, Words]:
        """Asks for the aggregate of a drawn column over the rows that meet a condition."""
        table = scene.table("text", "number")
        condition, words = _draw_filter(scene, table)
        number = scene.column(table, "number", summable=function == "SUM")
        term = Term(path=number.path, function=function)
        return replace(_select_titles(table, condition), select=(term,)), words | number_words(
            number
        )

    return form


def _ordered(scene: Scene) -> tuple[Query, Words]:
    table = scene.table()
    number = scene.number(table)
    descending = scene.draw.pick((False, True))
    query = replace(_select_titles(table), order=Term(path=number.path), descending=descending)
    return query, number_words(number, descending=descending)


def _top(scene: Scene) -> tuple[Query, Words]:
    query, words = _ordered(scene)
    count = scene.draw.integer(2, 5)
    return replace(query, limit=count), words | {"count": str(count)}


def _group_count(scene: Scene) -> tuple[Query, Words]:
    table = scene.table("text")
    category = scene.column(table, "text")
    select = (Term(path=category.path), Term(path="*", function="COUNT"))
    query = replace(_select_titles(table), select=select, group=category.path)
    return query, category_words(category)


def _group_having(scene: Scene) -> tuple[Query, Words]:
    query, words = _group_count(scene)
    count = scene.draw.integer(2, 7)
    query = replace(query, select=query.select[:1], having=f"COUNT(*) > {count}")
    return query, words | {"count": str(count)}


def _join_columns(scene: Scene) -> tuple[Query, Words]:
    child, parent = scene.schema.child, scene.schema.parent
    query = _select_joined(scene, Term(path=child.title.path), Term(path=parent.title.path))
    return query, owner_words(scene.schema.parent)


def _join_filter(scene: Scene) -> tuple[Query, Words]:
    child = scene.schema.child
    condition, words = _draw_filter(scene, scene.schema.parent, "owner_")
    query = _select_joined(scene, Term(path=child.title.path), where=(condition,))
    return query, owner_words(scene.schema.parent) | words


def _above_average(scene: Scene) -> tuple[Query, Words]:
    table = scene.table("number")
    number = scene.column(table, "number")
    average = Query(table=table.name, select=(Term(path=number.path, function="AVG"),))
    condition = Condition(path=number.path, operator=">", value=average)
    return _select_titles(table, condition), number_words(number)


def _extreme(scene: Scene) -> tuple[Query, Words]:
    """Asks for the row with the lowest or the highest number."""
    table = scene.table()
    number = scene.number(table)
    function = scene.draw.pick(("MIN", "MAX"))
    extreme = Query(table=table.name, select=(Term(path=number.path, function=function),))
    condition = Condition(path=number.path, operator="=", value=extreme)
    return _select_titles(table, condition), number_words(number, descending=function == "MAX")


FORMS: dict[str, Form] = {
    "two_columns": _two_columns,
    "lookup": _lookup,
    "equals": _equals,
    "above": _comparison_form(">"),
    "below": _comparison_form("<"),
    "between": _range,
    "contains": _contains,
    "one_of": _one_of,
    "both_filters": _both_filters,
    "count": _count,
    "count_distinct": _count_distinct,
    "average": _aggregate("AVG"),
    "total": _aggregate("SUM"),
    "ordered": _ordered,
    "top": _top,
    "group_count": _group_count,
    "group_having": _group_having,
    "join_columns": _join_columns,
    "join_filter": _join_filter,
    "above_average": _above_average,
    "at_extreme": _extreme,
}
