"""Hostile SQL by the thousand: each ends within its limit, changes nothing, leaves no memory."""

import hashlib
import json
import random
import re
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import THOROUGH
from train.environments.sql import guard
from train.environments.sql.databases import GUARDED, fill_script
from train.environments.sql.examples import training_examples
from train.environments.sql.judge import MATCHED, MISMATCH, NO_SQL, find_query, judge
from train.environments.sql.schemas import SCHEMAS
from train.processes.pool import NoAnswer, ProgramPool

EXAMPLES = training_examples(40, seed=11)
SCHEMA, GOLD = EXAMPLES[0].schema, EXAMPLES[0].sql
TABLES = [table.name for table in SCHEMAS[SCHEMA].tables]
COLUMNS = [column.name for table in SCHEMAS[SCHEMA].tables for column in table.columns]
WORDS = (
    "SELECT FROM WHERE GROUP BY HAVING ORDER LIMIT OFFSET UNION ALL EXCEPT INTERSECT WITH "
    "RECURSIVE "
    "AS NOT IN EXISTS LIKE GLOB REGEXP MATCH BETWEEN AND OR CASE WHEN THEN ELSE END NULL IS CAST "
    "COLLATE NOCASE JOIN LEFT CROSS NATURAL USING ON DISTINCT VALUES OVER PARTITION WINDOW ROWS "
    "INSERT INTO DELETE UPDATE SET REPLACE ATTACH DATABASE PRAGMA RETURNING MATERIALIZED ( ) , ; * "
    "+ - / % || -> ->> << >> = <> ? ?9 :a @b $c ' \" ` [ ] /* */ -- 1 0 -1 9e999 0x7f x'00' 'a' "
    "count sum max group_concat randomblob zeroblob printf char json_each sqlite_master rowid"
).split()
Maker = Callable[[random.Random], str]


def recursive(r: random.Random) -> str:
    start, more = r.choice(
        [("1", "n+1"), ("'ab'", "n||n"), ("1.5", "n*n"), ("'x'", "replace(n,'x','xx')")]
    )
    union = r.choice(["UNION", "UNION ALL"])
    cross = r.choice(["", "", f", {r.choice(TABLES)} t", f", {', '.join(TABLES)}", ", c d"])
    used = r.choice(
        ["n", "COUNT(*)", "MAX(n)", "group_concat(n)", "SUM(n) OVER (ORDER BY n)", "DISTINCT n"]
    )
    end = r.choice(["", " ORDER BY 1 DESC", " GROUP BY 1", f" LIMIT {r.randrange(10**9)}"])
    return (
        f"WITH RECURSIVE c(n) AS (SELECT {start} {union} SELECT {more} FROM c{cross}) "
        f"SELECT {used} FROM c{end}"
    )


def crossed(r: random.Random) -> str:
    tables = [f"{r.choice(TABLES)} t{i}" for i in range(r.randint(3, 70))]
    used = r.choice(["COUNT(*)", "*", "t0.id", "MAX(t1.id * t2.id)", "group_concat(t0.id)"])
    end = r.choice(["", " ORDER BY t0.id + t1.id", " WHERE t0.id LIKE t1.id || '%' || t2.id"])
    sql = f"SELECT {used} FROM {', '.join(tables)}{end}"
    return r.choice([sql, f"SELECT ({sql}) FROM {r.choice(TABLES)}"])


def large(r: random.Random) -> str:
    n = r.choice([10**3, 10**6, 10**9, 2**31 - 1, 2**63 - 1, -1])
    value = r.choice(
        [
            f"randomblob({n})",
            f"zeroblob({n})",
            f"printf('%.{n}c', 'x')",
            f"printf('%{n}d', 1)",
            f"format('%.*f', {n}, 1)",
            f"substr(group_concat(a.id), 1, {n})",
            "hex(" * r.randint(1, 30) + "randomblob(9)" + ")" * 30,
            "replace(" * 20 + "'eeee'" + ", 'e', 'eeee')" * 20,
            "replace(" * 5 + "group_concat(a.id)" + ", '1', group_concat(b.id))" * 5,
            f"char({', '.join(['65'] * r.randint(1, 900))})",
            "json_group_array(a.id)",
            f"round(1.5, {n})",
            f"CAST({n} AS TEXT) || x'ff00fe'",
        ]
    )
    shown = r.choice([value, f"length({value})", f"quote({value})"])
    return f"SELECT {shown} FROM {r.choice(TABLES)} a, {r.choice(TABLES)} b"


def patterns(r: random.Random) -> str:
    kind, any_, one = r.choice([("LIKE", "%", "_"), ("GLOB", "*", "?"), ("GLOB", "*[a-z]", "[^b]")])
    n = r.choice([r.randint(5, 16), r.randint(5, 16), r.randint(17, 500)])
    text = "a" * r.randint(10, 2100)
    pattern = r.choice([f"{any_}a", f"{any_}{one}", f"a{any_}"]) * n + "b"
    return f"SELECT COUNT(*) FROM {', '.join(TABLES)} WHERE '{text}' {kind} '{pattern}'"


def statements(r: random.Random) -> str:
    table = r.choice(TABLES)
    sql = r.choice(
        [
            "ATTACH 'stolen.db' AS s",
            "ATTACH DATABASE 'file:stolen.db?mode=rwc' AS s",
            "VACUUM INTO 'stolen.db'",
            "PRAGMA writable_schema=ON",
            "PRAGMA temp_store_directory='.'",
            "PRAGMA query_only = OFF",
            "PRAGMA hard_heap_limit=0",
            f"DROP TABLE {table}",
            f"DELETE FROM {table} RETURNING *",
            f"UPDATE {table} SET id = 0",
            f"CREATE TEMP TABLE s AS SELECT * FROM {table}",
            f"ALTER TABLE {table} RENAME TO s",
            f"REINDEX {table}",
            "BEGIN EXCLUSIVE",
            "SAVEPOINT s",
            "SELECT load_extension('./evil')",
            "SELECT readfile('/etc/passwd')",
            "SELECT writefile('stolen.db', 'x')",
            "SELECT fts3_tokenizer('simple', x'41414141')",
            "SELECT * FROM pragma_database_list",
            "SELECT * FROM sqlite_dbpage",
            "SELECT * FROM json_each('[1]')",
            f"EXPLAIN SELECT * FROM {table}",
        ]
    )
    return r.choice(
        [sql, f"{sql}; {GOLD}", f"{GOLD}; {sql}", f"SELECT 1;\n{sql}", f"```sql\n{sql}\n```"]
    )


def written(r: random.Random) -> str:
    table = r.choice(TABLES)
    write = r.choice(
        [
            f"DELETE FROM {table} WHERE id IN (SELECT x FROM c)",
            f"INSERT INTO {table}(id) SELECT x FROM c",
            f"REPLACE INTO {table}(id) VALUES (1)",
            f"UPDATE {table} SET id = (SELECT x FROM c) RETURNING *",
        ]
    )
    return r.choice(
        [
            f"WITH c(x) AS (SELECT 1) {write}",
            f"WITH c(x) AS (SELECT 1), d AS ({write}) SELECT * FROM d",
            f"SELECT * FROM ({write.replace('SELECT x FROM c', '1')})",
            f"SELECT 1 /*\n*/; {write}",
            f"with c(x) as (select 1)/**/{write.lower()}",
        ]
    )


def commented(r: random.Random) -> str:
    comment = r.choice(["/*{}*/", "/*{}", "--{}\n", "/*/*{}*/", "{}*/", "--{}\r", "/**/;--{}\n"])
    parts = re.split(r"( )", GOLD)
    parts.insert(
        r.randrange(len(parts)), comment.format(r.choice(["", ";", "'", "SELECT 1", "x" * 5000]))
    )
    return "".join(parts)


def long(r: random.Random) -> str:
    n = int(10 ** r.uniform(3, 5.5))
    part = r.choice(
        [
            "1,",
            "1 + ",
            " ",
            "\n",
            "(",
            "'",
            "''",
            '"',
            "/*",
            "a AS b ",
            "WITH a AS ",
            "WITH a(",
            "x:",
            "UPDATE ",
            "CREATE ",
            "SELECT ",
            "```",
            "`",
            ";",
            "SELECT 1;\n",
            "\0",
            "é",
            "𝒜",
            "WITH ",
        ]
    )
    start, end = r.choice(["SELECT ", "WITH a AS ", ""]), r.choice(["1", "", GOLD])
    return start + part * (n // len(part)) + end


def deep(r: random.Random) -> str:
    n = int(10 ** r.uniform(1, 3))
    a, middle, b = r.choice(
        [
            ("(", "1", ")"),
            ("SELECT * FROM (", f"SELECT * FROM {TABLES[0]}", ")"),
            ("NOT ", "1", ""),
            ("-", "1", ""),
            ("CASE WHEN 1 THEN ", "1", " END"),
            ("abs(", "1", ")"),
            ("1 IN (", "1", ")"),
            ("1 + (SELECT ", "1", ")"),
            ("EXISTS (SELECT ", "1", ")"),
            ("(VALUES (", "1", "))"),
            ("CAST(", "1", " AS TEXT)"),
            ("SELECT 1 UNION ALL ", "SELECT 1", ""),
            ("1||", "1", ""),
        ]
    )
    body = a * n + middle + b * n
    return body if body.startswith("SELECT") else f"SELECT {body}"


def doubled(r: random.Random) -> str:
    body = r.choice(
        [
            "SELECT a.* FROM t{p} a, t{p} b",
            "SELECT * FROM t{p} UNION ALL SELECT * FROM t{p}",
            "SELECT * FROM t{p} WHERE x IN (SELECT x FROM t{p}) OR x IN (SELECT x FROM t{p})",
        ]
    )
    n = r.randint(3, 45)
    tables = [f"t{i} AS ({body.format(p=i - 1)})" for i in range(1, n)]
    first = f"t0 AS {r.choice(['', 'NOT MATERIALIZED '])}(SELECT id x FROM {TABLES[0]})"
    return f"WITH {', '.join([first, *tables])} SELECT * FROM t{n - 1}"


def strange(r: random.Random) -> str:
    ranges = [
        (0, 0x20),
        (0x80, 0x250),
        (0x2000, 0x206F),
        (0xD800, 0xDFFF),
        (0xFF00, 0xFFEF),
        (0x1F300, 0x1F6FF),
        (0xE0000, 0xE007F),
        (0x0300, 0x036F),
    ]
    noise = "".join(chr(r.randint(*r.choice(ranges))) for _ in range(r.randint(1, 300)))
    full = GOLD.translate({ord(c): ord(c) + 0xFEE0 for c in "SELCTFROM"})
    return r.choice(
        [
            f"SELECT '{noise}'",
            f"SELECT {noise} FROM {TABLES[0]}",
            f"{noise}{GOLD}{noise}",
            full,
            f'SELECT "{noise}" FROM {TABLES[0]}',
            GOLD.replace(" ", noise[0]),
        ]
    )


def soup(r: random.Random) -> str:
    words = [r.choice([*WORDS, *TABLES, *COLUMNS]) for _ in range(r.randint(3, 120))]
    return f"SELECT {' '.join(words)}"


def spliced(r: random.Random) -> str:
    parts = r.choice(EXAMPLES).sql.split(" ")
    other = r.choice(EXAMPLES).sql.split(" ")
    for _ in range(r.randint(1, 6)):
        parts[r.randrange(len(parts))] = r.choice([*other, *WORDS])
    return " ".join(parts)


MAKERS: list[Maker] = [
    recursive,
    crossed,
    large,
    patterns,
    statements,
    written,
    commented,
    long,
    deep,
    doubled,
    strange,
    soup,
    spliced,
]
MAY_BE_RIGHT = (commented, strange, spliced, soup, long)
KINDS = {MATCHED, MISMATCH, NO_SQL, guard.REFUSED, guard.ERROR, guard.TIMEOUT}


def most_memory(pid: int) -> int:
    """Returns the kilobytes of a process at its peak."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def checked(n: int, seed: int) -> Counter:
    """Judges hostile texts, two at a time; returns how often each maker's had each kind."""

    def timed(i: int) -> tuple[str, str, float]:
        make = MAKERS[i % len(MAKERS)]
        text = make(random.Random(f"{seed} {i}"))
        start = time.monotonic()
        kind = judge(SCHEMA, GOLD, text)
        seconds = time.monotonic() - start
        assert kind in KINDS and seconds < 20, (kind, seconds, text[:2000])
        assert kind != MATCHED or make in MAY_BE_RIGHT, text
        return make.__name__, kind, seconds

    tracemalloc.start()
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(timed, range(n // 2)))
            before, _ = tracemalloc.get_traced_memory()
            found += threads.map(timed, range(n // 2, n))
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 3_000_000  # bytes, for the kinds and times
    processes = [copy._process for copy in GUARDED._pool._copies if copy._process]
    assert processes and all(most_memory(one.pid) < 100_000 for one in processes)
    assert judge(SCHEMA, GOLD, GOLD) == MATCHED
    assert not list(Path.cwd().iterdir())
    return Counter((name, kind) for name, kind, _ in found)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")


@needs_proc
@pytest.mark.slow
def test_thousands_of_hostile_texts() -> None:
    n = 10_000 if THOROUGH else 1_500
    kinds = checked(n, 1)
    print(kinds)
    assert {kind for _, kind in kinds} >= KINDS - {MATCHED}
    for name, kind in (
        ("statements", guard.REFUSED),
        ("recursive", guard.TIMEOUT),
        ("long", NO_SQL),
    ):
        assert kinds[name, kind] > n / 100, kinds


KEPT = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import guard
guard.signal.signal(guard.signal.SIGPROF, guard.signal.SIG_DFL)
with open(sys.argv[2]) as file:
    connection = guard.open_database(file.read())
for line in sys.stdin:
    with guard._limited_time():
        rows = guard.run(connection, json.loads(line))
    connection.set_authorizer(None)
    print(hashlib.sha256(connection.serialize()).hexdigest(), flush=True)
"""


@pytest.mark.slow
def test_the_guard_alone_keeps_a_database_as_it_is(tmp_path: Path) -> None:
    """Runs all on one database: judged texts get new ones, which hides what they change."""
    script = tmp_path / "script.sql"
    script.write_text(fill_script(SCHEMAS[SCHEMA], 0))
    command = [sys.executable, "-c", KEPT, str(Path(guard.__file__).parent), str(script)]
    served = ProgramPool(command, {})
    with guard.open_database(script.read_text()) as connection:
        expected = hashlib.sha256(connection.serialize()).hexdigest()
    connection.close()
    makers, asked = [statements, written, soup, spliced, recursive, large], 0
    for i in range(300):
        text = makers[i % len(makers)](random.Random(i))
        for sql in {text, text.partition("; ")[2], find_query(text) or "SELECT 1"}:
            try:
                assert served.ask(json.dumps(sql), 20) == expected, sql
                asked += 1
            except NoAnswer as error:
                assert "exit code -27" in str(error), sql  # its own clock ended it
    served.close()
    assert asked > 500
    assert {path.name for path in tmp_path.iterdir()} == {"script.sql"}
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "part", ["WITH a AS ", "WITH a(", "'", "x:", "`", "\n", "SELECT ", "CREATE ", "/*", "WITH "]
)
def test_a_query_is_sought_in_linear_time(part: str) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        find_query(part * (n // len(part)))
        return time.process_time() - start

    assert seconds(200_000) < 1.0
