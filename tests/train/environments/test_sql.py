"""The SQL task's examples: how many, how different, how balanced, and always the same."""

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from train.environments.sql import examples as sql
from train.environments.sql.databases import DATABASES, fill_script, filled_tables
from train.environments.sql.forms import FORMS, N_TRAINED, PHRASINGS
from train.environments.sql.schemas import SCHEMAS, TEST_SCHEMAS, TRAINING_SCHEMAS, Draw, Schema

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def training() -> list[sql.SqlExample]:
    return sql.training_examples(10 * len(FORMS))


@pytest.fixture(scope="module")
def evaluation() -> list[sql.SqlExample]:
    return sql.evaluation_examples(200)


@pytest.fixture(scope="module")
def unseen() -> list[sql.SqlExample]:
    return sql.evaluation_examples(200, unseen_phrasings=True)


def test_there_is_enough_of_everything() -> None:
    assert len(TRAINING_SCHEMAS) >= 40
    assert len(TEST_SCHEMAS) >= 15
    assert len(FORMS) >= 20
    assert PHRASINGS.keys() == FORMS.keys()
    assert N_TRAINED == 8
    for form, phrasings in PHRASINGS.items():
        assert len(set(phrasings)) == len(phrasings) == 10, form


def test_training_and_test_share_no_table() -> None:
    def stem(name: str) -> str:
        return re.sub(r"(ies|es|s|y|e)$", "", name.lower().replace("_", ""))

    stems = [
        {stem(word) for s in schemas for t in s.tables for word in (t.name, t.singular, t.plural)}
        for schemas in (TRAINING_SCHEMAS, TEST_SCHEMAS)
    ]
    assert stem("policies") == stem("policy") and stem("houses") == stem("house")
    assert len(stems[0]) >= 80 and len(stems[1]) >= 30
    assert not stems[0] & stems[1]


def suffix(schema: Schema) -> str:
    return os.path.commonprefix([table.name[::-1] for table in schema.tables])[::-1]


def test_no_question_tells_how_the_database_names_its_tables(
    training: list[sql.SqlExample], unseen: list[sql.SqlExample]
) -> None:
    # So no query can be written without reading the schema.
    for example in training + unseen:
        names = [table.name for table in SCHEMAS[example.schema].tables]
        assert any(name in example.sql for name in names)
        assert not any(name.lower() in example.question.lower() for name in names)


def test_conventions_of_the_test_databases_are_not_trained_on() -> None:
    trained, tested = ({suffix(s) for s in group} for group in (TRAINING_SCHEMAS, TEST_SCHEMAS))
    assert len(trained) >= 20 and len(tested) >= 10
    assert not {word.lower() for word in trained} & {word.lower() for word in tested}


def test_the_three_databases_differ() -> None:
    for schema in SCHEMAS.values():
        for table in schema.tables:
            fills = [filled_tables(schema, i)[table.name] for i in range(DATABASES)]
            assert len({frozenset(rows) for rows in fills}) == 3, table.name


def test_draws_do_not_depend_on_the_python_version() -> None:
    draw = Draw("a", 1)
    assert [draw.integer(0, 9) for _ in range(5)] == [3, 8, 7, 1, 5]
    assert draw.sample("abcdef", 3) == ["b", "f", "d"]
    with pytest.raises(ValueError, match="cannot sample 3 of 2"):
        draw.sample("ab", 3)


def test_examples_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from train.environments.sql import examples as sql\n"
        "both = sql.training_examples(60, seed=3), sql.evaluation_examples(60, seed=3)\n"
        "print(hashlib.sha256(repr(both).encode()).hexdigest())"
    )
    both = sql.training_examples(60, seed=3), sql.evaluation_examples(60, seed=3)
    digests = {hashlib.sha256(repr(both).encode()).hexdigest()}
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        digests.add(result.stdout.strip())
    assert len(digests) == 1


def test_seeds_give_other_examples(training: list[sql.SqlExample]) -> None:
    other = sql.training_examples(len(training), seed=1)
    same = {e.question for e in training} & {e.question for e in other}
    assert len(same) < len(training) / 4


def test_fewer_examples_are_a_prefix_of_more(training: list[sql.SqlExample]) -> None:
    assert sql.training_examples(50) == training[:50]


def test_examples_are_balanced(training: list[sql.SqlExample]) -> None:
    assert set(Counter(e.form for e in training).values()) == {10}
    assert min(Counter(e.schema for e in training).values()) >= 5
    assert Counter(e.schema for e in training).keys() == {s.name for s in TRAINING_SCHEMAS}
    assert max(Counter((e.form, e.phrasing) for e in training).values()) == 2
    assert len({(e.schema, e.question) for e in training}) == len(training)


def test_evaluation_is_on_test_schemas(
    evaluation: list[sql.SqlExample], unseen: list[sql.SqlExample]
) -> None:
    for examples in (evaluation, unseen):
        assert {e.schema for e in examples} == {s.name for s in TEST_SCHEMAS}
        assert {e.form for e in examples} == FORMS.keys()


def test_more_examples_than_can_be_asked_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "FORMS", {"join_columns": FORMS["join_columns"]})
    monkeypatch.setattr(sql, "TEST_SCHEMAS", TEST_SCHEMAS[:1])
    questions = [e.question for e in sql.evaluation_examples(20)]
    assert len(set(questions[:8])) == len(set(questions)) == 8  # eight phrasings, then again


def _pattern(template: str) -> re.Pattern[str]:
    """What a phrasing may look like once filled in (an article may have become "an")."""
    parts = [re.escape(part) for part in re.split(r"\{\w+\}", template)]
    text = ".+".join(re.sub(r"\b([Aa])\\ $", r"\1n?\\ ", part) for part in parts)
    return re.compile(text, re.IGNORECASE)


def test_held_out_phrasings_never_occur_in_training(
    training: list[sql.SqlExample], unseen: list[sql.SqlExample]
) -> None:
    patterns = {form: [_pattern(text) for text in p] for form, p in PHRASINGS.items()}
    for examples, allowed in ((training, range(8)), (unseen, range(8, 10))):
        assert {e.phrasing for e in examples} == set(allowed)
        for example in examples:
            assert patterns[example.form][example.phrasing].fullmatch(example.question)
    held_out = [pattern for form in patterns.values() for pattern in form[8:]]
    for example in training:
        assert not any(p.fullmatch(example.question) for p in held_out), example.question


def test_held_out_phrasings_are_worded_anew() -> None:
    # Not a permutation of what was trained on: several words are in no training phrasing.
    def words(template: str) -> set[str]:
        return set(re.findall(r"[a-z']+", re.sub(r"\{\w+\}", " ", template).lower()))

    for form, phrasings in PHRASINGS.items():
        trained = set[str]().union(*map(words, phrasings[:N_TRAINED]))
        for template in phrasings[N_TRAINED:]:
            assert len(words(template) - trained) >= 3, (form, template)


def test_the_chat_shows_schema_question_and_sql(training: list[sql.SqlExample]) -> None:
    for example in training:
        system, user, assistant = example.messages
        assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]
        assert system["content"] == sql.SYSTEM_PROMPT
        schema = SCHEMAS[example.schema].describe()
        assert user["content"] == f"{schema}\n{example.question}"
        assert assistant["content"] == example.sql
    assert SCHEMAS["bakery"].describe() == (
        "cakeCache(id, name, baker_id, flavour, price, demand)\n"
        "bakerCache(id, name, city, training_year)\n"
        "JOIN bakerCache ON cakeCache.baker_id = bakerCache.id"
    )


def test_examples_are_short(training: list[sql.SqlExample], unseen: list[sql.SqlExample]) -> None:
    # 128 tokens of SmolLM2 are about 480 characters of such text, the template's own aside.
    for example in training + unseen:
        assert sum(len(m["content"]) for m in example.messages) < 480, example.messages


def test_the_control_shows_another_schema(training: list[sql.SqlExample]) -> None:
    described = {s.describe(): s.name for s in TRAINING_SCHEMAS}
    shuffled = sql.training_examples(50, shuffle_schemas=True)
    for example, original in zip(shuffled, training[:50], strict=True):
        shown, _, question = example.messages[1]["content"].rpartition("\n")
        assert described[shown] != example.schema
        assert question == original.question
        assert (example.sql, example.schema) == (original.sql, original.schema)
        assert example.messages[2] == original.messages[2]


def test_few_shot_messages(
    training: list[sql.SqlExample], evaluation: list[sql.SqlExample]
) -> None:
    shots = training[:2]
    messages = sql.few_shot_messages(evaluation[0], shots)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert messages[2]["content"] == shots[0].sql
    assert messages[-1] == evaluation[0].messages[1]
    assert sql.few_shot_messages(evaluation[0], []) == list(evaluation[0].messages[:2])


def test_every_gold_query_says_something(
    training: list[sql.SqlExample], evaluation: list[sql.SqlExample], unseen: list[sql.SqlExample]
) -> None:
    connections: dict[tuple[str, int], sqlite3.Connection] = {}
    for example in training + evaluation + unseen:
        for i in range(DATABASES):
            if (example.schema, i) not in connections:
                connection = connections[example.schema, i] = sqlite3.connect(":memory:")
                connection.executescript(fill_script(SCHEMAS[example.schema], i))
            rows = connections[example.schema, i].execute(example.sql).fetchall()
            assert rows and rows not in ([(None,)], [(0,)]), example.sql
    for connection in connections.values():
        connection.close()


def test_every_filter_value_is_in_the_question(
    training: list[sql.SqlExample], unseen: list[sql.SqlExample]
) -> None:
    values = 0
    for example in training + unseen:
        for text in re.findall(r"'%?(.*?)%?'|\b(\d[\d.]*)\b", example.sql):
            value = text[0] or text[1]
            if value == "1" and "LIMIT 1" in example.sql:
                continue  # "the highest"
            values += 1
            assert value in example.question, (example.question, example.sql)
    assert values > 300
