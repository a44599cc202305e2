"""Plans against the real step: its shapes, FLOPs and files; and bad input."""

import dataclasses
import functools
import io
import json
import re
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lora_jax as lj
from lora_jax.training.remat import GIB, LADDER, Attempt, RematSearch
from lora_jax.training.step import State
from tests.models import tiny_encoders
from tests.support import over
from tests.train.plan.closed_form import plan_flops, step_flops
from tests.train.plan.tiny_plans import (
    FIELDS,
    MIXTURE,
    ON_FOUR,
    CompiledOnce,
    asked,
    planned_for,
    prepared,
    write,
)
from train.console.errors import UserError
from train.options.common import AdapterConfig
from train.plan import __main__ as plan
from train.plan import compile as planned
from train.plan import ladder
from train.plan.__main__ import PlanConfig
from train.plan.clock.work import HloWork
from train.plan.compile import parse_refused_bytes
from train.plan.flops.checked import step_work
from train.plan.flops.jaxpr import Count
from train.plan.ladder import Ladder, print_ladder
from train.plan.machines import find_machine, topology_of_devices
from train.plan.table import print_plans
from train.processes.apart import ProcessCrash
from train.run.output import folder_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), FIELDS)


@over(
    ("remat", "full"),
    [
        ("none", True),
        ("full", False),
        ("full", True),
        ("dots_with_no_batch_dims_saveable", False),
    ],
    often=[],
    called=lambda case: f"{case[0]}, {case[1]}",
)
def test_flops_are_those_counted_by_hand(model, full, remat):
    options = [] if remat == "full" else ["--remat", remat]  # "full" is the default
    job, variant, made = planned_for(model, *options, *(["--full"] if full else []))
    assert variant.remat == remat
    assert made.flops_per_step == made.flops_per_chip
    np.testing.assert_allclose(made.flops_per_step, plan_flops(job, variant), rtol=0.01)
    np.testing.assert_allclose(made.flops_per_step, made.flops_traced, rtol=0.01)
    assert made.flops_source == "hlo" and made.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "name"), [("--freeze-a", "LoRA"), ("--xs", "LoRA-XS"), ("--vera", "VeRA")]
)
def test_an_a_that_does_not_train_costs_no_gradient(model, option, name):
    job, variant, made = planned_for(model, option)
    lora_job, lora_variant, lora = planned_for(model)
    assert made.name.startswith(f"{name} r=3") and made.adapter_bytes < lora.adapter_bytes
    by_hand = plan_flops(job, variant)
    np.testing.assert_allclose(made.flops_per_step, by_hand, rtol=0.005)
    assert by_hand < 0.99 * plan_flops(lora_job, lora_variant)


BY_BLOCKS = [(remat, "blockwise") for remat in ("none", "dots_with_no_batch_dims_saveable")]
BY_BLOCKS += [(remat, how) for remat in ("dots_saveable", "full") for how in ("blockwise", "dense")]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "how"), BY_BLOCKS)
def test_flops_of_attention_by_blocks(model, remat, how):
    """Blocks run forward once more, but skip the keys behind their span."""
    options = ("--remat", remat, "--seq-len", 384, "--attention", how)  # three spans of two blocks
    job, variant, made = planned_for(model, *options)
    np.testing.assert_allclose(made.flops_per_step, plan_flops(job, variant), rtol=0.01)
    np.testing.assert_allclose(made.flops_per_step, made.flops_traced, rtol=0.01)


def test_blocks_count_other_flops_than_all_scores_at_once(model):
    def closed_form(how):
        options = asked(model, "--seq-len", 384, "--attention", how)
        job, variant = plan.make_job(options.plan)[0], plan.variants_to_plan(options)[0]
        attention, params = job.attention_choice.attend, planned.abstract_params(job, variant)
        sizes = dict(batch=4, seq=384, remat="full", chunked=True)
        return step_flops(job.outline.config, params, attention=attention, split=None, **sizes)

    assert abs(closed_form("blockwise") / closed_form("dense") - 1) > 0.01


def described_attention(model, *options):
    options = asked(model, *options)
    return plan.describe_job(options.plan, plan.make_job(options.plan)[0])["attention"]


@pytest.mark.slow
def test_attention_is_planned_as_asked(model):
    on_two = ("--topology", "cpu:2", "--mesh", "sequence=2", "--seq-len", 512)
    auto, dense = (
        planned_for(model, *on_two, *how)[2].per_chip_bytes["temporaries"]
        for how in ([], ["--attention", "dense"])
    )
    assert auto < 0.7 * dense


@pytest.mark.parametrize("mesh", [(), ("--topology", "cpu:2", "--mesh", "sequence=2")])
def test_attention_is_told(model, mesh):
    auto, blocks, dense = (
        described_attention(model, "--seq-len", 512, *mesh, *how)
        for how in ([], ["--attention", "blockwise"], ["--attention", "dense"])
    )
    assert auto == blocks != dense == "dense"


@pytest.mark.slow
def test_flops_of_many_devices_are_those_of_one(model):
    _, _, one = planned_for(model, "--grad-accum", 2)
    job, _, made = planned_for(model, *ON_FOUR)
    assert made.flops_per_step == 4 * made.flops_per_chip
    # Each device on tensor has the products with its inputs' A's, as small as the rank.
    assert one.flops_per_step <= made.flops_per_step < 1.15 * one.flops_per_step
    assert made.flops_traced == one.flops_traced and made.notes == ()
    assert one.collective_bytes == {} and set(made.collective_bytes) >= {"all-gather"}
    assert made.per_chip_bytes["base"] < 0.5 * one.per_chip_bytes["base"]
    assert job.layout.mesh.shape["tensor"] == 2


@pytest.mark.slow
def test_a_mixture_costs_its_active_experts(tmp_path):
    """And blocks of its own tokens that are not full: less than a third as much again here.

    Ragged products are traced without these; a CPU's compiler multiplies by all experts.
    """
    model = write(tmp_path, FIELDS | MIXTURE)
    options = ("--batch-size", 16, "--seq-len", 64)
    job, variant, made = planned_for(model, *options)
    _, _, ragged = planned_for(model, *options, "--experts", "ragged")
    by_hand = plan_flops(job, variant)
    assert by_hand < made.flops_per_step < 1.3 * by_hand
    np.testing.assert_allclose(made.flops_per_step, made.flops_traced, rtol=0.01)
    assert ragged.flops_traced < 1.3 * by_hand
    assert ragged.flops_per_step > 1.5 * ragged.flops_traced


@pytest.mark.slow
def test_a_counter_that_forgets_the_layers_is_noticed(model, monkeypatch):
    monkeypatch.setattr("train.plan.flops.jaxpr._multiply_count", lambda n, part: part)
    _, _, made = planned_for(model)
    assert made.flops_per_step > 1.5 * made.flops_traced
    (note,) = made.notes
    assert "times the FLOPs of the step as traced: the partitioner makes devices repeat" in note


def broken(text):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")  # as of a v5p's programs


UNREADABLE = {
    "nothing": lambda text: None,
    "an error of XLA's": broken,
    "another language": lambda text: "func.func public @main()",
    "a loop that does not say its turns": lambda text: text.replace(
        "known_trip_count", "known_count"
    ).replace("direction=LT", "direction=NE"),
    "other words": lambda text: (
        text.replace("lhs_contracting_dims", "contracting")
        .replace("body=", "do=")
        .replace("calls=%", "calls=%another_")
    ),
}


@pytest.fixture(scope="module")
def sound(model):
    """Plans whose HLO is understood, by options."""
    return functools.cache(lambda *options: planned_for(model, *options)[2])


def rewritten(monkeypatch, rewrite):
    """Changes the HLO that the compiler gives."""
    real = jax.stages.Compiled.as_text
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: rewrite(real(self)))


@over(
    ("written", "options"),
    [*((written, ()) for written in UNREADABLE), ("other words", ON_FOUR)],
    often=UNREADABLE,
    called=lambda case: case[0] + (" on four devices" if case[1] else ""),
)
def test_memory_is_told_where_the_hlo_is_not_understood(
    model, sound, written, options, monkeypatch
):
    expected = sound(*options)
    rewritten(monkeypatch, UNREADABLE[written])
    job, variant, made = planned_for(model, *options)
    assert made.per_chip_bytes == expected.per_chip_bytes and made.fits == expected.fits
    assert made.flops_source == "jaxpr" and made.collective_bytes is None
    assert made.flops_per_step == made.flops_traced == expected.flops_traced
    assert made.flops_per_chip == round(made.flops_per_step / len(job.machine.devices))
    np.testing.assert_allclose(made.flops_per_step, plan_flops(job, variant), rtol=0.01)
    (note,) = made.notes
    assert "the HLO was not understood (" in note and "those of the step as traced" in note


def test_memory_is_told_where_neither_is_understood(model, sound, monkeypatch):
    rewritten(monkeypatch, UNREADABLE["another language"])
    monkeypatch.setattr(
        "train.plan.flops.jaxpr._FLOPS_OF_PRIMITIVE", {"dot_general": lambda eqn: eqn.nothing}
    )
    _, _, made = planned_for(model)
    assert made.per_chip_bytes == sound().per_chip_bytes and made.flops_source is None
    assert made.flops_per_step is made.flops_per_chip is made.flops_traced is None
    assert "the jaxpr was not understood either" in made.notes[0]


@pytest.mark.parametrize(
    ("flops", "counted", "note"),
    [
        (50, Count(100), None),
        (74, Count(100), None),
        (76, Count(100), "has 1.52 times the FLOPs of the step as traced: the partitioner"),
        (46, Count(100), None),
        (44, Count(100), "has 0.88 times .* may not have been recognised"),
        (0, Count(100), "has 0.00 times"),
        (44, Count(100, exact=False), None),
        (44, Count(0), None),
        (44, None, None),
    ],
)
def test_counts_that_are_far_apart_are_noted(flops, counted, note, monkeypatch):
    monkeypatch.setattr(
        "train.plan.flops.checked.work_of", lambda *_: HloWork(flops, {"all-gather": 8})
    )
    work = step_work("HLO", counted, 2)
    assert (work.source, work.per_step, work.per_chip) == ("hlo", 2 * flops, flops)
    assert work.sent == {"all-gather": 8}
    assert len(work.notes) == (note is not None)
    if note:
        assert re.search(note, work.notes[0])


def test_what_the_trace_does_not_know_is_said():
    work = step_work("", Count(101, exact=False), 4)
    assert (work.source, work.per_step, work.per_chip) == ("jaxpr", 101, 25)
    assert "loops of unknown length are counted once" in work.notes[0]


def test_parts_add_up_and_sizes_are_those_of_the_files(model, tmp_path):
    job, variant, made = planned_for(model)
    sizes = dict(made.per_chip_bytes)
    capacity, total = sizes.pop("capacity"), sizes.pop("total")
    assert sum(sizes.values()) == total <= capacity and made.fits and made.refused is None
    params = planned.abstract_params(job, variant)
    rng = np.random.default_rng(0)  # what is all alike would be compressed
    filled = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), params)
    lj.save_adapter(tmp_path / "adapter", filled)
    adapter, base = lj.split(filled)
    assert sizes["base"] == sum(x.nbytes for x in jax.tree.leaves(base))
    assert made.adapter_bytes == sizes["adapter"] == sum(x.nbytes for x in jax.tree.leaves(adapter))
    assert made.adapter_bytes < folder_bytes(tmp_path / "adapter") < 1.5 * made.adapter_bytes + 5e4
    assert made.checkpoint_bytes == sizes["adapter"] + sizes["optimizer"]
    assert sizes["optimizer"] // 2 == pytest.approx(sizes["adapter"], rel=0.01)  # two moments


def test_it_is_the_very_step_that_runs(model):
    """What is compiled for shapes is what is compiled for arrays."""
    step = prepared(asked(model))

    def filled(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)

    state, base, batch = jax.tree.map(filled, (step.state, step.base, step.batch))
    compiled = step.lowered.compile()
    new, metrics = compiled(state, base, batch)
    assert isinstance(new, State) and int(new.step) == 2 and np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_json_and_a_table(model, capsys, monkeypatch):
    prepare, steps = planned.prepare, {}

    def prepare_once(job, variant, optim):
        if variant not in steps:
            step = prepare(job, variant, optim)
            steps[variant] = dataclasses.replace(step, lowered=CompiledOnce(step.lowered))
        return steps[variant]

    monkeypatch.setattr(planned, "prepare", prepare_once)
    adapters = plan.AdapterConfig(targets=("q_proj",)), plan.AdapterConfig(full=True)
    both = [planned.PlanVariant(adapter, "full") for adapter in adapters]
    monkeypatch.setattr(
        plan, "variants_to_plan", lambda options, *_, **__: both[1:] if options.plan.alone else both
    )
    args = ["--model", model, "--topology", "cpu:2", "--batch-size", "2", "--seq-len", "8"]
    args += ["--dtype", "float32"]
    args += ["--tokens", "1600", "--peak-tflops", "1e-6", "--price", "3"]
    plan.main([*args, "--json"])
    out = json.loads(capsys.readouterr().out)
    assert out["fits"] is True and out["mesh"] == {"fsdp": 2} and out["chips"] == 2
    assert [out["name"], *(other["name"] for other in out["others"])] == [
        *("LoRA r=16, remat", "full fine-tuning, remat")
    ]
    assert out["others"][0]["adapter_bytes"] > out["adapter_bytes"]
    assert out["flops_source"] == "hlo" and out["notes"] == []
    sizes = {"base", "adapter", "optimizer", "temporaries", "total", "capacity"}
    assert sizes <= set(out["per_chip_bytes"])
    seconds = out["flops_per_chip"] / (1e6 * out["utilisation"])
    np.testing.assert_allclose(out["step_seconds"], seconds)
    np.testing.assert_allclose(out["chip_hours"], 100 * seconds * 2 / 3600)
    np.testing.assert_allclose(out["cost"], 3 * out["chip_hours"])
    step = out["clocks"]["step"]
    assert sum(part["flops"] for part in step["groups"]) == out["flops_per_chip"]
    assert {"forward", "recomputed", "backward"} <= {part["phase"] for part in step["groups"]}
    assert step["seconds"] is step["mfu"] is None, "a CPU's compiler estimates none"

    plan.main([*args, "--full", "--alone", "--capacity-gib", "0.0001"])
    table = capsys.readouterr().out
    assert "full fine-tuning" in table and "LoRA r" not in table and " no " in table
    assert "40 % of the published peak" in table and "≈" not in table
    assert "Work of a device by groups: full fine-tuning, remat" in table
    assert "does not estimate the time" in table and "MFU" not in table


def test_flops_that_are_not_of_the_hlo_are_marked(model, sound, capsys):
    work = step_work("", Count(3 * 10**12), 1)
    told = dict(flops_per_step=work.per_step, flops_per_chip=work.per_chip)
    told |= dict(flops_source=work.source, collective_bytes=work.sent, notes=work.notes)
    made = dataclasses.replace(sound(), **told)
    options = [asked(model, "--peak-tflops", 1, *more).plan for more in ([], ["--json"])]
    job, _ = plan.make_job(options[0])
    facts = plan.describe_job(options[0], job)
    plan.print_results(options[0], job, facts, [made, sound()])
    table = capsys.readouterr().out
    assert re.search("│ LoRA r=3, remat │ +≈ 3.00 │ +– │ +7.50 s │", table)
    assert re.search("│ LoRA r=3, remat │ +0.00 │ +0.00 │", table)
    quick = facts | {"peak_flops_per_device": 8.1e12}
    fast = [{"step_seconds": 0.0048, "chip_hours": None, "cost": None}]
    print_plans(Console(width=120), quick, [made], fast)
    table = capsys.readouterr().out
    assert re.search("│ +4.8 ms │", table) and "peak, 8.1 TFLOP/s" in table
    assert "≈ LoRA r=3, remat: the HLO was not understood (the HLO has no entry)" in table
    assert "GB between" not in table, "one slice sends nothing to others"
    sent = {"all-gather": 5 * 10**9, "all-reduce": 9 * 10**6}
    between = {"all-reduce": 4 * 10**6}
    apart = dataclasses.replace(sound(), collective_bytes=sent, between_slices_bytes=between)
    plan.print_results(options[0], job, facts | {"slices": 2}, [apart])
    table = capsys.readouterr().out
    assert "GB between: the bytes of it that go between the 2 slices." in table
    assert re.search("│ +5.01 │ +0.0040 │", table)
    plan.print_results(options[1], job, facts, [apart])
    assert json.loads(capsys.readouterr().out)["between_slices_bytes"] == between
    plan.print_results(options[1], job, facts, [made])
    out = json.loads(capsys.readouterr().out)
    assert out["flops_source"] == "jaxpr" and "not understood" in out["notes"][0]
    assert out["collective_bytes"] is None and out["step_seconds"] == 7.5


def test_a_step_has_one_time(model, sound, capsys):
    """The compiler's estimate where there is one; a share of the peak of all others, marked."""
    config = asked(model, "--tokens", 9600, "--peak-tflops", 1, "--price", 2).plan
    job, _ = plan.make_job(config)
    facts = plan.describe_job(config, job)
    assumed = dataclasses.replace(sound(), name="assumed", flops_per_chip=3 * 10**11)
    timed = dataclasses.replace(assumed, name="timed", estimated_seconds=0.25)
    out = plan.plan_as_json(timed, config, job.machine)
    assert out["step_seconds"] == out["estimated_seconds"] == 0.25
    np.testing.assert_allclose(out["chip_hours"], 100 * 0.25 / 3600)
    np.testing.assert_allclose(out["cost"], 2 * out["chip_hours"])
    out = plan.plan_as_json(assumed, config, job.machine)
    assert out["step_seconds"] == 0.75 and out["estimated_seconds"] is None, "the control"

    def lines(*plans):
        plan.print_results(config, job, facts, list(plans))
        return capsys.readouterr().out

    table = lines(timed)
    assert "│ 250 ms │" in table and "step: the compiler's estimate" in table
    assert "of the published peak" not in table and "--utilisation" not in table
    table = lines(timed, assumed)
    assert "│   250 ms │" in table and "│ ≈ 750 ms │" in table
    assert "step, marked ≈: its time assumes 40 % of the published peak, 1 TFLOP/s." in table
    table = lines(assumed)
    assert "│ 750 ms │" in table and "1 TFLOP/s (--utilisation)" in table


def test_the_time_of_a_step_includes_what_runs_for_it():
    """A reference runs once a microbatch; how often a sampler runs is not known."""

    def program(runs):
        return planned.Program(
            traced=None, lowered=None, params=None, shared_bytes=0, runs_per_step=runs
        )

    def clock(seconds):
        return mock.Mock(seconds=seconds)

    programs = {planned.STEP: program(1), "reference": program(3), "sampler": program(0)}
    seconds = planned._estimated_step_seconds
    clocks = {"step": clock(2.0), "reference": clock(0.5)}
    assert seconds(programs, clocks) == 3.5
    assert seconds(programs, clocks | {"sampler": clock(9.0)}) == 3.5
    assert seconds(programs, {"step": clock(2.0)}) is None
    assert seconds(programs, clocks | {"reference": clock(None)}) is None


BAD = [
    (["--topology", "v9:4x4"], "no known machine. Pass one of v5e:"),
    (["--topology", "cpu:2x2"], "needs a number of devices"),
    (["--kernel-share", "0.4"], "--kernel-share 0.4 only affects plans for TPUs"),
    (["--link-gbytes", "45"], "--link-gbytes 45 only affects plans for TPUs"),
    (["--kernel-share", "1.5"], "--kernel-share 1.5 is no share of the peak"),
    (["--topology", "cpu:4", "--mesh", "fsdp=3"], "needs 3 devices, but there are 4"),
    (["--topology", "cpu:4", "--batch-size", "6", "--mesh", "fsdp=4"], "Pass a multiple of 4"),
    (["--seq-len", "5000"], "allows at most 4096 tokens"),
    (["--dtype", "int8"], "float32 or bfloat16"),
    (["--utilisation", "40"], "no share of the peak"),
    (["--tokens", "-1"], "a positive number"),
    (["--price", "0"], "a positive number"),
    (["--targets", "nothing_like_it"], "selects no leaf"),
    (["--model", "missing.json"], "neither a file or folder on this machine nor a hub name"),
    (["--model", "."], "config.json is missing"),
    (["--experts", "ragged"], "has no effect, because .* is not a mixture of experts"),
    (["--mem-fraction", "0.9"], "only applies to GPUs"),
    (["--mem-fraction", "90"], "no share of a GPU's memory"),
    (["--longest", "--largest-batch"], "do not work together"),
    (["--longest", "--adapters", "2"], "plan one run, but --adapters plans several"),
    (["--remat", "offload"], "the device is the host's CPU. Pass --remat full"),
    (["--remat", "products:3"], "--remat products:3 is a policy for 3 of the layers"),
    (["--init-adapter", "x"], "so --init-adapter has no effect"),
    (["--adapters", "1", "3"], "--adapters 3 does not divide --batch-size 4"),
    (["--adapters", "2", "--full"], "--adapters and --full do not go together"),
    (
        ["--adapters", "4", "--topology", "cpu:2", "--mesh", "fsdp=2"],
        "the mesh splits them into 2 parts",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input(options, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        planned_for(model, *options)


def test_encoders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a bert model, which does not generate text"):
        planned_for(write(tmp_path, tiny_encoders.fields("bert")))


def test_without_the_tpu_compiler(monkeypatch):
    from jax.experimental import topologies

    def fails(message):
        def get(**_):
            raise RuntimeError(message)

        monkeypatch.setattr(topologies, "get_topology_desc", get)

    fails("JAX TPU support not installed; cannot generate TPU topology.\nSee elsewhere")
    with pytest.raises(UserError, match=r"is not installed \(JAX TPU.*pip install -e '\.\[tpu\]'"):
        find_machine("v5e:4x4")
    fails("ABORTED: Internal error when accessing libtpu multi-process lockfile.")
    with pytest.raises(UserError, match="only one process can use"):
        find_machine("v5e:4x4")
    fails("INVALID_ARGUMENT: Topology layout is not divisible by chips_per_host_bounds")
    with pytest.raises(
        UserError, match="does not know this slice .INVALID_ARGUMENT: Topology layout"
    ):
        find_machine("v5e:3x5")


def test_a_refusal_is_a_result(model, monkeypatch):
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (38.64G) exceeds available HBM (15.75G). HLO module: step."
        "\nSee https://example.com for more details."
    )

    def refuse(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(CompiledOnce, "compile", refuse)
    _, _, made = planned_for(model)
    assert not made.fits and made.flops_per_chip is None
    sizes = made.per_chip_bytes
    assert sizes["temporaries"] == round(38.64 * 2**30)
    held = sizes["base"] + sizes["adapter"] + sizes["optimizer"]
    assert sizes["total"] == sizes["temporaries"] + held
    assert "exceeds available HBM (15.75G)" in made.refused and "https" not in made.refused


def test_other_words_of_the_compiler():
    held = {"base": 3, "adapter": 1, "optimizer": 2}
    of = parse_refused_bytes("Used 48.50G of 15.75G hbm. Exceeded", held, 7)
    assert of["total"] == round(48.5 * 2**30) and of["temporaries"] == of["total"] - 6
    unknown = parse_refused_bytes("Ran out of memory in memory space vmem", held, 7)
    assert unknown["total"] is None and unknown["base"] == 3


def test_ctrl_c_leaves_what_was_compiled(model, sound, monkeypatch, capsys):
    def plan_one(job, variant, optim):
        if variant.remat != "full":
            raise KeyboardInterrupt
        return sound()

    monkeypatch.setattr(plan, "plan", plan_one)
    with pytest.raises(SystemExit) as exit_:
        plan.main(["--model", model, "--batch-size", "2", "--seq-len", "8", "--json"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 130 and "interrupted" in err
    assert json.loads(out)["fits"] is True and json.loads(out)["others"] == []


def test_ways_stand_beside_what_is_asked_for(model):
    assert [variant.name for variant in plan.variants_to_plan(asked(model))] == [
        *("LoRA r=3, remat", "LoRA r=3, remat but dense", "LoRA r=3, no remat"),
        "full fine-tuning, remat",
    ]
    names = [
        variant.name for variant in plan.variants_to_plan(asked(model, "--full", "--remat", "none"))
    ]
    assert names[0] == "full fine-tuning, no remat" and "LoRA r=3, remat" in names
    assert len(plan.variants_to_plan(asked(model, "--alone"))) == 1


def test_every_option_of_the_plan_is_told(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    told = capsys.readouterr().out
    for field in dataclasses.fields(PlanConfig):
        switch = "no-" if field.default is True else ""
        assert f"--{switch}{field.name.replace('_', '-')}" in told


def test_gpus_are_known_by_the_name_of_their_card():
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4")
    assert topology_of_devices([card, card]) == "l4:2"
    other = SimpleNamespace(platform="gpu", device_kind="NVIDIA GTX 1080")
    assert (
        topology_of_devices([other]) is None
        and topology_of_devices(jax.devices("cpu")[:1]) == "cpu:1"
    )


@pytest.mark.slow
def test_auto_plans_the_policy_of_a_run_and_shows_the_ladder(model, capsys):
    """It is the first that fits as it is compiled; the others are planned beside it."""
    plan.run(asked(model, "--remat", "auto", "--alone", "--json"))
    out = json.loads(capsys.readouterr().out)
    assert out["name"] == "LoRA r=3, no remat" and out["others"] == []
    kept, again = out["ladder"]
    assert kept["chosen"] and kept["fits"] and kept["compiled_bytes"] > 0
    assert not again["chosen"] and again["compiled_bytes"] is again["seconds"] is None

    total = kept["compiled_bytes"]  # a byte less, and nothing is kept
    few = ("--remat", "auto", "--capacity-gib", (total - 1) / 2**30)
    plan.run(asked(model, *few, "--json"))
    out = json.loads(capsys.readouterr().out)
    names = [out["name"], *(other["name"] for other in out["others"])]
    assert names == ["LoRA r=3, remat", "LoRA r=3, no remat", "full fine-tuning, remat"]
    kept, again = out["ladder"]
    assert not kept["chosen"] and not kept["fits"] and kept["compiled_bytes"] == total
    assert again["chosen"] and again["fits"] and again["compiled_bytes"] < total


def made_up(remat, total, capacity=10, **fields):
    """A plan of a policy, which the compiler refused where no total is given."""
    refused = "RESOURCE_EXHAUSTED" if total is None else None
    fields = {"refused": refused, "failed": None, "compile_seconds": 1.0, "clocks": {}} | fields
    memory = {"total": total, "capacity": capacity}
    fits = total is not None and total <= capacity
    return SimpleNamespace(
        name=remat, per_chip_bytes=memory, fits=fits, fits_share={"1": fits}, **fields
    )


def test_the_ladder_as_a_table():
    search = RematSearch(rungs=("none", "full"), capacity=2 * GIB, first="none")
    plans = {"none": made_up("none", 3 * GIB), "full": made_up("full", GIB)}

    def attempt(remat):
        size = plans[remat].per_chip_bytes["total"]
        return Attempt(remat=remat, size=size, refused=False, seconds=1.0)

    climbed = Ladder(search=search, attempts=search.run(attempt), plans=plans)
    console = Console(file=io.StringIO(), width=120)
    print_ladder(console, climbed)
    table = console.file.getvalue()
    assert re.search(r"full \(chosen\) │ +1\.00 │", table) and re.search(r"none +│ +3\.00 │", table)
    assert "remat: full (the layers are computed again): the compiled step takes 1.00 of" in table
    assert "it may choose another policy" in table


def test_the_ladder_has_the_layers_that_fit_beside_the_last_policy(model, monkeypatch):
    """Of three layers, one more than "projections" has place for its products."""
    compiled = []

    def grown(job, variant, optim):
        compiled.append(variant.remat)
        gib = {"projections": 15, "products:1": 15.7}[variant.remat]
        return made_up(variant.name, gib * GIB, capacity=16.5 * GIB)

    expected = {"none": 18, "products": 16.6, "projections": 15, "attention": 9, "full": 8}
    sizes = {remat: int(gib * GIB) for remat, gib in (expected | {"offload": 7}).items()}
    monkeypatch.setattr(ladder, "expected_bytes", lambda *args, **rest: sizes)
    monkeypatch.setattr(ladder, "rungs_for", lambda *args: LADDER)
    options = asked(model, "--remat", "auto", "--capacity-gib", 16.5)
    job, optim = plan.make_job(options.plan)
    lines = []
    searched = ladder.search_policies(
        job, options.adapter, optim, lambda variant: grown(job, variant, optim), lines.append
    )
    assert compiled == ["projections", "products:1"] and searched.remat == "products:1"
    names = [rung.remat for rung in ladder.planned_rungs(searched)]
    assert names == ["none", "products", "products:1", *LADDER[2:]]
    chosen = plan.variants_to_plan(options, job, searched)[0]
    assert chosen.name == "LoRA r=3, remat but products of 1 layers"
    console = Console(file=io.StringIO(), width=120)
    print_ladder(console, searched)
    assert re.search(r"products:1 \(chosen\) │ +15\.70 │ +yes", console.file.getvalue())
    compiled.clear()
    for adapter, counts in ((AdapterConfig(full=True), True), (options.adapter, False)):
        ladder.search_policies(
            job, adapter, optim, lambda variant: grown(job, variant, optim), counts_layers=counts
        )
    assert compiled == ["projections"] * 2, "the control"


def test_a_plan_tells_a_failure_of_the_compiler_as_such(model, monkeypatch, capsys):
    """It says nothing about the memory, so that no other policy is compiled for it."""
    compiled = []

    def failing(job, variant, optim):
        compiled.append(variant.remat)
        return made_up(variant.remat, None, refused=None, failed="the compiler failed: INTERNAL")

    monkeypatch.setattr(plan, "plan", failing)
    with pytest.raises(UserError, match="LoRA r=3, no remat: the compiler failed: INTERNAL"):
        plan.run(asked(model, "--remat", "auto", "--alone"))
    assert compiled == ["none"]


def test_a_crash_of_the_compiler_ends_one_policy_alone(model, monkeypatch, capsys):
    """The search goes on with the next policy, and no comparison compiles the step again."""
    compiled = []

    def crashing(config, job, variant, optim):
        compiled.append(variant.name)
        if variant.remat == "none":
            raise ProcessCrash("SIGABRT")
        return real(config, job, variant, optim)

    real = plan.plan_variant
    monkeypatch.setattr(plan, "plan_variant", crashing)
    plan.run(asked(model, "--remat", "auto", "--json"))
    printed = capsys.readouterr()
    out = json.loads(printed.out)
    names = [out["name"], *(other["name"] for other in out["others"])]
    assert names == ["LoRA r=3, remat", "full fine-tuning, remat"]
    assert compiled == ["LoRA r=3, no remat", *names]
    assert "none has no step (the compiler crashed on the step)" in " ".join(printed.err.split())

    def crashes(*_):
        raise ProcessCrash("SIGABRT")

    monkeypatch.setattr(plan, "plan_variant", crashes)
    with pytest.raises(UserError, match=r"full: the compiler crashed.*Pass another policy"):
        plan.run(asked(model, "--remat", "auto", "--alone"))


def test_a_search_begins_each_size_with_the_policy_of_the_last(model, monkeypatch):
    """Here "full" takes a tenth of the memory for 256 tokens, and "none" twice as much."""
    compiled = []

    def grown(job, variant, optim):
        total = job.seq_len // 256 * (2 if variant.remat == "none" else 1) * GIB // 10
        compiled.append((job.seq_len, variant.remat))
        return made_up(variant.remat, total, capacity=GIB)

    monkeypatch.setattr(plan, "plan", grown)
    few = ("--longest", "--remat", "auto", "--seq-len", 1536, "--capacity-gib", 1)
    found, made, _ = plan.find_largest_size(asked(model, *few))
    assert found == {"1": 2560} and made.name == "full"
    assert compiled[0] == (1536, "none") and ("full" in {remat for _, remat in compiled})
    first = {}
    for size, remat in compiled:
        first.setdefault(size, remat)
    ends = {}
    for size, remat in compiled:
        ends[size] = remat
    sizes = [*first]
    for before, after in zip(sizes, sizes[1:], strict=False):
        assert first[after] == ends[before], compiled
