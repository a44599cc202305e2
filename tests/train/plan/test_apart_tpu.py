"""The search of --remat auto for a TPU compiles in processes of their own (extra `tpu`)."""

import jax
import pytest

from tests.train.plan.tiny_plans import FIELDS, asked, write
from train.plan import __main__ as plan
from train.plan.job import PlanVariant

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]


def test_a_plan_of_another_process_is_the_plan_of_this_one(tmp_path, monkeypatch):
    options = asked(write(tmp_path, FIELDS), "--topology", "v5e:1x1", "--remat", "auto")
    job, optim = plan.make_job(options.plan)
    variant = PlanVariant(options.adapter, "full")
    apart = plan.plan_variant(options.plan, job, variant, optim)
    here = plan.plan(job, variant, optim)
    assert apart.per_chip_bytes == here.per_chip_bytes and apart.clocks == here.clocks

    def crash(*_, **__):
        raise AssertionError("this process compiles")

    monkeypatch.setattr(jax.stages.Lowered, "compile", crash)
    assert plan.plan_variant(options.plan, job, variant, optim).fits == here.fits
    with pytest.raises(AssertionError, match="this process compiles"):
        plan.plan(job, variant, optim)  # the control
