"""An option's field says everything about the option, or there is an error."""

import dataclasses

import pytest

from train.compare.scripts import SCRIPTS
from train.options.conditions import NoEffect
from train.options.field import CardSection, traits_of
from train.options.scripts import classify, grpo, sft

OTHERS = (script.plain for script in SCRIPTS.values())
ALL = (sft.Config(), classify.Config(), grpo.Config(), *OTHERS)


def test_each_option_declares_itself_and_each_condition_is_of_some_option():
    declared = [traits_of(plain) for plain in ALL]
    assert {case for traits in declared for one in traits.values() for case in one.idle} == {
        *NoEffect
    }
    for traits in declared:
        assert {one.excludes for one in traits.values()} <= {None, *traits}


def test_a_field_that_says_nothing_about_itself_is_an_error():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Run(sft.SftRunConfig):
        keep: int = 7  # says what the field does that it overrides
        undeclared: int = 3

    options = dataclasses.replace(sft.Config(), run=Run())
    with pytest.raises(TypeError, match="Run.undeclared has no traits. Declare"):
        traits_of(options)


def test_a_field_that_overrides_another_keeps_what_that_one_says():
    alpha, output = (traits_of(sft.Config())[name] for name in ("alpha", "output"))
    assert alpha.card is CardSection.ADAPTER and NoEffect.FULL in alpha.idle and output.changeable
