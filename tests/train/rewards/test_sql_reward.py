"""The reward of SQL: its kinds, against SQLite itself, and its time."""

import random
import sqlite3
import time
from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from train.console.errors import UserError
from train.environments.sql.databases import DATABASES, fill_script
from train.environments.sql.examples import score, training_examples
from train.environments.sql.guard import ERROR, REFUSED, TIMEOUT
from train.environments.sql.judge import MATCHED, MISMATCH, NO_SQL, judge
from train.environments.sql.schemas import SCHEMAS
from train.rewards.find import find_rewards
from train.rewards.reward import RewardBatch

EXAMPLES = training_examples(60, seed=3)
ONE = EXAMPLES[0]
TABLE = SCHEMAS[ONE.schema].tables[0].name
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT "


def rewards(texts, examples, name="sql"):
    columns = {"schema": [e.schema for e in examples], "gold": [e.sql for e in examples]}
    n = len(texts)
    with closing(find_rewards([name], columns=[*columns], max_tokens=1)) as found:
        return found(RewardBatch([None] * n, texts, [[1]] * n, columns, 1))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (ONE.sql, MATCHED),
        (f"So:\n```sql\n{ONE.sql};\n```", MATCHED),
        (f"SELECT * FROM {TABLE}", MISMATCH),
        ("SELECT 1", MISMATCH),
        ("I do not know.", NO_SQL),
        ("", NO_SQL),
        ("SELECT 1; SELECT 2", NO_SQL),
        (f"DROP TABLE {TABLE}", REFUSED),
        (f"WITH c AS (SELECT 1) DELETE FROM {TABLE}", REFUSED),
        ("WITH c AS (SELECT 1) REPLACE INTO c VALUES (1)", REFUSED),
        ("SELECT * FROM sqlite_master", REFUSED),
        ("SELECT randomblob(9)", REFUSED),
        ("SELECT absent FROM absent", ERROR),
        ("SELECT FROM", ERROR),
        (f"{ENDLESS} n FROM c", TIMEOUT),
        (f"{ENDLESS} COUNT(*) FROM c", TIMEOUT),
        (f"SELECT {'1 +' * 2000} 1", TIMEOUT),
        (f"SELECT a.* FROM {', '.join(f'{TABLE} {x}' for x in 'abcd')}", TIMEOUT),
    ],
)
def test_kinds(text, kind):
    assert judge(ONE.schema, ONE.sql, text) == kind


def by_sqlite(example, text):
    """Returns whether two queries agree as multisets, or lists, on SQLite without any guard."""
    for database in range(DATABASES):
        connection = sqlite3.connect(":memory:")
        connection.executescript(fill_script(SCHEMAS[example.schema], database))
        both = [connection.execute(sql).fetchall() for sql in (example.sql, text)]
        connection.close()
        both = [[repr(row) for row in rows] for rows in both]
        if "ORDER BY" not in example.sql:
            both = [Counter(rows) for rows in both]
        if both[0] != both[1]:
            return False
    return True


def test_rewards_are_as_sqlite_says():
    draw = random.Random(0)
    texts, examples = [], []
    for example in EXAMPLES:
        same_schema = [e for e in EXAMPLES if e.schema == example.schema]
        examples += [example] * 3
        texts += [example.sql, draw.choice(same_schema).sql, f"SELECT * FROM ({example.sql})"]
    scored = rewards(texts, examples)
    expected = [by_sqlite(*both) for both in zip(examples, texts, strict=True)]
    np.testing.assert_array_equal(scored.total, np.array(expected, np.float32))
    assert scored.kinds["sql"] == {MATCHED: sum(expected), MISMATCH: len(texts) - sum(expected)}
    assert 60 < sum(expected) < 170 and not scored.failures
    assert [score(*both) for both in zip(examples, texts, strict=True)] == expected


def test_the_dense_reward_gives_a_tenth_for_other_rows():
    texts = [ONE.sql, "SELECT 1", "SELECT", "", f"DROP TABLE {TABLE}", f"{ENDLESS} n FROM c"]
    scored = rewards(texts, [ONE] * 6, "sql-dense")
    np.testing.assert_allclose(scored.total, [1, 0.1, 0, 0, 0, 0])
    assert sum(scored.kinds["sql-dense"].values()) == 6


def test_hundreds_take_a_second_and_equal_ones_are_run_once(monkeypatch):
    examples = [e for e in EXAMPLES for _ in range(8)]
    texts = [e.sql + " " * (i % 4) for i, e in enumerate(examples)]
    asked = []

    def counting(*asking):
        asked.append(asking)
        return judge(*asking)

    monkeypatch.setattr("train.rewards.find.judge", counting)
    rewards(texts, examples)
    start = time.monotonic()
    assert rewards(texts, examples).total.all()
    assert time.monotonic() - start < 5
    different = {(e.schema, e.sql, text) for e, text in zip(examples, texts, strict=True)}
    assert len(asked) == 2 * len(different) < 2 * 241


def test_a_gold_query_that_does_not_run_is_an_error_of_the_user():
    for schema, gold in (("absent", "SELECT 1"), (ONE.schema, "SELECT absent")):
        with closing(find_rewards(["sql"], columns=["schema", "gold"], max_tokens=1)) as found:
            with pytest.raises(UserError, match="--reward sql: "):
                columns = {"schema": [schema], "gold": [gold]}
                found(RewardBatch([0], ["SELECT 1"], [[1]], columns, 1))
    with pytest.raises(UserError, match="needs the column 'schema'"):
        find_rewards(["sql"], columns=["gold"], max_tokens=1)
