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
    table_words,
    write_question,
)
from train.environments.sql.guard import run
from train.environments.sql.judge import MATCHED, judge
from train.environments.sql.query import Query, mutations, order_keys, write_sql
from train.environments.sql.schemas import TEST_SCHEMAS, TRAINING_SCHEMAS, Draw, Schema

SYSTEM_PROMPT = "Answer in SQL."

Message = dict[str, str]
_MAX_TRIES = 8


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
    with closing(_generate_examples("training", TRAINING_SCHEMAS, seed, held_out=False)) as stream:
        examples = list(islice(stream, n))
    if not shuffle_schemas:
        return examples
    draw = Draw("control", seed)
    control_examples = []
    for example in examples:
        others = [schema for schema in TRAINING_SCHEMAS if schema.name != example.schema]
        control_examples.append(_with_messages(example, draw.pick(others)))
    return control_examples


def evaluation_examples(
    n: int, *, seed: int = 0, unseen_phrasings: bool = False
) -> list[SqlExample]:
    """Returns `n` examples on the test schemas, balanced like the training examples.

    Args:
      n: the number of examples.
      seed: the seed of the draws.
      unseen_phrasings: use the held-out phrasings, which never occur in training.
    """
    with closing(
        _generate_examples("test", TEST_SCHEMAS, seed, held_out=unseen_phrasings)
    ) as stream:
        return list(islice(stream, n))


def few_shot_messages(example: SqlExample, shots: Sequence[SqlExample]) -> list[Message]:
    """Returns a chat that asks the question of `example` after some solved examples.

    The turns are the system prompt, a user and an assistant turn for each of `shots`, and the
    question.
    """
    system, question = example.messages[:2]
    turns = [message for shot in shots for message in shot.messages[1:]]
    return [system, *turns, question]


def score(example: SqlExample, text: str) -> bool:
    """Returns True if the SQL in a generated text is right; see `judge`."""
    return judge(example.schema, example.sql, text) == MATCHED


def _with_messages(example: SqlExample, shown_schema: Schema) -> SqlExample:
    """Returns the example with its chat, whose prompt shows a schema."""
    messages = (
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{shown_schema.describe()}\n{example.question}"},
        {"role": "assistant", "content": example.sql},
    )
    return replace(example, messages=messages)


def _generate_examples(
    split: str, schemas: Sequence[Schema], seed: int, *, held_out: bool
) -> Generator[SqlExample, None, None]:
    """Yields examples endlessly; uses all forms and all schemas before repeating one."""
    draw = Draw("examples", split, seed, held_out)
    questions: set[tuple[str, str]] = set()  # that were asked, with their schemas
    schema_queue: list[Schema] = []
    phrasing_queues: dict[str, list[int]] = {form: [] for form in FORMS}
    with ExitStack() as stack:
        databases = {schema: stack.enter_context(open_databases(schema)) for schema in schemas}
        while True:
            n_asked = len(questions)
            for form in draw.shuffled(list(FORMS)):
                phrasings = phrasing_queues[form]
                if not phrasings:
                    phrasings += draw.shuffled(_phrasings(form, held_out=held_out))
                if len(schema_queue) < len(schemas):
                    schema_queue += draw.shuffled(schemas)
                phrasing = phrasings.pop()
                for schema in schema_queue:
                    example = _draw_example(
                        form, phrasing, schema, databases[schema], questions, draw
                    )
                    if example:
                        schema_queue.remove(schema)
                        questions.add((schema.name, example.question))
                        yield example
                        break
            if len(questions) == n_asked:  # every question was asked: start again
                questions.clear()


def _phrasings(form: str, *, held_out: bool) -> range:
    """Returns the indices of a form's phrasings for training, or of those held out of it."""
    indices = range(len(PHRASINGS[form]))
    return indices[N_TRAINED:] if held_out else indices[:N_TRAINED]


def _draw_example(
    form: str,
    phrasing: int,
    schema: Schema,
    databases: Sequence[sqlite3.Connection],
    questions: set[tuple[str, str]],
    draw: Draw,
) -> SqlExample | None:
    """Draws a new example with a reliable query; None if several attempts fail.

    Args:
      form: the name of the query form.
      phrasing: the index of its phrasing.
      schema: the schema.
      databases: the schema's.
      questions: questions that were asked already, with the names of their schemas.
      draw: the random stream.
    """
    scene = Scene(schema=schema, rows=filled_tables(schema, 0), draw=draw)
    for _ in range(_MAX_TRIES):
        try:
            query, words = FORMS[form](scene)
        except DoesNotFit:
            return None  # try another schema, rather than another column
        question = write_question(form, phrasing, table_words(schema.table(query.table)) | words)
        was_asked = (schema.name, question) in questions
        if was_asked or not can_be_trusted(query, schema, databases):
            continue
        example = SqlExample(
            messages=(),
            schema=schema.name,
            question=question,
            sql=write_sql(query),
            form=form,
            phrasing=phrasing,
            mistakes=tuple(write_sql(mistake) for _, mistake in mutations(query, schema)),
        )
        return _with_messages(example, schema)
    return None


def can_be_trusted(query: Query, schema: Schema, databases: Sequence[sqlite3.Connection]) -> bool:
    """Returns True if a query has results without ties that differ from those of its mutations.

    It must have a non-trivial result on every database, no two rows may tie in its order or for its
    extreme, and each query one mistake away must differ in its result on at least one database.
    """
    results = []
    for database in databases:
        rows = run(database, write_sql(query))
        if isinstance(rows, str) or _is_trivial(rows):
            return False
        results.append(rows)
    # No two rows may tie in the order.
    keys = order_keys(query)
    if keys is not None:
        for database in databases:
            key_rows = run(database, write_sql(keys))
            has_ties = len(set(key_rows)) < len(key_rows)
            if has_ties:
                return False
    if _asks_for_extreme(query) and any(len(rows) > 1 for rows in results):
        return False  # several rows equal the MIN or MAX
    # Each query one mistake away must have another result on some database.
    is_ordered = query.order is not None
    for _, mutation in mutations(query, schema):
        sql = write_sql(mutation)
        is_detected = any(
            differs(rows, database, sql, ordered=is_ordered)
            for database, rows in zip(databases, results, strict=True)
        )
        if not is_detected:
            return False
    return True


def _is_trivial(rows: Sequence[tuple[object, ...]]) -> bool:
    """Returns True for an empty result, and for one row that contains only 0 and None."""
    return len(rows) < 2 and not any(any(row) for row in rows)


def _asks_for_extreme(query: Query) -> bool:
    """Returns True if a condition compares with a MIN or MAX of a column."""
    return any(
        condition.operator == "=" and isinstance(condition.value, Query)
        for condition in query.where
    )


def differs(
    gold: Sequence[tuple[object, ...]], database: sqlite3.Connection, sql: str, *, ordered: bool
) -> bool:
    """Returns True if the result of `sql` differs from the gold rows; SQL that fails differs."""
    rows = run(database, sql)
    return isinstance(rows, str) or not same_rows(gold, rows, ordered=ordered)
