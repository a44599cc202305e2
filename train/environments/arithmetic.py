"""Sums of two numbers: rows for training and for evaluation, and the reward of an answer."""

import random

NUMBERS = range(10, 50)  # what is added: numbers and sums have two digits
HELD_OUT = 300  # of the 1,600 sums
_SEED = 0

Row = dict[str, str]


def rows(seed: int, n: int, *, held_out: bool = False) -> list[Row]:
    """Returns sums in random order. No sum repeats before each has occurred once.

    Args:
      seed: the seed of the order; which sums are held out does not depend on it.
      n: the number of rows.
      held_out: the sums that are not to be trained on.

    Returns:
      Rows such as ``{"prompt": "37+25=", "answer": "62"}``.
    """
    sums = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(_SEED).shuffle(sums)
    sums_of_split = sums[:HELD_OUT] if held_out else sums[HELD_OUT:]
    draw = random.Random(seed)
    drawn: list[tuple[int, int]] = []
    while len(drawn) < n:
        drawn += draw.sample(sums_of_split, len(sums_of_split))
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in drawn[:n]]


def reward(completion: str, ids: object, answer: str) -> float:
    """Returns 1 if a completion is the right answer, ignoring white space around it, else 0."""
    return float(completion.strip() == answer)
