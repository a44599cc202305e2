"""The SQL task's score: right answers in any dress, wrong ones however near, harmful ones never."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.environments.sql import examples as sql
from train.environments.sql import guard
from train.environments.sql.databases import GUARDED, open_databases, same_rows
from train.environments.sql.guard import ERROR, REFUSED, TIMEOUT, run
from train.environments.sql.judge import find_query
from train.environments.sql.schemas import SCHEMAS, parse_schema

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


@pytest.mark.slow
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
        ).columns_of_kind("name", "text", "number", "year")
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


@pytest.mark.slow
def test_near_misses_are_wrong(examples: list[sql.SqlExample]) -> None:
    kinds: Counter[str] = Counter()
    for example in examples:
        for kind, query in _near_misses(example):
            assert query != example.sql
            kinds[kind] += 1
            assert not sql.score(example, query), (example.sql, query)
    assert kinds["filter"] > 150 and kinds["column"] > 500 and kinds["order"] > 50, kinds


def _nested(levels: int, body: str) -> str:
    """Common table expressions of which each reads the one before twice, in each of its parts."""
    tables = [f"t{i} AS ({body.format(p=i - 1)})" for i in range(1, levels)]
    return (
        f"WITH t0 AS (SELECT id, title FROM books), {', '.join(tables)} SELECT * FROM t{levels - 1}"
    )


def _books(n: int) -> str:
    """Returns the same table `n` times, for a FROM clause without conditions."""
    return ", ".join(f"books b{i}" for i in range(n))


RECURSIVE = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
HOSTILE = {
    "drop": "DROP TABLE books",
    "a drop after an answer": f"{NOVELS.sql}; DROP TABLE books",
    "a drop before an answer": f"DROP TABLE books; {NOVELS.sql}",
    "two statements": f"{NOVELS.sql}; SELECT title FROM books",
    "insert": "INSERT INTO authors SELECT id, title, title, 1 FROM books WHERE genre = 'novel'",
    "delete behind a table expression": "WITH n AS (SELECT 1) DELETE FROM books",
    "update": "UPDATE books SET genre = 'novel'; SELECT title FROM books",
    "attach": "ATTACH DATABASE 'stolen.db' AS stolen",
    "vacuum": f"VACUUM INTO 'stolen.db'; {NOVELS.sql}",
    "pragma": f"PRAGMA query_only = OFF; {NOVELS.sql}",
    "explain": f"EXPLAIN {NOVELS.sql}",
    "the catalogue": "SELECT name FROM sqlite_master",
    "the catalogue by a function": "SELECT name FROM pragma_table_info('books')",
    "an extension": "SELECT load_extension('evil.so')",
    "a file": "SELECT writefile('stolen.db', 'x')",
    "a table function": "SELECT value FROM generate_series(1, 1000000000)",
    "large random": "SELECT randomblob(1000000000)",
    "large zeros": "SELECT length(zeroblob(1000000000)) FROM books",
    "printf": "SELECT length(printf('%.*c', 1000000000, 'x')) FROM books",
    "format": "SELECT format('%1000000000d', 1)",
    "hex": "SELECT hex(hex(hex(hex(title)))) FROM books",
    "replace": "SELECT replace(group_concat(title), 'e', group_concat(title)) FROM books, authors",
    "replace of replace": "SELECT "
    + "replace(" * 40
    + "title"
    + ", 'e', 'eeee')" * 40
    + " FROM books",
    "json": "SELECT json_group_array(title) FROM books",
    "endless rows": f"{RECURSIVE} SELECT n FROM c",
    "endless count": f"{RECURSIVE} SELECT COUNT(*) FROM c",
    "endless texts": RECURSIVE.replace("1", "'a'", 1).replace("n + 1", "n || n")
    + " SELECT n FROM c",
    "endless sort": f"{RECURSIVE} SELECT n FROM c ORDER BY -n",
    "an endless window": f"{RECURSIVE} SELECT SUM(n) OVER (ORDER BY n) FROM c",
    "endless groups": f"{RECURSIVE} SELECT n, COUNT(*) FROM c GROUP BY n",
    "endless distinct": f"{RECURSIVE} SELECT DISTINCT n FROM c",
    "endless concat": f"{RECURSIVE} SELECT group_concat(n) FROM c",
    "cross join": f"SELECT COUNT(*) FROM {_books(7)}",
    "sorted cross join": f"SELECT b0.title FROM {_books(4)} ORDER BY b0.length * b1.length",
    "cross joins in each row": f"SELECT (SELECT COUNT(*) FROM {_books(3)}) FROM books a",
    "many tables": f"SELECT COUNT(*) FROM {_books(64)}",
    "like": f"SELECT '{'a' * 900}' LIKE '{'%a' * 400}b' FROM books, authors",
    "short like": f"SELECT '{'a' * 900}' LIKE '{'%a' * 49}b' FROM books, authors",
    "glob": f"SELECT '{'a' * 900}' GLOB '{'*a' * 49}b' FROM books, authors",
    "globbed classes": f"SELECT '{'a' * 900}' GLOB '{'*[a-z]' * 16}b' FROM books, authors",
    "parentheses": f"SELECT {'(' * 900}1{')' * 900}",
    "a long sum": f"SELECT {'1 + ' * 5000}1",
    "a deep sum": f"SELECT {'1+' * 900}1",
    "many values": f"SELECT * FROM (VALUES {', '.join(['(1)'] * 350)}) a, {_books(2)}",
    "many parts": " UNION ALL ".join(["SELECT 1"] * 90),
    "many columns": f"SELECT {', '.join(['title'] * 250)} FROM books",
    "nested selects": f"{'SELECT * FROM (' * 100}SELECT * FROM books{')' * 100}",
    "nested table expressions": _nested(40, "SELECT a.id, b.title FROM t{p} a, t{p} b"),
    "tripled table expressions": _nested(25, "SELECT a.id, b.title FROM t{p} a, t{p} b, t{p} c"),
    "table expressions in parts": _nested(40, "SELECT * FROM t{p} UNION ALL SELECT * FROM t{p}"),
    "table expressions in filters": _nested(
        30, "SELECT * FROM t{p} WHERE id IN (SELECT id FROM t{p}) OR id IN (SELECT id FROM t{p})"
    ),
    "NUL": "SELECT title FROM books WHERE genre = 'no\0vel'",
    "a lone surrogate": "SELECT '\ud800'",
    "bytes that are no text": "SELECT CAST(x'ff' AS TEXT)",
    "numbers beyond": "SELECT 9e999, -9e999, 0x7fffffffffffffff + 1",
    "no number": "SELECT abs(-9223372036854775808)",
    "a parameter": "SELECT ?1000000000",
}


def _process() -> subprocess.Popen[str]:
    """Returns the process that runs queries."""
    process = GUARDED._pool._copies[0]._process
    assert process is not None
    return process


def _memory() -> int:
    """Returns the kilobytes of the process that runs queries, at their peak."""
    status = Path(f"/proc/{_process().pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_harmful_sql_is_wrong_and_harmless(text: str) -> None:
    def spent() -> float:
        return time.process_time() + sum(os.times()[2:4])

    start, before = time.monotonic(), spent()
    assert not sql.score(NOVELS, text)
    assert spent() - before < 1.0  # of processor time, also of a process that was ended
    assert time.monotonic() - start < 20
    assert not list(Path.cwd().iterdir())
    assert sql.score(NOVELS, NOVELS.sql)
    if Path("/proc/self/status").exists():
        assert _memory() < 100_000


@pytest.mark.slow
def test_what_takes_too_long_is_ended_by_its_own_clock() -> None:
    """The control: without the limits of SQLite, the process's own ones end a query."""
    program = Path(guard.__file__).read_text()
    limits = r"_MAX_(CHECKS|QUESTIONS) = [\d_]+"
    lenient, n_limits = re.subn(limits, r"_MAX_\1 = 10**9", program)
    assert n_limits == 2
    request = json.dumps(
        {"scripts": ["CREATE TABLE t (x)"], "sql": f"{RECURSIVE} SELECT MAX(n) FROM c"}
    )
    command = [sys.executable, "-I", "-S", "-c", lenient]
    done = subprocess.run(command, input=request + "\n", capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and done.returncode == -signal.SIGPROF


def test_a_process_that_ended_is_replaced() -> None:
    assert sql.score(NOVELS, NOVELS.sql)
    _process().kill()
    _process().wait()
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
def test_the_guard_alone_permits_reading_only(statement: str) -> None:
    with open_databases(LIBRARY) as databases:
        before = run(databases[0], "SELECT * FROM books, authors")
        assert before
        assert run(databases[0], statement) in (REFUSED, ERROR)
        assert run(databases[0], "SELECT * FROM books, authors") == before
    assert not list(Path.cwd().iterdir())


def test_the_work_is_limited_not_the_time_alone() -> None:
    # The limit in instructions makes a score independent of the machine's load.
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT MAX(n) FROM c"
    with open_databases(LIBRARY) as databases:
        start = time.monotonic()
        assert run(databases[0], endless) == TIMEOUT
        assert time.monotonic() - start < 1
        bounded = endless.replace("FROM c)", "FROM c WHERE n < 1000)")
        assert run(databases[0], bounded) == [(1000,)]
        many_rows = "SELECT a.id FROM books a, books b, books c"
        assert run(databases[0], many_rows) == TIMEOUT


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
