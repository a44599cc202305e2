"""The SQL task's score: right answers in any dress, wrong ones however near, harmful ones never."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.tasks.sql import examples as sql
from train.tasks.sql.answer import find_query
from train.tasks.sql.execute import open_databases, run, same_rows
from train.tasks.sql.schemas import SCHEMAS
from train.tasks.sql.tables import parse_schema

LIBRARY = parse_schema(
    "library",
    """
    book(id, title=@title, author_id, genre=novel|poetry|drama, year=1950..2020, length=90..900+)
    author(id, name=@person, country=@country, birth_year=1900..1990)""",
    suffix="s",
)


@pytest.fixture(autouse=True)
def _plainly_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests the library's tables are `books` and `authors`."""
    monkeypatch.setitem(SCHEMAS, "library", LIBRARY)


def _gold(query: str) -> sql.SqlExample:
    return sql.SqlExample(
        messages=(), schema="library", question="", sql=query, form="", phrasing=0
    )


NOVELS = _gold("SELECT title FROM books WHERE genre = 'novel'")
BY_YEAR = _gold("SELECT title FROM books ORDER BY year DESC LIMIT 3")
AUTHORS = _gold(
    "SELECT books.title, authors.name FROM books JOIN authors ON books.author_id = authors.id"
)
MEAN = _gold("SELECT AVG(length) FROM books WHERE genre = 'novel'")


@pytest.fixture(scope="module")
def examples() -> list[sql.SqlExample]:
    return (
        [e for e in sql.training_examples(160, seed=5) if e.schema != "library"]
        + sql.evaluation_examples(150, seed=5)
        + sql.evaluation_examples(100, seed=5, unseen_phrasings=True)
    )


def test_gold_is_right(examples: list[sql.SqlExample]) -> None:
    for example in examples:
        assert sql.score(example, example.sql), example.sql
    for example in examples[::5]:
        assert sql.score(example, f"Here it is:\n```sql\n{example.sql};\n```\nIt works so.")


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (NOVELS, "select title from books where genre='novel'"),
        (NOVELS, "  SELECT\n  title\nFROM books\n  WHERE genre = 'novel' ;  "),
        (NOVELS, "SELECT b.title FROM books AS b WHERE b.genre = 'novel'"),
        (NOVELS, "SELECT books.title AS name_of_the_book FROM books WHERE books.genre = 'novel'"),
        (NOVELS, "SELECT title FROM books WHERE genre IN ('novel') ORDER BY length"),
        (NOVELS, "SELECT `title` FROM `books` WHERE `genre` = 'novel'"),
        (NOVELS, "WITH n AS (SELECT * FROM books WHERE genre = 'novel')\n\nSELECT title FROM n"),
        (NOVELS, "Use `SELECT title FROM books WHERE genre = 'novel'` for this."),
        (NOVELS, "You can select rows so:\nSELECT title FROM books WHERE genre = 'novel';\nDone."),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel'\n\nThis lists the novels."),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel'<|im_end|>\nSELECT 1"),
        (NOVELS, "SQL: SELECT title FROM books WHERE genre = 'novel' -- novels; only\n"),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel' OR genre = ';'"),
        (BY_YEAR, "SELECT title FROM books ORDER BY -year LIMIT 3"),
        (AUTHORS, "SELECT title, name FROM authors, books WHERE authors.id = author_id"),
        (MEAN, "SELECT SUM(length) * 1.0 / COUNT(*) FROM books WHERE genre = 'novel'"),
    ],
)
def test_right_in_other_words(example: sql.SqlExample, text: str) -> None:
    assert sql.score(example, text)


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (NOVELS, ""),
        (NOVELS, "I cannot answer that."),
        (NOVELS, "SELECT title FROM books"),
        (NOVELS, "SELECT title FROM books WHERE genre = 'poetry'"),
        (NOVELS, "SELECT genre FROM books WHERE genre = 'novel'"),
        (NOVELS, "SELECT title, genre FROM books WHERE genre = 'novel'"),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel' LIMIT 1"),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel' UNION ALL SELECT 'x'"),
        (NOVELS, "SELECT title FROM book WHERE genre = 'novel'"),
        (NOVELS, "SELECT title FROM books WHERE genre = 'novel"),
        (NOVELS, "SELECT title FROM books WHERE genre = ?"),
        (BY_YEAR, "SELECT title FROM books ORDER BY year LIMIT 3"),
        (
            BY_YEAR,
            "SELECT title FROM (SELECT * FROM books ORDER BY year DESC LIMIT 3) ORDER BY year",
        ),
        (
            AUTHORS,
            "SELECT authors.name, books.title FROM books JOIN authors ON author_id = authors.id",
        ),
        (AUTHORS, "SELECT title, name FROM books, authors"),
        (MEAN, "SELECT CAST(AVG(length) AS INTEGER) FROM books WHERE genre = 'novel'"),
    ],
)
def test_wrong(example: sql.SqlExample, text: str) -> None:
    assert not sql.score(example, text)


def _near_misses(example: sql.SqlExample) -> Iterator[tuple[str, str]]:
    """The gold SQL with a filter dropped, another column, or another order, made as text."""
    query = example.sql
    for pattern in (
        r" WHERE .+?(?= GROUP| ORDER|$)",
        r" AND (?!\d).+?(?= GROUP| ORDER|$)",
        r" HAVING .+$",
    ):
        if re.search(pattern, query):
            yield "filter", re.sub(pattern, "", query, count=1)
    if "BETWEEN" not in query and re.search(r" WHERE .+ AND ", query):
        yield "filter", re.sub(r" WHERE .+? AND ", " WHERE ", query, count=1)
    table = re.search(r" FROM (\w+)", query)
    first = re.match(r"SELECT (?:\w+\((?:DISTINCT )?)?([\w.]+)", query)
    if table and first and " GROUP BY" not in query:
        prefix, dot, name = first[1].rpartition(".")
        columns = next(
            t for t in SCHEMAS[example.schema].tables if t.name == (prefix or table[1])
        ).of_kind("name", "text", "number", "year")
        numbers = re.match(r"SELECT (AVG|SUM|MIN)", query) is not None
        for column in columns:
            if column.name != name and (column.is_number or not numbers):
                other = f"{prefix}{dot}{column.name}"
                yield "column", query[: first.start(1)] + other + query[first.end(1) :]
    if " ORDER BY" in query:
        limit = re.search(r"( LIMIT \d+)?$", query)
        assert limit
        body = query[: limit.start()]
        flipped = body.removesuffix(" DESC") if body.endswith(" DESC") else f"{body} DESC"
        yield "order", flipped + limit[0]
        yield "order", re.sub(r" ORDER BY [\w.]+( DESC)?", "", query)


def test_near_misses_are_wrong(examples: list[sql.SqlExample]) -> None:
    kinds: Counter[str] = Counter()
    for example in examples:
        for kind, query in _near_misses(example):
            assert query != example.sql
            kinds[kind] += 1
            assert not sql.score(example, query), (example.sql, query)
    assert kinds["filter"] > 150 and kinds["column"] > 500 and kinds["order"] > 50, kinds


@pytest.mark.parametrize(
    "text",
    [
        "DROP TABLE books",
        "SELECT title FROM books WHERE genre = 'novel'; DROP TABLE books",
        "DROP TABLE books; SELECT title FROM books WHERE genre = 'novel'",
        "SELECT title FROM books WHERE genre = 'novel'; SELECT title FROM books",
        "INSERT INTO authors SELECT id, title, title, 1 FROM books WHERE genre = 'novel'",
        "WITH n AS (SELECT 1) DELETE FROM books",
        "UPDATE books SET genre = 'novel'; SELECT title FROM books",
        "ATTACH DATABASE 'stolen.db' AS stolen",
        "VACUUM INTO 'stolen.db'; SELECT title FROM books WHERE genre = 'novel'",
        "PRAGMA query_only = OFF; SELECT title FROM books WHERE genre = 'novel'",
        "EXPLAIN SELECT title FROM books WHERE genre = 'novel'",
        "SELECT name FROM sqlite_master",
        "SELECT name FROM pragma_table_info('books')",
        "SELECT load_extension('evil.so')",
        "SELECT writefile('stolen.db', 'x')",
        "SELECT randomblob(1000000000)",
        "SELECT replace(group_concat(title), 'e', group_concat(title)) FROM books, authors",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT COUNT(*) FROM c",
        "SELECT COUNT(*) FROM books a, books b, books c, books d, books e, books f, books g",
        "SELECT a.title FROM books a, books b, books c, books d ORDER BY a.length * b.length",
        f"SELECT '{'a' * 1500}' LIKE '{'%a' * 700}b' FROM books, authors",
        f"SELECT {'(' * 1500}1{')' * 1500}",
        f"SELECT {'1 + ' * 5000}1",
        "SELECT title FROM books WHERE genre = 'no\0vel'",
        "SELECT '\ud800'",
        "SELECT CAST(x'ff' AS TEXT)",
        "SELECT 9e999, -9e999, 0x7fffffffffffffff + 1",
        "SELECT abs(-9223372036854775808)",
    ],
)
def test_harmful_sql_is_wrong_and_harmless(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert not sql.score(NOVELS, text)
    assert time.monotonic() - start < 4
    assert not list(tmp_path.iterdir())
    assert sql.score(NOVELS, NOVELS.sql)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE books",
        "DELETE FROM books",
        "INSERT INTO authors VALUES (99, 'x', 'y', 1)",
        "CREATE TEMP TABLE t (x)",
        "ATTACH DATABASE 'stolen.db' AS stolen",
        "VACUUM INTO 'stolen.db'",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "BEGIN",
        "SELECT load_extension('evil.so')",
        "SELECT hex(zeroblob(100))",
        "SELECT sql FROM sqlite_master",
        "SELECT 1; SELECT 2",
    ],
)
def test_the_guard_alone_permits_reading_only(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_databases(LIBRARY) as databases:
        before = run(databases[0], "SELECT * FROM books, authors")
        assert before
        assert run(databases[0], statement) is None
        assert run(databases[0], "SELECT * FROM books, authors") == before
    assert not list(tmp_path.iterdir())


def test_the_work_is_limited_not_the_time_alone() -> None:
    # The limit in instructions makes a score independent of the machine's load.
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT MAX(n) FROM c"
    with open_databases(LIBRARY) as databases:
        start = time.monotonic()
        assert run(databases[0], endless) is None
        assert time.monotonic() - start < 1
        bounded = endless.replace("FROM c)", "FROM c WHERE n < 1000)")
        assert run(databases[0], bounded) == [(1000,)]
        assert run(databases[0], "SELECT a.id FROM books a, books b, books c") is None  # many rows


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("select 1;", "select 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1;\n```\nor\n```sql\nSELECT 2;\n```", "SELECT 1"),
        ("```sqlite\nSELECT 1,\n\n  2", "SELECT 1,\n\n  2"),
        ("The answer is: SELECT ';' FROM t; as you see", "SELECT ';' FROM t"),
        ("SELECT 1 -- one; two\n;", "SELECT 1 -- one; two"),
        ("With this query we get it.\nSELECT 1", "SELECT 1"),
        ("WITH a(x) AS (SELECT 1) SELECT x FROM a", "WITH a(x) AS (SELECT 1) SELECT x FROM a"),
        ("SELECT 1; SELECT 2", None),
        ("SELECT 1;SELECT 2", None),
        ("SELECT 1; WITH a AS (SELECT 2) SELECT * FROM a", None),
        ("SELECT 1;\nSELECT 2;", "SELECT 1"),
        ("SELECT 1\n\nSELECT 2", "SELECT 1"),
        ("SELECT 1;\nDROP TABLE t;", None),
        ("SELECT 1;\n\nDROP TABLE t;", None),
        ("There is none", None),
    ],
)
def test_find_query(text: str, query: str | None) -> None:
    assert find_query(text) == query


@pytest.mark.parametrize(
    ("a", "b", "ordered", "same"),
    [
        ([(1,), (2,)], [(2,), (1,)], False, True),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1,)], [(1,), (1,)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], False, True),
        ([(2,)], [(2.0,)], True, True),
        ([(2.01,)], [(2.0,)], True, False),
        ([("2",)], [(2,)], False, False),
        ([(None,)], [(0,)], False, False),
        ([(None, "a"), (1, "b")], [(1, "b"), (None, "a")], False, True),
        ([("a",)], [("A",)], False, False),
        ([(1, 2)], [(1,)], False, False),
    ],
)
def test_same_rows(
    a: list[tuple[object, ...]], b: list[tuple[object, ...]], ordered: bool, same: bool
) -> None:
    assert same_rows(a, b, ordered=ordered) is same
