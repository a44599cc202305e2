"""Finds the SQL in a generated text, and judges it by the rows that it returns."""

import re
from functools import lru_cache

from train.environments.sql.databases import GUARDED, open_databases, same_rows
from train.environments.sql.guard import REFUSED, Row, run
from train.environments.sql.schemas import SCHEMAS, Schema

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_START = r"(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^()]*\)\s*)?AS\s*(?:\w+\s+){0,2}\()"
_AT_LINE = re.compile(rf"(?:^|[\n:`])[ \t]*({_START})", re.IGNORECASE)
_ANYWHERE = re.compile(rf"\b({_START})", re.IGNORECASE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_OTHER_STATEMENT = re.compile(
    r"\b(?:(?:CREATE|DROP|ALTER)\s+(?:TEMP\w*\s+|UNIQUE\s+|VIRTUAL\s+)?(?:TABLE|VIEW|INDEX|TRIGGER)"
    r"|(?:INSERT|REPLACE)\s+(?:OR\s+\w+\s+)?INTO|DELETE\s+FROM|UPDATE\s+\S+\s+SET"
    r"|ATTACH\s+(?:DATABASE\b|')|DETACH\s+\w+|PRAGMA\s+\w+|VACUUM\b|REINDEX\b"
    r"|EXPLAIN\s+(?:SELECT\b|QUERY\s+PLAN\b)"
    r"|BEGIN\s*(?:;|TRANSACTION|DEFERRED|IMMEDIATE|EXCLUSIVE)|COMMIT\s*;|ROLLBACK\s*;|SAVEPOINT\s+\w+)",
    re.IGNORECASE,
)


def find_query(text: str) -> str | None:
    """Returns the SELECT (or WITH) statement in a model's answer, without the text around it.

    Ignores Markdown fences, text before the statement, its semicolon, and further lines: small
    models often go on with other queries.

    Returns:
      The statement; None if there is none, if a second one follows on the same line, or if the
      answer has a statement of another kind anywhere.
    """
    text = _cut_special_tokens(text)
    if _OTHER_STATEMENT.search(text):
        return None
    fence = _FENCE.search(text)
    is_fenced = fence is not None and _ANYWHERE.search(fence[1]) is not None
    if fence is not None and is_fenced:
        text = fence[1]
    start_match = _AT_LINE.search(text) or _ANYWHERE.search(text)
    if not start_match:
        return None
    start = start_match.start(1)
    query = text[start:]
    if text[:start].endswith("`"):
        query = query.partition("`")[0]
    # Quoted text neither ends nor begins a statement. Spaces in its place keep all positions.
    unquoted = _QUOTED.sub(lambda match: " " * len(match[0]), query)
    statement, _, following = unquoted.partition(";")
    blank_line = _BLANK_LINE.search(statement)
    is_select = start_match[1][:1] in "Ss"  # a WITH may go on after a blank line
    if blank_line and is_select and not is_fenced:
        statement = statement[: blank_line.start()]
        following = ""
    if re.match(rf"[ \t]*{_START}", following, re.IGNORECASE):
        return None
    return query[: len(statement)].strip()


def _cut_special_tokens(text: str) -> str:
    return text.partition("<|")[0]  # text after a chat template's token is no answer


MATCHED, MISMATCH, NO_SQL = "matched", "mismatch", "no SQL"


def judge(schema: str, gold: str, text: str) -> str:
    """Returns the verdict on the SQL in a generated text, run on the schema's databases.

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
        raise ValueError(f"There is no schema {schema!r}. Use one of: {', '.join(SCHEMAS)}.")
    gold_results = _gold_results(SCHEMAS[schema], gold)
    query = find_query(text)
    if query is None:
        return REFUSED if _OTHER_STATEMENT.search(_cut_special_tokens(text)) else NO_SQL
    results = GUARDED.run(SCHEMAS[schema], query)
    if isinstance(results, str):  # why there are no rows
        return results
    is_ordered = " ORDER BY " in gold
    for gold_rows, rows in zip(gold_results, results, strict=True):
        if not same_rows(gold_rows, rows, ordered=is_ordered):
            return MISMATCH
    return MATCHED


@lru_cache(maxsize=4096)
def _gold_results(schema: Schema, sql: str) -> list[list[Row]]:
    """Returns the rows of a gold query on each of the schema's databases."""
    results = []
    with open_databases(schema) as databases:
        for database in databases:
            rows = run(database, sql)
            if isinstance(rows, str):
                raise ValueError(
                    f"The gold query does not run on schema {schema.name} ({rows}): {sql}. "
                    "Correct it."
                )
            results.append(rows)
    return results
