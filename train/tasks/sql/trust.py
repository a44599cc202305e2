"""Checks that a gold query tells right answers from wrong ones."""

import sqlite3
from collections.abc import Sequence

from train.tasks.sql.execute import is_empty, same_rows
from train.tasks.sql.guard import run
from train.tasks.sql.query import Query, mutations, order_keys, write
from train.tasks.sql.tables import Schema


def can_be_trusted(query: Query, schema: Schema, databases: Sequence[sqlite3.Connection]) -> bool:
    """Returns whether a query has results without ties, and its mutations have others.

    It must have a non-trivial result on every database, no two rows may tie in its order or for its
    extreme, and each query one mistake away must differ in its result on at least one database.
    """
    results = [run(database, write(query)) for database in databases]
    golds = [rows for rows in results if rows is not None and not is_empty(rows)]
    if len(golds) < len(databases):
        return False
    keys = order_keys(query)
    for database in databases:
        held = run(database, write(keys)) or [] if keys else []
        if len(set(held)) < len(held):
            return False
    # The rows equal to a MIN or MAX: one row, without ties.
    for_extreme = any(c.operator == "=" and isinstance(c.value, Query) for c in query.where)
    if for_extreme and any(len(gold) > 1 for gold in golds):
        return False
    for _, mutation in mutations(query, schema):
        sql = write(mutation)
        if not any(
            differs(gold, database, sql, ordered=query.order is not None)
            for database, gold in zip(databases, golds, strict=True)
        ):
            return False
    return True


def differs(
    gold: Sequence[tuple[object, ...]], database: sqlite3.Connection, sql: str, *, ordered: bool
) -> bool:
    """Returns whether the result of `sql` differs from the gold rows; SQL that fails differs."""
    rows = run(database, sql)
    return rows is None or not same_rows(gold, rows, ordered=ordered)
