"""Counts how often `train.compare` names a winner, where the true difference is known.

    python -m tests.benchmarks.verdicts
    python -m tests.benchmarks.verdicts --comparisons 200

Each comparison has two arms of three seeds, which answer the same questions. It is drawn at random,
and goes through `recommend`, as a measured one does. A winner is named where the headline says
"better". The standard error is that of the difference of means, over seeds and questions together:
the standard deviation of that difference over many draws without a true one.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tests.train.compare.made_up import FACTS, full, lora
from train.compare.reporting.recommend import recommend
from train.compare.result import Comparison, RunResult
from train.console import markdown

SEEDS = 3
_DRAWS = 4_000  # from which the standard error is estimated
DIFFERENCES = (0, 3, 5)  # true ones, in standard errors


class Design(NamedTuple):
    """The sizes of what varies.

    Attributes:
      name: for people.
      questions: number of questions.
      seeds: deviation of the seeds of an arm, in units of the score.
      questions_of_arm: deviation of a question's difficulty for one arm alone.
      is_graded: whether a question has a score of any size; else it is right (1) or wrong (0).
    """

    name: str
    questions: int
    seeds: float
    questions_of_arm: float
    is_graded: bool


DESIGNS = (
    Design("seeds vary most, graded", 256, 0.05, 0.1, True),
    Design("seeds and questions, graded", 64, 0.03, 0.25, True),
    Design("64 questions vary most, graded", 64, 0.002, 0.3, True),
    Design("seeds vary most, right or wrong", 256, 0.08, 0.1, False),
    Design("64 questions vary most, right or wrong", 64, 0.002, 1.5, False),
)


def answers(design: Design, difference: float, rng: np.random.Generator) -> np.ndarray:
    """Draws the scores of two arms, of which the first is better: [2, seeds, questions]."""
    shared = rng.normal(0, 0.5, design.questions)
    of_arm = rng.normal(0, design.questions_of_arm, (2, 1, design.questions))
    of_seed = rng.normal(0, design.seeds, (2, SEEDS, 1))
    noise = rng.normal(0, 0.05, (2, SEEDS, design.questions))
    means = shared + of_arm + of_seed + noise
    if design.is_graded:
        means[0] += difference
        return means
    right = (means > -0.2).astype(float)  # the easier ones
    # A share of the first arm's wrong answers become right, so that its mean rises as asked.
    rises = rng.random((1, design.questions)) < difference / (right[0] == 0).mean()
    right[0] = np.where(rises, 1.0, right[0])
    return right


def standard_error(design: Design) -> float:
    """Returns the standard deviation of the difference of means, where there is no true one."""
    rng = np.random.default_rng(1)
    draws = [answers(design, 0.0, rng).mean(axis=(1, 2)) for _ in range(_DRAWS)]
    return float(np.std([first - second for first, second in draws], ddof=1))


def comparison_of(scores: np.ndarray, *, keeps_questions: bool = True) -> Comparison:
    """Returns the comparison in which LoRA has the first scores, full fine-tuning the second."""
    runs = [
        RunResult(
            name=f"{arm.method}-{seed}",
            arm=arm,
            seed=seed,
            status="done",
            steps=1,
            score=float(row.mean()),
            question_scores=tuple(row.tolist()) if keeps_questions else (),
        )
        for arm, of_arm in zip((lora(), full()), scores, strict=True)
        for seed, row in enumerate(of_arm)
    ]
    return Comparison(facts=dataclasses.replace(FACTS, by_score=True), runs=tuple(runs))


def winner_of(comparison: Comparison) -> str | None:
    """Returns the method that the headline calls better; None for none."""
    headline = recommend(comparison).headline
    if "better" not in headline:
        return None
    return "lora" if "LoRA is better" in headline else "full"


def share_of_winners(
    design: Design, errors: float, n: int, *, keeps_questions: bool = True
) -> float:
    """Returns the share of comparisons that name a winner: of a true difference, the right one.

    Args:
      design: what varies, and by how much.
      errors: the true difference, in standard errors.
      n: number of comparisons.
      keeps_questions: whether the results of single questions are known.
    """
    difference = errors * standard_error(design) if errors else 0.0
    rng = np.random.default_rng(2)
    drawn = (answers(design, difference, rng) for _ in range(n))
    winners = [winner_of(comparison_of(x, keeps_questions=keeps_questions)) for x in drawn]
    return sum(winner == "lora" if errors else winner is not None for winner in winners) / n


def table(n: int) -> Iterator[list[str]]:
    """Yields the rows: a design, and the share of winners by true difference."""
    for design in DESIGNS:
        shares = [share_of_winners(design, errors, n) for errors in DIFFERENCES]
        alone = share_of_winners(design, 0, n, keeps_questions=False)
        yield [design.name, *(f"{share:.1%}" for share in (*shares, alone))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=1_000)
    n = parser.parse_args().comparisons
    differences = [f"{k} standard errors" if k else "no difference" for k in DIFFERENCES]
    head = ["what varies", *differences, "no difference, by the seeds alone"]
    print(f"A winner is named in so many of {n:,} comparisons, by the true difference:\n")
    print(markdown.table(head, table(n)))


if __name__ == "__main__":
    main()
