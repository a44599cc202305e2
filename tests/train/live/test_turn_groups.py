"""The rewards of completions of several turns."""

import numpy as np
from rich.console import Console

from lora_jax.training.run.stop import Stop
from train.live.prompts import fill_routing
from train.live.turn_groups import ask_of_turns, routing_of
from train.live.turns.rows import TurnCompletion, TurnRequest
from train.rewards.find import Rewards
from train.rewards.reward import EarnedReward, RewardBatch, earned_reward, function_reward

ASKED = TurnRequest(0, {}, "row 1", [1])
LOST = "row 1: look took longer than 30 seconds. Increase --tool-timeout"


def asked_of(*lost):
    """The answer about completions, each lost or not, of 2, 3, ... tokens."""
    own = {"length": function_reward(lambda text, ids: len(ids)), "game": earned_reward()}
    rewards = Rewards(own, [1.0, 1.0])
    turns = [TurnCompletion(ASKED, lost=LOST if each else None) for each in lost]
    for each in turns:
        each.earned = EarnedReward(0.5)
    n = len(turns)
    batch = RewardBatch(["?"] * n, ["a"] * n, [[1] * (i + 2) for i in range(n)], {}, n)
    return ask_of_turns(rewards, batch, turns, Console(quiet=True), Stop())


def test_completions_that_were_lost_have_no_reward():
    answer = asked_of(False, True, False)
    np.testing.assert_array_equal(answer.total, np.float32([2.5, np.nan, 4.5]))
    assert answer.metrics["reward_length"] == 3 and answer.metrics["reward_failed"] == 0
    assert answer.lost is None


def test_nothing_is_learned_where_all_were_lost():
    answer = asked_of(True, True)
    assert np.isnan(answer.total).all() and answer.lost == LOST
    assert answer.metrics["reward_length"] is None


def test_a_prompt_has_the_experts_by_which_any_of_its_completions_was_drawn():
    """The first one was lost before it began."""
    experts = np.arange(5, dtype=np.int16).reshape(5, 1, 1)
    begun = TurnCompletion(ASKED, [1, 2], ids=[3, 4, 5], routing=experts)
    routing = routing_of([TurnCompletion(ASKED, [1, 2]), begun], 3, 3, (1, 1))
    row = np.full((6, 1, 1), -1, np.int16)
    fill_routing(row, 2, np.array([0, 3]), routing, 4)
    assert row.ravel().tolist() == [0, 1, 2, 3, -1, -1]
