"""Judges the SQL in a generated text by the rows that it returns, for a score or a reward."""

from functools import lru_cache

from train.tasks.sql.answer import find_query, has_other_statement
from train.tasks.sql.execute import GUARDED, open_databases, same_rows
from train.tasks.sql.guard import REFUSED, Row, run
from train.tasks.sql.questions.schemas import SCHEMAS
from train.tasks.sql.questions.tables import Schema

MATCHED, MISMATCH, NO_SQL = "matched", "mismatch", "no SQL"


def judge(schema: str, gold: str, text: str) -> str:
    """Returns what becomes of the SQL in a generated text, run on the schema's databases.

    It matches if it returns the rows of the gold query on all of them: as a list if that orders
    them, else as a multiset. It never raises or changes anything. Several threads may call it.

    Args:
      schema: the schema's name.
      gold: the gold query.
      text: the generated text.

    Returns:
      `MATCHED`, `MISMATCH`, `NO_SQL` (none, or two statements in a row), or one of the guard's:
      `REFUSED` (another statement than a SELECT, or what it must not read), `ERROR`, `TIMEOUT`
      (took more time, memory, rows or characters than a right answer needs).

    Raises:
      ValueError: there is no such schema, or the gold query does not run on it.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"there is no schema {schema!r}")
    golds, query = _gold_results(SCHEMAS[schema], gold), find_query(text)
    if query is None:
        return REFUSED if has_other_statement(text) else NO_SQL
    results, ordered = GUARDED.run(SCHEMAS[schema], query), " ORDER BY " in gold
    if isinstance(results, str):
        return results
    same = (same_rows(*both, ordered=ordered) for both in zip(golds, results, strict=True))
    return MATCHED if all(same) else MISMATCH


@lru_cache(maxsize=4096)
def _gold_results(schema: Schema, sql: str) -> list[list[Row]]:
    with open_databases(schema) as databases:
        results = [run(database, sql) for database in databases]
    if said := [rows for rows in results if isinstance(rows, str)]:
        raise ValueError(f"the gold query does not run on schema {schema.name} ({said[0]}): {sql}")
    return [rows for rows in results if not isinstance(rows, str)]
