"""The options of optimisers and schedules: defaults, and what is refused."""

import pytest

from train.classify import parse as parse_classify
from train.console.errors import UserError
from train.sft import check, parse


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "momentum": None}),
        ("--optimizer lion", {"lr": 1e-3 / 3, "beta1": 0.9, "beta2": 0.99, "eps": None}),
        ("--optimizer lion --full", {"lr": 1e-4 / 3}),
        ("--optimizer muon", {"lr": 1e-3, "momentum": 0.95, "beta1": None, "beta2": None}),
        ("--optimizer adafactor", {"lr": 1e-3, "beta2": None, "momentum": None}),
        ("--optimizer schedule-free", {"lr": 1e-3, "beta2": 0.99, "schedule": "constant"}),
        ("--optimizer sgd --lr 0.5", {"lr": 0.5, "momentum": 0.9}),
        ("--dataset a.jsonl --beta1 0.8 --eps 1e-6", {"beta1": 0.8, "beta2": 0.999, "eps": 1e-6}),
    ],
)
def test_defaults_are_those_of_the_optimiser(args, expected):
    config = parse(args.split())
    check(config)
    got = {name: getattr(config.optim, name) for name in expected}
    assert got == {n: v if isinstance(v, str) else pytest.approx(v) for n, v in expected.items()}


def test_rates_of_the_classifier_follow():
    config = parse_classify("--optimizer lion --head-only".split())
    assert config.optim.lr == pytest.approx(3e-2 / 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--optimizer sgd", "sgd has no default learning rate.* Pass --lr"),
        ("--optimizer sgd --lr 1 --beta2 0.9", "sgd does not use this option. Remove --beta2"),
        ("--optimizer muon --eps 1e-6 --beta1 0.9", "Remove --beta1 and --eps"),
        ("--momentum 0.9", "--optimizer adamw does not use this option. Remove --momentum"),
        (
            "--optimizer schedule-free --schedule cosine",
            "instead of following a schedule. Remove --s",
        ),
        ("--optimizer schedule-free --min-lr 0.1", "instead of following a schedule. Remove --min"),
        ("--optimizer schedule-free --beta1 0", "needs a positive --beta1"),
        ("--optimizer lion --lr-rule llama", "fitted to Adam, not lion"),
        ("--schedule constant --min-lr 0.1", "does not fall to a final learning rate. Remove"),
        ("--schedule inverse-sqrt --min-lr 0.1", "does not fall to a final learning rate"),
        ("--decay 0.3", "--schedule cosine has no stable part .*Remove --decay"),
        ("--warmup 5 --warmup-ratio 0.1", "length of the warmup. Remove --warmup.$"),
        ("--warmup-ratio 1", "--warmup-ratio 1.0 is out of range. Pass a share of the steps"),
        ("--schedule wsd --decay 0", "--decay 0.0 is out of range. Pass a share of the steps"),
        ("--min-lr 1.5", "--min-lr 1.5 is out of range. Pass a share of the peak learning rate"),
        ("--beta1 1", "--beta1 1.0 is out of range. Pass a number from 0 to below 1"),
        ("--neftune -1", "--neftune -1.0 is out of range. Pass 0 or a positive number"),
        ("--eps 0", "--eps 0.0 is out of range. Pass a positive number"),
        ("--lr nan", "--lr nan is out of range. Pass a positive learning rate"),
    ],
)
def test_what_makes_no_sense_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        check(parse(args.split()))
