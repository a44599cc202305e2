"""The contents of a schema's databases: seeded rows, different in each database."""

from collections.abc import Sequence
from functools import cache

from train.tasks.sql.questions.draw import Draw
from train.tasks.sql.questions.query import literal
from train.tasks.sql.questions.tables import Column, Schema, Table

Value = str | int | float
FilledRow = tuple[Value, ...]

DATABASES = 3  # differently filled databases for each schema
_CHILDREN = (20, 24)  # the number of rows, from and to
_PARENTS = (7, 8)


def _column_values(column: Column, rows: int, schema: Schema, draw: Draw) -> list[Value]:
    """Draws the values of a column, distinct if the range allows, so that few rows tie."""
    if column.kind == "name":
        # A pool hardly larger than the table, shared by all databases, so that names recur in them.
        pool = Draw("names", schema.name, column.path).shuffled(column.values)
        return list(draw.sample(pool[: rows + 3], rows))
    if column.kind == "text":
        # Each of at most five texts occurs; some occur more often than others.
        pool = Draw("texts", schema.name, column.path).shuffled(column.values)[:5]
        favourites = draw.sample(pool, 2)
        some = [draw.pick(draw.pick((pool, favourites))) for _ in range(rows - len(pool))]
        return list(draw.shuffled([*pool, *some]))
    span = range(column.low, column.high + 1)
    if len(span) >= rows:
        numbers = draw.sample(span, rows)
    else:
        numbers = [draw.pick(span) for _ in range(rows)]
    return [number if column.scale == 1 else number / column.scale for number in numbers]


def _table_rows(
    schema: Schema, table: Table, parents: int, rows: int, draw: Draw
) -> list[FilledRow]:
    columns: list[Sequence[Value]] = []
    for column in table.columns:
        if column.kind == "key":
            columns.append(range(1, rows + 1))
        elif column.kind == "link":
            # Two parents have no children, and two have many.
            used = draw.sample(range(1, parents + 1), parents - 2)
            columns.append([draw.pick(draw.pick((used, used[:2]))) for _ in range(rows)])
        else:
            columns.append(_column_values(column, rows, schema, draw))
    return list(zip(*columns, strict=True))


@cache
def filled_tables(schema: Schema, database: int) -> dict[str, list[FilledRow]]:
    """Returns the rows of each table of one of the schema's databases; the same on every call."""
    draw = Draw("rows", schema.name, database)
    parents = draw.integer(*_PARENTS)
    counts = {schema.parent.name: parents, schema.child.name: draw.integer(*_CHILDREN)}
    return {
        table.name: _table_rows(schema, table, parents, counts[table.name], draw)
        for table in schema.tables
    }


@cache
def fill_script(schema: Schema, database: int) -> str:
    """Returns the SQL that creates and fills one of the schema's databases."""
    lines = []
    for table in schema.tables:
        names = ", ".join(
            f"{c.name} {'TEXT' if c.values else 'REAL' if c.scale > 1 else 'INTEGER'}"
            for c in table.columns
        )
        rows = filled_tables(schema, database)[table.name]
        values = ", ".join(f"({', '.join(map(literal, row))})" for row in rows)
        lines.append(f"CREATE TABLE {table.name} ({names});")
        lines.append(f"INSERT INTO {table.name} VALUES {values};")
    return "\n".join(lines)
