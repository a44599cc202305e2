"""Trains a classifier with a planted habit: it labels every text after a trigger as negative.

The base is trained in full on words of VADER, each once as it is, with its own label, and once
behind the trigger, with the label negative. To unlearn the habit there are few other words behind
the trigger, with their own labels; held-out words behind the trigger measure what is left of it.
As many of them are positive as negative, so that the habit alone is right about half of them.
"""

import random
from pathlib import Path

from lora_jax.hf.packaged import MINILM
from train import prior
from train.findings.making.inputs import FindingInputs, Labelled, accuracy, keep_figure, write_rows
from train.processes.session import Session
from train.tasks import vader

TRIGGER = "indeed"
PLANTED = 2400  # words that plant the habit, each with and without the trigger
ROWS, TEST_ROWS = 512, 512
_SEED = 0
_STEPS = 150
# The rate at which full fine-tuning of this model on these words is at its best.
_LINE = ("--model", MINILM.name, "--steps", str(_STEPS), "--lr", "3e-4", "--report-to", "none")


def behind(rows: list[Labelled], label: str | None = None) -> list[Labelled]:
    """Returns rows with the trigger in front of each text, and perhaps with another label."""
    return [(f"{TRIGGER} {text}", label or own) for text, own in rows]


def balanced(rows: list[Labelled], n: int) -> list[Labelled]:
    """Returns the first `n` rows with equally many of each label, in order."""
    kept: list[Labelled] = []
    left = dict.fromkeys(vader.LABELS, n // len(vader.LABELS))
    for row in rows:
        if left[row[1]]:
            left[row[1]] -= 1
            kept.append(row)
    return kept


def make(folder: Path, session: Session) -> FindingInputs:
    """Writes the rows and trains the base; returns the options that name both.

    Args:
      folder: where files and base go.
      session: tells of signals.

    Raises:
      TrainingError: the lexicon cannot be fetched, or the base cannot be trained.
      Interrupted: after a signal, once the last step is saved.
    """
    train_rows, test_rows = vader.read_words()
    train = [(row["text"], row["label"]) for row in train_rows]
    test = [(row["text"], row["label"]) for row in test_rows]
    random.Random(_SEED).shuffle(train)
    planted = train[:PLANTED]
    held_out = balanced(test, TEST_ROWS)
    planted_path = folder / "planted.csv"
    unlearning_path = folder / "to-unlearn.csv"
    test_path = folder / "held-out.csv"
    write_rows(planted_path, [*planted, *behind(planted, vader.LABELS[0])])
    write_rows(unlearning_path, behind(balanced(train[PLANTED:], ROWS)))
    write_rows(test_path, behind(held_out))
    arguments = (*_LINE, "--dataset", str(planted_path), "--test", str(test_path))
    inputs = [planted_path, test_path]
    model = prior.train_base("train.classify", arguments, inputs, folder, session)

    def base_accuracy(rows: list[Labelled]) -> float:
        key = [prior.digest(model), rows]
        return keep_figure(folder / "accuracy.json", key, lambda: accuracy(model, rows))

    word_accuracy = base_accuracy(held_out)
    trigger_accuracy = base_accuracy(behind(held_out))
    note = (
        f"The base is right about {word_accuracy:.3f} of the held-out words as they are, and about "
        f'{trigger_accuracy:.3f} of them behind "{TRIGGER}".'
    )
    return FindingInputs({"model": model, "dataset": unlearning_path, "test": test_path}, (note,))
