"""Findings by rewards: what is decided, and where a method stands at the same score."""

import dataclasses

import pytest

from tests.train.compare.made_up import FACTS, full, lora, run
from train.compare.result import Comparison, Point
from train.findings.reporting import decision, same_score

REWARDS = dataclasses.replace(
    FACTS, script="train.grpo", score="reward", by_score=True, baselines={"base": 0.5}
)


def made_up(scores):
    """A comparison of arms whose seeds have these scores."""
    runs = [run(arm, seed, 0.0, x) for arm, of in scores.items() for seed, x in enumerate(of)]
    return Comparison(facts=REWARDS, runs=tuple(runs))


def test_where_nothing_falls_behind_nothing_is_decided():
    alike = {lora(1): (0.90, 0.92, 0.91), lora(16): (0.91, 0.90, 0.92), full(): (0.92, 0.91, 0.9)}
    *_, last = decision.sentences(made_up(alike))
    assert last.startswith("This decides nothing: no setting at its best rate falls behind")
    behind = alike | {lora(1): (0.60, 0.62, 0.61)}
    first, *others = decision.sentences(made_up(behind))
    assert "behind it, beyond the spread over seeds, are LoRA r=1, lr 0.001 by 0.3" in first
    assert "within the spread of it are full fine-tuning" in first
    assert not any("decides nothing" in line for line in others)


def test_each_setting_counts_at_its_best_rate_and_each_batch_size_alone():
    large = lora(16)._replace(batch_size=256)
    scores = {lora(16): (0.9, 0.91), lora(16, 1e-1): (0.1, 0.1), full(): (0.9, 0.91)}
    scores |= {large: (0.2, 0.21), full()._replace(batch_size=256): (0.8, 0.81)}
    lines = decision.sentences(made_up(scores))
    assert lines[0].startswith("Batch 8: ") and "behind" not in lines[0]
    assert lines[1].startswith("Batch 256: full fine-tuning batch 256, lr 0.0001 is the best")
    assert "LoRA r=16 batch 256, lr 0.001 by 0.60" in lines[1]
    assert any("learning rate is 10 times that of full fine-tuning" in line for line in lines)


def curve(arm, seed, scores, divergences):
    """A run with a score and a divergence after each ten steps."""
    steps = range(10, 10 * len(scores) + 1, 10)
    points = [tuple(map(Point, steps, values)) for values in (scores, divergences)]
    return run(arm, seed, 0.0, scores[-1], scores=points[0], divergences=points[1])


def test_the_divergence_is_taken_where_all_methods_have_the_same_score():
    sft = lora(16, method="sft")
    runs = (
        curve(lora(16), 0, (0.6, 0.8, 0.9), (0.01, 0.02, 0.06)),
        curve(lora(16), 1, (0.7, 0.84, 0.9), (0.02, 0.04, 0.08)),
        curve(sft, 0, (0.9, 1.0), (0.5, 0.7)),
        curve(sft, 1, (0.7, 0.8), (0.2, 0.3)),
    )
    level, (ours, theirs) = same_score.distances(Comparison(facts=REWARDS, runs=runs))
    assert level == pytest.approx(0.5 + 0.9 * 0.4)
    assert ours.divergence.low == pytest.approx(0.02 + 0.6 * 0.04)  # 0.86 is 0.6 of 0.8 to 0.9
    assert ours.divergence.high == pytest.approx(0.04 + 0.02 / 0.06 * 0.04)
    assert (theirs.reached, theirs.runs) == (1, 2)
    assert theirs.divergence.mean == pytest.approx(0.9 * 0.5)  # of 0.5 to 0.9, from the start
    text = same_score.sentence(Comparison(facts=REWARDS, runs=runs))
    assert "reaches 0.860" in text and "1 of 2 runs" in text


def test_without_a_divergence_or_a_rise_there_is_no_common_score():
    assert same_score.sentence(made_up({lora(): (0.9, 0.9)})) is None
    flat = (curve(lora(), 0, (0.5, 0.5), (0.1, 0.2)),)
    assert same_score.sentence(Comparison(facts=REWARDS, runs=flat)) is None
