"""A token of decoding in plans: the bytes to read, by hand; its table, JSON and bad input."""

import dataclasses
import io
import json
import types

import pytest
from rich.console import Console

from lora_jax.quantized.rows import KERNEL_NAME
from tests.train.plan.tiny_plans import FIELDS, MIXTURE, asked, write
from train.console.errors import UserError
from train.plan import __main__ as plan
from train.plan import token as plan_of_token
from train.plan.job import abstract_params
from train.plan.machines import Machine
from train.plan.token import Token, plan_token, print_token
from train.plan.token import _bytes_read_per_token as read_bytes

ROWS, LENGTH, LAYERS, RANK = 5, 24, 3, 3
LAYER = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 2 * 32  # q, k, v, o and the norms
MLP = 3 * 32 * 56
ADAPTER, CACHE = LAYERS * RANK * (32 + 64), 2 * LAYERS * ROWS * 2 * LENGTH * 16
REST = 32 + ADAPTER + CACHE  # the last norm


def token_of(folder, fields, rows=ROWS, bandwidth=None, codes="none", more=()):
    words = ("--targets", "q_proj", "--decode-rows", rows, "--quantize", codes, *more)
    options = asked(write(folder, fields), *words)
    plan.check_options(options)
    job, _ = plan.make_job(options.plan)
    machine = dataclasses.replace(job.machine, bandwidth=bandwidth)
    job = dataclasses.replace(job, machine=machine)
    return plan_token(job, plan.variants_to_plan(options)[0], rows, options.plan.decode_adapters)


def test_bytes_by_hand(tmp_path):
    """A table that is the head is read whole; a CPU's compiler estimates no time."""
    made = token_of(tmp_path, FIELDS, bandwidth=1e6)
    assert made.bytes == 4 * (LAYERS * (LAYER + MLP) + 259 * 32 + REST)
    assert made.floor_seconds == made.bytes / 1e6 and made.seconds is None
    assert sum(group.flops for group in made.clock.groups) > 2 * ROWS * LAYERS * (LAYER + MLP)
    shown = io.StringIO()
    print_token(Console(file=shown, width=100), made)
    assert "A token of 5 rows, caches of 24 tokens" in shown.getvalue()
    known = dataclasses.replace(made, seconds=3 * made.floor_seconds)
    print_token(Console(file=shown, width=100), known)
    assert "3.00" in shown.getvalue()


@pytest.mark.slow
def test_adapters_of_the_rows(tmp_path):
    """The base alone, one adapter, and three of a bank, whose first slot is the base's."""
    base, one, three = (
        token_of(tmp_path, FIELDS, more=("--decode-adapters", n)) for n in (0, 1, 3)
    )
    coded, adapted = (
        token_of(tmp_path, FIELDS, codes="int8", more=("--decode-adapters", n)) for n in (0, 1)
    )
    assert adapted.bytes - coded.bytes == 4 * ADAPTER and coded.bytes < base.bytes
    slots = 4
    assert [made.adapters for made in (base, one, three)] == [0, 1, 3]
    assert one.bytes - base.bytes == 4 * ADAPTER
    assert three.bytes - base.bytes == 4 * slots * (ADAPTER + LAYERS)
    flops = [sum(group.flops for group in made.clock.groups) for made in (base, one, three)]
    assert flops[1] - flops[0] == 2 * ROWS * ADAPTER
    assert flops[2] - flops[0] == slots * 2 * ROWS * ADAPTER
    shown = io.StringIO()
    print_token(Console(file=shown, width=100), three)
    assert "A token of 5 rows, 3 adapters mixed, caches of 24 tokens" in shown.getvalue()


def test_adapters_that_no_row_has(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Pass --decode-rows"):
        plan.check_options(asked(write(tmp_path, FIELDS), "--decode-adapters", 2))
    with pytest.raises(UserError, match="has more arrays"):
        token_of(tmp_path, FIELDS, more=("--decode-adapters", 2, "--dora"))
    monkeypatch.setattr(plan, "plan", lambda *_: pytest.fail("compiled before the error"))
    with pytest.raises(UserError, match="has more arrays"):
        words = ("--decode-rows", 2, "--decode-adapters", 2, "--dora", "--alone")
        plan.run(asked(write(tmp_path, FIELDS), *words))


def test_weights_that_train_are_read_once(tmp_path):
    options = asked(write(tmp_path, FIELDS), "--full")
    job, _ = plan.make_job(options.plan)
    params = abstract_params(job, plan.variants_to_plan(options)[0])
    assert read_bytes(job, params, ROWS) == 4 * (LAYERS * (LAYER + MLP) + 259 * 32 + 32)


@pytest.mark.slow
def test_few_rows_choose_few_experts(tmp_path, monkeypatch):
    """One row reads two of four; a table beside a head is looked up."""
    monkeypatch.setattr("train.plan.token.clock_of", lambda *_: None)
    one, five = (token_of(tmp_path, FIELDS | MIXTURE, rows).bytes for rows in (1, 5))
    router, experts = 32 * 4, 4 * MLP
    parts = LAYERS * (LAYER + router) + 259 * 32 + 32 + ADAPTER
    assert five == 4 * (parts + LAYERS * experts + CACHE)
    assert one == 4 * (parts + LAYERS * experts // 2 + CACHE // ROWS)


@pytest.mark.slow
def test_a_plan_says_why_no_kernel_reads_the_codes(tmp_path, monkeypatch):
    """A TPU's program without a kernel gives its reason; the control has one."""
    program = ["fusion"]
    monkeypatch.setattr(plan_of_token, "optimized_hlo_of", lambda *_: program[0])
    monkeypatch.setattr(plan_of_token, "clock_of", lambda *_: None)
    monkeypatch.setattr(Machine, "platform", "tpu")
    reasons = [token_of(tmp_path, FIELDS, rows, codes="int8").without_kernel for rows in (ROWS, 33)]
    assert reasons == [
        "no kernel takes int8 in these shapes and dtypes",
        "the kernel takes 32 rows at most",
    ]
    shown = io.StringIO()
    made = Token(rows=33, cached=8, bytes=7, floor_seconds=None, without_kernel=reasons[1])
    print_token(Console(file=shown, width=200), made)
    assert "without a kernel, because the kernel takes 32 rows at most." in shown.getvalue()
    program[0] = KERNEL_NAME
    assert token_of(tmp_path, FIELDS, codes="int8").without_kernel is None


def test_json_and_bad_input(tmp_path, capsys, monkeypatch):
    model = write(tmp_path, FIELDS)
    made = Token(rows=2, cached=8, bytes=7, floor_seconds=None)
    asked_for = []
    monkeypatch.setattr(plan, "plan_token", lambda *of: asked_for.append(of[2]) or made)
    step = types.SimpleNamespace(compile_seconds=0.0)
    monkeypatch.setattr(plan, "plan", lambda *_: step)
    monkeypatch.setattr(plan, "plan_as_json", lambda *_: {})
    plan.run(asked(model, "--decode-rows", 2, "--json", "--alone"))
    out = json.loads(capsys.readouterr().out)
    assert asked_for == [2] and out["token"] == dataclasses.asdict(made)
    plan.run(asked(model, "--json", "--alone"))
    assert "token" not in json.loads(capsys.readouterr().out)
    with pytest.raises(UserError, match=r"--decode-rows 0"):
        plan.check_options(asked(model, "--decode-rows", 0))
