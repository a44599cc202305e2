"""Plans of train.dpo and train.grpo: their batches, the programs between steps, and no second base.

What is compared are the compiled programs' own figures, and shapes of batches that runs make.
"""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.weight import leaves_of
from lora_jax.models.sampling import rollouts
from lora_jax.training.data.preferences import pack_pairs
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.losses import Loss, sequence_logps
from lora_jax.training.remat import compiled_bytes
from lora_jax.training.setup import Setup
from tests.support import over
from tests.train.plan.closed_form import plan_flops
from tests.train.plan.tiny_plans import (
    FIELDS,
    ON_FOUR,
    asked,
    planned_for,
    prepared,
    write,
)
from train.console.errors import UserError
from train.live.prompts import PromptFeed, TokenizedPrompts
from train.live.reference import forward_of
from train.options.optim import make_optimizer, make_schedule
from train.options.scripts.grpo import Config
from train.plan import __main__ as plan
from train.plan import compile as planned
from train.plan.between import Program, programs_between
from train.plan.job import batch_shapes, placed_shapes
from train.plan.tasks import REFERENCE, SAMPLER, SCORER
from train.run.costs import tree_bytes

DPO = ("--task", "dpo")
GRPO = ("--task", "grpo", "--group", 2, "--max-new-tokens", 7)
GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), FIELDS)


def job_of(model, *options):
    return plan.make_job(asked(model, *options).plan)[0]


@functools.cache
def sizes(lowered):
    return compiled_bytes(lowered.compile())


def of_step(model, *options):
    """(the bytes of a compiled step, what was compiled)"""
    step = prepared(asked(model, *options))
    return compiled_bytes(step.lowered.compile()), step


def shapes_of(batch):
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


@pytest.mark.parametrize("prompt", [0, 16])
def test_a_batch_of_pairs_has_the_shapes_of_a_run(model, prompt):
    """Rows as long as they may be, of which the loss counts all that it can."""
    asks = ("--prompt-len", prompt) if prompt else ()
    job = job_of(model, *DPO, *asks, "--grad-accum", 3)
    ids = np.arange(24, dtype=np.int32)
    tokens = [TokenSequence(ids, ids >= prompt, 1) for _ in range(24)]
    pairs = pack_pairs(tokens, 24, packing=False, share_prompt=bool(prompt))
    batch = pairs.take(np.arange(12).reshape(3, 4))
    batch["reference"] = np.zeros((3, 4, pairs.segments_a_row), np.float32)
    assert shapes_of(batch) == shapes_of(batch_shapes(job))
    assert batch["ids"].shape == (3, 4, 32 if prompt else 48)
    if prompt:
        alone = job_of(model, *DPO, *asks, "--no-share-prompt")
        assert (alone.row_tokens, alone.predicted_tokens) == (48, 16)
        assert "branches" not in batch_shapes(alone)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_batch_of_completions_has_the_shapes_of_a_run(model, share_prompt):
    asks = () if share_prompt else ("--no-share-prompt",)
    job = job_of(model, *GRPO, *asks, "--grad-accum", 3)
    optim = SimpleNamespace(seed=0, grad_accum=3, batch_size=4)
    data = SimpleNamespace(group=2, max_new_tokens=7)
    prompts = TokenizedPrompts([{"prompt": "x"}] * 9, [[5] * 17] * 9)
    config = SimpleNamespace(optim=optim, data=data)
    feed = PromptFeed(config, prompts, None, share_prompt=share_prompt)
    assert feed.length == (40 if share_prompt else 32), "rounded up"
    length = 31 if share_prompt else 24
    assert shapes_of(feed.batch(0, length=length)) == shapes_of(batch_shapes(job))


@over(
    ("name", "options"),
    {
        "pairs": DPO,
        "pairs, in chunks": (*DPO, "--remat", "none", "--loss-chunk", 40),
        "pairs, prompts shared": (*DPO, "--prompt-len", 16),
        "completions": (*GRPO, "--remat", "none", "--no-share-prompt"),
        "completions, prompts shared": (*GRPO, "--remat", "none"),
    }.items(),
    often=[],
    called=lambda case: case[0],
)
def test_flops_are_those_counted_by_hand(model, name, options):
    """A step's, and one forward pass of the reference or the scorer for each of its batches."""
    job, variant, made = planned_for(model, *options, "--grad-accum", 2)
    np.testing.assert_allclose(made.flops_per_step, plan_flops(job, variant), rtol=0.01)
    np.testing.assert_allclose(made.flops_per_step, made.flops_traced, rtol=0.01)
    step = prepared(asked(model, *options, "--grad-accum", 2))
    alone = planned.count_traced(step.traced.jaxpr).flops
    assert 1.2 < made.flops_traced / alone < 1.5 and made.notes == ()


@pytest.mark.slow
def test_a_sampled_token_costs_two_flops_a_weight(model):
    _, _, made = planned_for(model, *GRPO)
    step = prepared(asked(model, *GRPO))
    arrays = {path: leaf for path, leaf in leaves_of(lj.strip(step.params))[0] if leaf.ndim > 1}
    weights = sum(math.prod(leaf.shape) for path, leaf in arrays.items() if "norm" not in path)
    weights += sum(math.prod(x.shape) for x in jax.tree.leaves(step.state.adapter))
    np.testing.assert_allclose(made.sampled_token_flops, 2 * 4 * weights, rtol=0.01)


@pytest.mark.slow
def test_the_cache_has_keys_and_values_of_all_tokens_but_the_last(model):
    _, _, made = planned_for(model, *GRPO)
    layers, rows, heads, tokens, size = 3, 4, 2, 23, 16
    numbers = 2 * layers * rows * heads * tokens * size + rows * tokens + 1 + rows
    assert made.cache_bytes == 4 * numbers
    _, step = of_step(model, *GRPO)
    assert sizes(step.between[SAMPLER].lowered)["temporaries"] > made.cache_bytes


def test_the_total_is_that_of_the_largest_program():
    """Beside it there is what stays; arguments that stay anyway are not counted twice."""

    def compiled(temporaries, arguments):
        memory = SimpleNamespace(
            argument_size_in_bytes=arguments,
            output_size_in_bytes=20,
            alias_size_in_bytes=5,
            temp_size_in_bytes=temporaries,
            generated_code_size_in_bytes=3,
            host_temp_size_in_bytes=0,
        )
        return SimpleNamespace(memory_analysis=lambda: memory)

    held = {"base": 1000, "adapter": 100, "optimizer": 200}

    def memory(step, scorer, reference=0):
        programs = {
            planned.STEP: Program(None, None, None, 1300),
            SCORER: Program(None, None, None, 1100),
            REFERENCE: Program(None, None, None, 1000),
        }
        made = {
            planned.STEP: compiled(step, 1300 + 40),
            SCORER: compiled(scorer, 1100 + 30),
            REFERENCE: compiled(reference, 1000 + 7 + 30),
        }
        return planned._device_memory_bytes(made, programs, held)

    assert memory(500, 400)["total"] == 1300 + 40 + 20 - 5 + 500 + 3
    of_scorer = memory(500, 800)
    assert of_scorer["total"] == 1300 + 30 + 20 - 5 + 800 + 3
    assert of_scorer["other"] == 48 and of_scorer["temporaries"] == 500
    assert of_scorer["scorer"] == 800
    assert memory(500, 400, 800)["total"] == of_scorer["total"] + 7, "an adapter of its own"


@pytest.mark.slow
def test_in_full_the_base_is_there_beside_what_trains(model):
    """While a reference reads, that is: a copy of the weights trains."""
    step = prepared(asked(model, *DPO, "--full"))
    program = step.between[REFERENCE]
    assert program.shared_bytes < 0.01 * tree_bytes(program.params)
    lora = prepared(asked(model, *DPO)).between[REFERENCE]
    assert lora.shared_bytes >= tree_bytes(lora.params)


@pytest.mark.slow
@pytest.mark.parametrize("options", [DPO, GRPO], ids=["pairs", "completions"])
def test_a_step_has_no_second_base(model, options):
    """At equal tokens, beside the arrays that a batch has besides."""
    seq = 48 if options == DPO else 24
    sft, _ = of_step(model, "--seq-len", seq)
    found, step = of_step(model, *options)
    more = batch_shapes(job_of(model, *options)).keys() - batch_shapes(job_of(model)).keys()
    allowed = 1.02 * sft["arguments"] + tree_bytes({name: step.batch[name] for name in more})
    assert found["arguments"] <= allowed
    assert found["temporaries"] <= 1.1 * sft["temporaries"]
    for program in step.between.values():
        between = sizes(program.lowered)
        assert between["arguments"] <= tree_bytes((program.params, step.batch)) + 1000
        if program.runs_per_step:
            assert between["temporaries"] < found["temporaries"]


@pytest.mark.slow
def test_a_copy_of_the_base_is_noticed(model):
    """The control: a step of DPO that has one, and computes the reference itself."""
    sft, _ = of_step(model, "--seq-len", 48)
    options = asked(model, *DPO)
    job, optim = plan.make_job(options.plan)
    step = prepared(options)
    forward = forward_of(job.layout.constrained(step.model))
    copy = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), lj.strip(step.params)
    )

    def sums(policy, params, batch, key=None):
        plain = batch.pop("copy")
        reference = sequence_logps(forward, plain, batch).policy
        batch["reference"] = jax.lax.stop_gradient(reference).reshape(batch["counts"].shape)
        return job.loss.sums(policy, params, batch, key)

    schedule = make_schedule(optim, 1e-4, 1000)
    optimizer = make_optimizer(optim, schedule, step.params)
    setup = Setup.make(job.layout, step.params, optimizer, schedule)
    batch = step.batch | {"copy": copy}
    loss = Loss(sums, unit="pair")
    traced = setup.trace(setup.forward(step.model), loss, step.state, step.base, batch)
    found = compiled_bytes(traced.lower().compile())
    assert found["arguments"] > 1.02 * sft["arguments"] + 0.9 * tree_bytes(step.base)


@pytest.mark.slow
def test_a_reference_by_an_adapter_adds_its_bytes_alone(model):
    job, (_, step) = job_of(model, *DPO), of_step(model, *DPO)
    rule = lj.LoraRule(targets=["q_proj", "down_proj"], rank=5, alpha=7.0)
    tree = placed_shapes(lj.lorafy(lj.strip(step.params), [rule]), job.layout)
    of = (step.model, job.layout, step.params, step.batch)
    program = programs_between(*of, reference=tree)[REFERENCE]
    base, found = (sizes(one.lowered) for one in (step.between[REFERENCE], program))
    added = tree_bytes(tree) - tree_bytes(lj.strip(tree))
    assert 0 < added == found["arguments"] - base["arguments"] < 0.2 * tree_bytes(step.base)
    assert found["temporaries"] <= 1.1 * base["temporaries"]


@pytest.mark.slow
def test_the_sampler_is_the_very_program_that_runs(model):
    """Programs for shapes take as much memory as those for arrays."""
    _, step = of_step(model, *GRPO)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), step.params)
    found = sizes(step.between[SAMPLER].lowered)
    ones = np.ones((2, 17), int)
    prompts = rollouts.make_prompts(ones, ones)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(4))
    decoding = rollouts.make_decoding(step.model, 4, max_new_tokens=7, temperature=1.0, key=keys)
    how = {"n": 2, "max_new_tokens": 7, "with_routing": False}
    static = {"model": step.model, "apply": lj.adapt(step.model.apply), **how}
    real = compiled_bytes(
        rollouts._sample.lower(params, prompts, decoding, **static).compile()  # type: ignore[attr-defined]
    )
    assert found["outputs"] == real["outputs"] > 0
    assert found["temporaries"] == pytest.approx(real["temporaries"], rel=0.02)
    assert found["arguments"] == pytest.approx(real["arguments"], abs=100)


@pytest.mark.slow
@pytest.mark.parametrize("options", [DPO, GRPO], ids=["pairs", "completions"])
def test_devices_share_the_programs_between_steps(model, options):
    _, _, one = planned_for(model, *options, "--grad-accum", 2)
    _, _, made = planned_for(model, *options, *ON_FOUR)
    assert one.flops_per_step <= made.flops_per_step < 1.2 * one.flops_per_step
    assert made.per_chip_bytes["base"] < 0.5 * one.per_chip_bytes["base"]
    scored = REFERENCE if options == DPO else SCORER
    assert made.per_chip_bytes[scored] < 0.7 * one.per_chip_bytes[scored]
    assert set(made.collective_bytes) >= {"all-gather"}


@pytest.mark.slow
def test_a_sampler_that_is_refused_is_told(model, monkeypatch):
    def refuse(compiler_options=None):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: required for HLO temporaries (3.50G) exceeds it"
        )

    options = asked(model, *GRPO)
    step = prepared(options)
    refused = step.between[SAMPLER]._replace(lowered=SimpleNamespace(compile=refuse))
    between = step.between | {SAMPLER: refused}
    monkeypatch.setattr(planned, "prepare", lambda *_: dataclasses.replace(step, between=between))
    job, optim = plan.make_job(options.plan)
    made = planned.plan(job, plan.variants_to_plan(options)[0], optim)
    memory = made.per_chip_bytes
    assert not made.fits and made.refused.startswith("the sampler: RESOURCE_EXHAUSTED")
    assert memory["sampler"] == 3.5 * GIB and 0 < memory["scorer"] < memory["temporaries"] < GIB
    held = memory["base"] + memory["adapter"] + memory["optimizer"]
    assert memory["total"] == held + memory["sampler"] and made.flops_traced > 0


@pytest.mark.slow
def test_tables_name_the_programs(model, capsys, monkeypatch):
    monkeypatch.setattr(planned, "prepare", lambda *_: step)
    for options, parts, rows in (
        (DPO, ("step", "reference"), "4 pairs of 2 × 24 tokens per step"),
        (GRPO, ("step", "scorer", "sampler"), "4 completions, 2 of a prompt, of 17 + 7 tokens"),
    ):
        step = prepared(asked(model, *options))
        words = ["--model", model, "--batch-size", "4", "--seq-len", "24", "--rank", "3"]
        words += ["--dtype", "float32", "--alone", *map(str, options)]
        plan.main(words)
        table = capsys.readouterr().out
        assert f" ┃ {' ┃ '.join(parts)} ┃ other ┃ total ┃" in re_spaced(table) and rows in table
        assert f"{', '.join(parts)}: temporaries of each program" in table
        assert ("the cache of keys and values" in table) == (options == GRPO)
        plan.main([*words, "--json"])
        made = json.loads(capsys.readouterr().out)
        assert made["per_chip_bytes"].keys() >= {*parts[1:], "temporaries", "total"}


def re_spaced(text):
    return " ".join(text.split())


def test_the_largest_batch_is_of_whole_groups_and_pairs_may_be_long(model, monkeypatch):
    tried = []

    def plan_of(job, variant, optim):
        tried.append((job.batch_size, job.row_tokens))
        total = 1000 + job.batch_size * job.row_tokens
        capacity = {"total": total, "capacity": 20_000}
        fits = {"1": total <= 20_000}
        made = SimpleNamespace(per_chip_bytes=capacity, fits_share=fits, failed=None)
        made.compile_seconds = 0
        return made

    monkeypatch.setattr(plan, "plan", plan_of)
    found, *_ = plan.find_largest_size(
        asked(model, "--task", "grpo", "--group", 6, "--batch-size", 6, "--largest-batch")
    )
    assert found == {"1": 786} and 786 * 24 + 1000 <= 20_000 < 792 * 24 + 1000
    assert all(rows % 6 == 0 for rows, _ in tried)
    found, *_ = plan.find_largest_size(asked(model, *DPO, "--longest"))
    assert found == {"1": 2304} and 4 * 2 * 2304 + 1000 <= 20_000 < 4 * 2 * 2560 + 1000


BAD = [
    (("--group", 4), "--group only applies to completions, which train.grpo draws"),
    ((*DPO, "--max-new-tokens", 4), "--max-new-tokens only applies to completions"),
    (("--task", "grpo", "--group", 1), "--group 1 is out of range. Pass a number of at least 2"),
    (("--task", "grpo", "--group", 3), "--batch-size 4 is not a multiple of --group 3"),
    (("--task", "grpo", "--group", 2), "--max-new-tokens 128 leaves no room for prompts"),
    ((*GRPO, "--longest"), "--seq-len covers a prompt and a completion"),
    (("--prompt-len", 4), "--prompt-len only applies to pairs"),
    ((*DPO, "--prompt-len", 24), "--prompt-len 24 leaves no room for completions"),
    (("--no-share-prompt",), "--no-share-prompt has no effect, because there is no prompt"),
    ((*DPO, "--no-share-prompt"), "--no-share-prompt has no effect, because there is no prompt"),
    ((*DPO, "--prompt-len", 5, "--no-share-prompt"), "prompts are only 21% of the tokens"),
    ((*DPO, "--adapters", 2), "--adapters only plans adapters of train.sft"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(map(str, b[0])) for b in BAD])
def test_bad_input(model, options, message):
    with pytest.raises(UserError, match=message):
        planned_for(model, *options)


def test_lengths_of_completions_are_those_of_the_script(model):
    """Plans as the script would run where neither names a length."""
    job = job_of(model, "--task", "grpo", "--seq-len", 200, "--batch-size", 8)
    config = Config()
    assert job.group == config.data.group == 8 and job.max_new_tokens == 128
