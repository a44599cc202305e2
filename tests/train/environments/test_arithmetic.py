"""Sums: each once, the held-out ones apart, and the reward of an answer."""

from contextlib import closing

import numpy as np
import pytest

from train.environments.arithmetic import HELD_OUT, rows
from train.rewards.find import find_rewards
from train.rewards.reward import RewardBatch


def test_all_sums_are_trained_on_or_held_out_and_answers_are_right():
    train, held_out = rows(3, 1600 - HELD_OUT), rows(3, HELD_OUT, held_out=True)
    prompts = [{row["prompt"] for row in some} for some in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {f"{a}+{b}=" for a in range(10, 50) for b in range(10, 50)}
    for row in train + held_out:
        assert eval(row["prompt"].removesuffix("=")) == int(row["answer"])


def test_seeds_order_the_rows_and_all_come_before_one_comes_again():
    drawn = [rows(seed, 3000) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3000
    counts = np.unique([row["prompt"] for row in drawn[0]], return_counts=True)[1]
    assert len(counts) == 1600 - HELD_OUT and set(counts) == {2, 3}
    assert drawn[0][:100] == rows(0, 100)
    held_out = [rows(seed, HELD_OUT, held_out=True) for seed in (0, 1)]
    assert {row["prompt"] for row in held_out[0]} == {row["prompt"] for row in held_out[1]}


@pytest.mark.parametrize(
    ("text", "reward"),
    [("62", 1), (" 62\n", 1), ("62.", 0), ("162", 0), ("6", 0), ("", 0), ("062", 0), ("62=", 0)],
)
def test_the_reward_is_of_the_answer_alone(text, reward):
    with closing(find_rewards(["arithmetic"], columns=["answer"], max_tokens=4)) as found:
        columns = {"answer": ["62"] * 2}
        scored = found(RewardBatch(["37+25="] * 2, [text, "x"], [[1], [2]], columns, 2))
    np.testing.assert_array_equal(scored.total, [reward, 0])
