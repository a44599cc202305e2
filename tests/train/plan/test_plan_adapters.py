"""Plans of adapters that train side by side."""

import json

import pytest

from tests.train.plan.tiny_plans import FIELDS, asked, write
from train.plan import __main__ as plan
from train.plan import compile as planned


@pytest.mark.slow
def test_memory_grows_by_the_adapters_alone(tmp_path):
    """The base stays one, FLOPs stay as they are; the adapter and its moments are there n times."""
    model = write(tmp_path, FIELDS)
    options = asked(
        model, "--targets", "q_proj", "down_proj", "--adapters", 1, 4, "--remat", "none"
    )
    plan.check_options(options)
    job, optim = plan.make_job(options.plan)
    one, four = (planned.plan(job, variant, optim) for variant in plan.variants_to_plan(options))
    assert (one.name, four.name) == ("1 × LoRA r=3, no remat", "4 × LoRA r=3, no remat")
    alone = planned.plan(job, plan.PlanVariant(options.adapter, "none"), optim)
    sizes = [made.per_chip_bytes for made in (alone, one, four)]
    assert sizes[0]["base"] == sizes[1]["base"] == sizes[2]["base"]
    assert (
        sizes[1]["adapter"] == sizes[0]["adapter"]
        and sizes[2]["adapter"] == 4 * sizes[0]["adapter"]
    )
    assert 3.99 < sizes[2]["optimizer"] / sizes[0]["optimizer"] < 4.01
    assert alone.flops_per_step == one.flops_per_step == four.flops_per_step
    growth = sizes[2]["total"] - sizes[1]["total"]
    more = 3 * (sizes[0]["adapter"] + sizes[0]["optimizer"])
    assert more < growth < 2.5 * more, (
        "weights and two moments, a gradient, what updates compute with"
    )


@pytest.mark.slow
def test_json(tmp_path, capsys):
    model = write(tmp_path, FIELDS)
    options = ["--model", model, "--batch-size", "4", "--seq-len", "16", "--dtype", "float32"]
    plan.main([*options, "--targets", "q_proj", "--json", "--adapters", "2"])
    out = json.loads(capsys.readouterr().out)
    assert out["name"] == "2 × LoRA r=16, remat" and out["others"] == []
