"""The examples of the SQL task: questions, gold queries, and the score of an answer.

An example is a chat: the system prompt, a user turn with the tables of a database, their join and
a question, and the SQL that answers it. Everything is generated from a seed; nothing is downloaded.
Evaluation always uses schemas that share no table with the training schemas and, on request,
phrasings that never occur in training. An answer is right if it returns the gold query's result on
three databases:

    examples = training_examples(280)
    held_out = evaluation_examples(200, unseen_phrasings=True)
    accuracy = sum(score(e, generate(e.messages[:-1])) for e in held_out) / len(held_out)

The gold queries can be trusted: each returns a result on all three databases, leaves no ties to
chance, and differs in its result from every query one mistake away (`can_be_trusted`).
"""

import sqlite3
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice

from train.environments.sql.databases import filled_tables, open_databases, same_rows
from train.environments.sql.forms import (
    FORMS,
    N_TRAINED,
    PHRASINGS,
    DoesNotFit,
    Scene,
    ask,
    table_words,
)
from train.environments.sql.guard import run
from train.environments.sql.judge import MATCHED, judge
from train.environments.sql.query import Query, mutations, order_keys, write
from train.environments.sql.schemas import TEST_SCHEMAS, TRAINING_SCHEMAS, Draw, Schema

SYSTEM_PROMPT = "Answer in SQL."

Message = dict[str, str]
_TRIES = 8


@dataclass(frozen=True, kw_only=True)
class SqlExample:
    """A question about a schema, and the SQL that answers it.

    Attributes:
      messages: the turns of a chat: system, user, assistant.
      schema: the name of the schema.
      question: the question, without the schema.
      sql: the gold query.
      form: the name of the query form.
      phrasing: the index of the form's phrasing; the held-out phrasings come last.
      mistakes: queries that are one mistake away, with other results.
    """

    messages: tuple[Message, ...]
    schema: str
    question: str
    sql: str
    form: str
    phrasing: int
    mistakes: tuple[str, ...] = ()


def training_examples(n: int, *, seed: int = 0, shuffle_schemas: bool = False) -> list[SqlExample]:
    """Returns `n` examples on the training schemas, balanced over forms, schemas and phrasings.

    Args:
      n: the number of examples; fewer examples of the same seed are a prefix of more.
      seed: the seed of the draws.
      shuffle_schemas: a control: each prompt shows another training schema than that of its
        question and SQL.
    """
    with closing(_stream("training", TRAINING_SCHEMAS, seed, held_out=False)) as stream:
        examples = list(islice(stream, n))
    if not shuffle_schemas:
        return examples
    draw = Draw("control", seed)
    shown = []
    for example in examples:
        others = [schema for schema in TRAINING_SCHEMAS if schema.name != example.schema]
        shown.append(_example(draw.pick(others), example))
    return shown


def evaluation_examples(
    n: int, *, seed: int = 0, unseen_phrasings: bool = False
) -> list[SqlExample]:
    """Returns `n` examples on the test schemas, balanced like the training examples.

    Args:
      n: the number of examples.
      seed: the seed of the draws.
      unseen_phrasings: use the held-out phrasings, which never occur in training.
    """
    with closing(_stream("test", TEST_SCHEMAS, seed, held_out=unseen_phrasings)) as stream:
        return list(islice(stream, n))


def few_shot_messages(example: SqlExample, shots: Sequence[SqlExample]) -> list[Message]:
    """Returns the chat that asks the question of `example` after solved examples.

    The turns are the system prompt, a user and an assistant turn for each of `shots`, and the
    question.
    """
    system, question = example.messages[:2]
    turns = [message for shot in shots for message in shot.messages[1:]]
    return [system, *turns, question]


def score(example: SqlExample, text: str) -> bool:
    """Returns True if the SQL in a generated text is right; see `judge`."""
    return judge(example.schema, example.sql, text) == MATCHED


def _example(shown: Schema, of: SqlExample) -> SqlExample:
    """Returns the example with the schema `shown` in its prompt."""
    messages = (
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{shown.describe()}\n{of.question}"},
        {"role": "assistant", "content": of.sql},
    )
    return replace(of, messages=messages)


def _stream(
    split: str, schemas: Sequence[Schema], seed: int, *, held_out: bool
) -> Generator[SqlExample, None, None]:
    """Yields examples without end; uses all forms, and all schemas, before repeating one."""
    draw = Draw("examples", split, seed, held_out)
    seen: set[tuple[str, str]] = set()
    waiting: list[Schema] = []
    phrasings: dict[str, list[int]] = {form: [] for form in FORMS}
    with ExitStack() as stack:
        opened = {s: stack.enter_context(open_databases(s)) for s in schemas}
        while True:
            made = len(seen)
            for form in draw.shuffled(list(FORMS)):
                if not phrasings[form]:
                    numbers = range(len(PHRASINGS[form]))
                    phrasings[form] = draw.shuffled(
                        numbers[N_TRAINED:] if held_out else numbers[:N_TRAINED]
                    )
                if len(waiting) < len(schemas):
                    waiting += draw.shuffled(schemas)
                phrasing = phrasings[form].pop()
                for schema in waiting:
                    example = _draw_example(form, phrasing, schema, opened[schema], seen, draw)
                    if example:
                        waiting.remove(schema)
                        seen.add((schema.name, example.question))
                        yield example
                        break
            if len(seen) == made:  # every question was asked: start again
                seen.clear()


def _draw_example(
    form: str,
    phrasing: int,
    schema: Schema,
    databases: Sequence[sqlite3.Connection],
    seen: set[tuple[str, str]],
    draw: Draw,
) -> SqlExample | None:
    """Draws a new example with a query that can be trusted; None if a few tries find none."""
    scene = Scene(schema=schema, rows=filled_tables(schema, 0), draw=draw)
    for _ in range(_TRIES):
        try:
            query, words = FORMS[form](scene)
        except DoesNotFit:
            return None  # try another schema, rather than another column
        question = ask(form, phrasing, table_words(schema.table(query.table)) | words)
        if (schema.name, question) in seen or not can_be_trusted(query, schema, databases):
            continue
        asked = SqlExample(
            messages=(),
            schema=schema.name,
            question=question,
            sql=write(query),
            form=form,
            phrasing=phrasing,
            mistakes=tuple(write(mistake) for _, mistake in mutations(query, schema)),
        )
        return _example(schema, asked)
    return None


def can_be_trusted(query: Query, schema: Schema, databases: Sequence[sqlite3.Connection]) -> bool:
    """Returns True if a query has results without ties, and its mutations have others.

    It must have a non-trivial result on every database, no two rows may tie in its order or for its
    extreme, and each query one mistake away must differ in its result on at least one database.
    """
    results = [run(database, write(query)) for database in databases]
    ran = [rows for rows in results if isinstance(rows, list)]
    golds = [rows for rows in ran if len(rows) > 1 or any(map(any, rows))]  # not trivial
    if len(golds) < len(databases):
        return False
    keys = order_keys(query)
    for database in databases:
        held = run(database, write(keys)) if keys else []
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
    """Returns True if the result of `sql` differs from the gold rows; SQL that fails differs."""
    rows = run(database, sql)
    return isinstance(rows, str) or not same_rows(gold, rows, ordered=ordered)
