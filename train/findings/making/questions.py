"""Writes questions and their SQL as chats, so that a comparison only measures the loss.

The task of `train.sft` itself answers its held-out questions before and after training, which takes
two cores longer than a short training does.
"""

import json
from pathlib import Path
from typing import Any

from train.environments.sql.examples import training_examples
from train.findings.making.inputs import FindingInputs
from train.processes.session import Session
from train.reporters.files import write_lines

Row = dict[str, Any]
ROWS, TEST_ROWS = 360, 96
_SEED = 0


def questions(test_rows: int = TEST_ROWS) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, held-out rows), each row a chat.

    They are of the same databases; no held-out question stands among those to train on.

    Args:
      test_rows: how many to hold out, at most `TEST_ROWS`; fewer are the first of them.
    """
    rows: list[Row] = []
    for example in training_examples(ROWS + 2 * TEST_ROWS, seed=_SEED):
        rows.append({"messages": [dict(turn) for turn in example.messages]})
    train = rows[:ROWS]
    train_texts = {json.dumps(row) for row in train}
    held_out = [row for row in rows[ROWS:] if json.dumps(row) not in train_texts]
    return train, held_out[:test_rows]


def make(folder: Path, session: Session, test_rows: int = TEST_ROWS) -> FindingInputs:
    """Writes the questions; returns the options that name their files.

    Args:
      folder: where they go.
      session: not needed, as nothing is trained.
      test_rows: how many to hold out; see `questions`.
    """
    del session
    train, held_out = questions(test_rows)
    train_path = folder / "questions.jsonl"
    held_out_path = folder / "held-out.jsonl"
    write_lines(train_path, train)
    write_lines(held_out_path, held_out)
    return FindingInputs({"dataset": train_path, "eval_dataset": held_out_path})
