"""The settings of a comparison, and the rule that stops hopeless ones."""

import math
from types import SimpleNamespace

import pytest

from tests.train.compare.made_up import full, lora
from train.classify import parse
from train.compare.arms import ScriptDefaults, make_arms, name_of_run, options_of_arm
from train.compare.options import CompareConfig
from train.compare.rungs import LAST, STAGES, decide_after_stage, end_step_of_stage, stops_arms
from train.compare.scripts import SCRIPTS
from train.compare.trials import group_trials, script_defaults
from train.options.scripts import classify

RATES = {"lora": 3e-4, "full": 3e-5, "head-only": 1e-2, "said": 0.06, "did": 0.06}
RATES |= {"lora-xs": 6e-4, "vera": 3e-3}
BASIS = ScriptDefaults(alpha=2.0, rates=RATES, batch_size=8, quick_full=(1.0, 3.0, 9.0))


def test_arms_are_all_combinations_of_what_was_given():
    asked = CompareConfig(
        ranks=(2, 8), target_sets=("attention", "q_proj,v_proj"), lrs=(1e-3,), batch_sizes=(4, 16)
    )
    arms = make_arms(asked, BASIS)
    adapters = [arm for arm in arms if arm.method == "lora"]
    assert len(adapters) == 2 * 2 * 2
    assert {arm.targets for arm in adapters} == {("attention",), ("q_proj", "v_proj")}
    assert {(arm.rank, arm.alpha) for arm in adapters} == {(2, 4.0), (8, 16.0)}
    whole = [arm for arm in arms if arm.method == "full"]
    assert [arm.learning_rate for arm in whole[:4]] == [1e-5, 3e-5, 9e-5, 2.7e-4]
    assert {arm.rank for arm in whole} == {None}
    few = make_arms(CompareConfig(quick=True), BASIS)
    assert {arm.rank for arm in few} == {8, None} and len(few) == 3 + 3


def test_runs_of_one_rank_targets_and_batch_size_train_together():
    asked = CompareConfig(
        ranks=(2, 8), target_sets=("attention", "mlp"), lrs=(1e-3, 3e-3), batch_sizes=(4, 16)
    )
    trials = [SimpleNamespace(arm=arm) for arm in make_arms(asked, BASIS)]
    groups = group_trials(trials, at_once=2)
    assert sum(len(group) == 2 for group in groups) == 2 * 2 * 2
    for group in groups:
        assert len({trial.arm.rate_group() for trial in group}) == 1
        assert len(group) == (1 if group[0].arm.method == "full" else 2)
    every = [trial for group in group_trials(trials, at_once=3) for trial in group]
    assert len(every) == len(trials) and all(trial in every for trial in trials)


def test_settings_and_names_tell_runs_apart():
    asked = CompareConfig(
        methods=("lora", "dora", "full", "head-only"),
        target_sets=("attention", ".*(q|v)_proj/kernel"),
    )
    arms = make_arms(asked, BASIS)
    names = [name_of_run(arm, seed) for arm in arms for seed in (0, 1)]
    assert len({*names}) == len(names) == 2 * len(arms)
    assert all("/" not in name and "*" not in name for name in names)
    assert options_of_arm(arms[0], 5)["seed"] == 5
    by_method = {arm.method: options_of_arm(arm, 0) for arm in arms}
    assert by_method["dora"]["dora"] and by_method["full"]["full"]
    assert "rank" not in by_method["full"] and "targets" not in by_method["head-only"]


def test_subspaces_have_a_dimension_and_a_rate_for_it():
    asked = CompareConfig(
        methods=("said", "did"), dimensions=(625, 160_000), subspace_lrs=(0.01, 0.02)
    )
    arms = make_arms(asked, BASIS)
    assert [(arm.dimension, arm.learning_rate) for arm in arms[:4]] == [
        *((625, 0.08), (625, 0.16), (160_000, 0.00125), (160_000, 0.0025))
    ]
    assert {arm.rank for arm in arms} == {None}
    given = options_of_arm(arms[-1], 3)
    assert (given["intrinsic"], given["intrinsic_kind"], given["seed"]) == (160_000, "did", 3)
    assert name_of_run(arms[0], 3) == "said-d625-lr0.08-b8-s3"
    plain = make_arms(CompareConfig(methods=("did",)), BASIS)
    assert {arm.learning_rate for arm in plain if arm.dimension == 10_000} == {0.02, 0.06, 0.18}


def test_a_comparison_takes_the_rates_of_the_script():
    """A subspace's is that of 10,000 dimensions, from which those of the others follow."""
    basis = script_defaults(SCRIPTS["classify"], classify.Config())
    assert basis.rates["said"] == basis.rates["did"] == parse(["--intrinsic", "10000"]).optim.lr
    assert basis.rates["lora"] == parse([]).optim.lr
    assert basis.rates["full"] == parse(["--full"]).optim.lr


def test_tiny_adapters_have_rates_ranks_and_scales_of_their_own():
    arms = make_arms(CompareConfig(methods=("lora", "lora-xs", "vera"), lrs=(1e-3,)), BASIS)
    found = {(arm.method, arm.rank, arm.alpha, arm.learning_rate) for arm in arms}
    assert found == {
        *(("lora", 4, 8.0, 1e-3), ("lora", 16, 32.0, 1e-3), ("lora", 64, 128.0, 1e-3)),
        *(("lora-xs", 4, 4.0, 2e-3), ("lora-xs", 16, 16.0, 2e-3), ("lora-xs", 64, 64.0, 2e-3)),
        *(("vera", 64, 64.0, 1e-2), ("vera", 256, 256.0, 1e-2)),
    }
    assert options_of_arm(arms[-1], 0)["vera"] and options_of_arm(arms[3], 0)["xs"]
    plain = make_arms(CompareConfig(methods=("vera",), quick=True), BASIS)
    assert {(arm.rank, arm.learning_rate) for arm in plain} == {
        *((256, 1e-3), (256, 3e-3), (256, 9e-3))
    }
    given = make_arms(CompareConfig(methods=("vera",), ranks=(7,), alphas=(3.0,)), BASIS)
    assert {(arm.rank, arm.alpha) for arm in given} == {(7, 3.0)}


def test_sixteen_settings_take_a_third_of_the_steps():
    """Halving by the stated rule: 16 runs of 80 steps take fewer than a third of 16 · 80."""
    arms = [at_rate(lora(2), rate) for rate in range(1, 17)]
    losses = {arm: 1 / arm.learning_rate for arm in arms}
    taken, done = 0, 0
    for stage in (*STAGES, LAST):
        end = end_step_of_stage(stage, 80, 10)
        taken += len(losses) * (end - done)
        done = end
        if stage is not LAST:
            losses = dict(decide_after_stage(stage, losses, stage.share).kept)
    assert done == 80
    assert [arm.learning_rate for arm in losses] == [16, 15]
    assert taken <= 16 * 80 / 3


def at_rate(arm, rate):
    return arm._replace(learning_rate=float(rate))


def test_each_method_keeps_its_best_and_what_failed_never_goes_on():
    losses = {lora(2): 1.0, lora(8): 0.9, lora(32): math.nan, full(): 5.0}
    rung = decide_after_stage(STAGES[1], losses, 0.5)
    assert [arm for arm, _ in rung.kept] == [lora(8), lora(2), full()]
    assert [arm for arm, _ in rung.stopped] == [lora(32)]
    alone = decide_after_stage(STAGES[0], {lora(2): math.nan}, 0.125)
    assert not alone.kept, "the only one failed"


def test_by_a_score_the_largest_go_on():
    scores = {lora(2): 0.1, lora(8): 0.9, lora(32): math.nan, full(): 0.0}
    rung = decide_after_stage(STAGES[0], scores, 0.125, larger=True)
    assert [arm for arm, _ in rung.kept] == [lora(8), full()]
    assert [arm for arm, _ in rung.stopped] == [lora(2), lora(32)]


def test_a_stage_at_which_each_method_has_one_arm_stops_nothing():
    assert not stops_arms(STAGES[0], [lora(2), full()])
    assert stops_arms(STAGES[0], [lora(2), lora(8), full()])
    three = [lora(2), lora(8), lora(32)]
    assert stops_arms(STAGES[1], three) and not stops_arms(LAST, three)


@pytest.mark.parametrize(
    ("warmup", "ends"), [(0, (6, 24)), (5, (6, 24)), (20, (24, 24)), (25, (30, 30))]
)
def test_no_stage_ends_within_the_warmup(warmup, ends):
    assert tuple(end_step_of_stage(stage, 48, 6, warmup) for stage in STAGES) == ends
    assert end_step_of_stage(STAGES[0], 48, 6, 60) == end_step_of_stage(LAST, 48, 6, 60) == 48


@pytest.mark.parametrize(("steps", "every", "end"), [(35, 4, 8), (16, 2, 2), (3, 1, 1), (7, 9, 7)])
def test_a_stage_ends_where_the_loss_is_measured(steps, every, end):
    assert end_step_of_stage(STAGES[0], steps, every) == end
    assert end_step_of_stage(LAST, steps, every) == steps
