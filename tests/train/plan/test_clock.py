"""The compiler's estimate, read from HLO whose cycles, bytes and schedule are known by hand."""

import dataclasses
import functools
import io
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import lora_jax as lj
from lora_jax.models import Decoder, DecoderConfig
from lora_jax.models.decoder.dispatch import UNEVEN
from lora_jax.training.losses.tokens import cross_entropy, token_values
from train.console.errors import UserError
from train.plan.clock.groups import (
    ADAPTER,
    ATTENTION,
    BACKWARD,
    BASE,
    COLLECTIVES,
    COPIES,
    ELEMENTWISE,
    FORWARD,
    HEAD,
    RECOMPUTED,
    UPDATE,
    Group,
)
from train.plan.clock.read import read_clock
from train.plan.clock.summary import clock_of
from train.plan.clock.table import print_clocks
from train.plan.clock.walk import Cost
from train.plan.clock.work import NotUnderstood, work_of
from train.plan.flops.closed_form import model_flops
from train.plan.machines import Machine, with_assumptions

HLO = """HloModule jit_step, is_scheduled=true

%product (p: bf16[8,16], w: bf16[16,32]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  ROOT %dot = bf16[8,32]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/jvp(Decoder)/model/while/body/layers/mlp/gate_proj/dot_general"}
}
%part (p.1: bf16[4,8,16], i.1: s32[]) -> bf16[8,16] {
  %p.1 = bf16[4,8,16]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p.1, %i.1, %zero, %zero), \
dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%slice)
}
%body (b: (s32[], bf16[4,8,16], bf16[16,32])) -> (s32[], bf16[4,8,16], bf16[16,32]) {
  %b = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %xs = bf16[4,8,16]{2,1,0} get-tuple-element(%b), index=1
  %w.1 = bf16[16,32]{1,0} get-tuple-element(%b), index=2
  %x = bf16[8,16]{1,0} fusion(%xs, %i), kind=kLoop, calls=%part, \
backend_config={"estimated_cycles":"50"}
  COLLECTIVE
  %fusion.1 = bf16[8,32]{1,0} fusion(%x, %w.1), kind=kOutput, calls=%product, \
metadata={op_name="SCOPE"}, backend_config={"estimated_cycles":"1000"}
  DONE
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%next, %xs, %w.1)
}
%condition (c: (s32[], bf16[4,8,16], bf16[16,32])) -> pred[] {
  %c = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}
ENTRY %main (xs.1: bf16[4,8,16], w.2: bf16[16,32]) -> bf16[16,32] {
  %xs.1 = bf16[4,8,16]{2,1,0} parameter(0)
  %w.2 = bf16[16,32]{1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%start, %xs.1, %w.2)
  %loop = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) while(%init), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %w.3 = bf16[16,32]{1,0} get-tuple-element(%loop), index=2
  ROOT %norm = bf16[16,32]{1,0} tanh(%w.3), metadata={op_name="jit(step)/mul"}, \
backend_config={"estimated_cycles":"7"}
}
"""
FLOPS, SENT = 2 * 8 * 16 * 32, 2 * 16 * 32 * 2  # a device of three passes on two parts
FORWARD_SCOPE = "jit(step)/jvp(Decoder)/model/while/body/layers/mlp/gate_proj/dot_general"
GATHERED = "bf16[48,32]{1,0}"
TRIPLE = "replica_groups={{0,1,2}}"
SYNC = f"%gathered = {GATHERED} all-gather(%w.1), {TRIPLE}, dimensions={{0}}"
START = f"%all-gather-start = (bf16[16,32]{{1,0}}, {GATHERED}) all-gather-start(%w.1), {TRIPLE}"
END = f"%all-gather-done = {GATHERED} all-gather-done(%all-gather-start)"


def clock(collective="", done="", scope=FORWARD_SCOPE, link=1e9, text=HLO):
    text = text.replace("COLLECTIVE", collective).replace("DONE", done).replace("SCOPE", scope)
    return read_clock(text, 1e9, peak=1e12, link=link, memory=1e9)


def test_a_loop_counts_by_its_trips():
    made = clock()
    assert made.cost(BASE, FORWARD).seconds == pytest.approx(4 * 1000e-9, rel=1e-12)
    assert made.cost(BASE, FORWARD).flops == 4 * FLOPS == made.flops
    assert made.cost(BASE, FORWARD).bytes == 4 * 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert made.cost(COPIES).seconds == pytest.approx(4 * 50e-9, rel=1e-12)
    counters = 4 + 3 * 4  # the index of the slice, and the sum that counts the turns
    assert made.cost(COPIES).bytes == 4 * (2 * 2 * 8 * 16 + counters), "a slice, not the stack"
    assert made.cost(UPDATE).seconds == pytest.approx(7e-9, rel=1e-12)
    assert made.seconds == made.fusions == pytest.approx(4 * 1050e-9 + 7e-9, rel=1e-12)
    assert (made.uncovered, made.kernels, made.unknown) == (0, 0, {})
    of_two = clock(text=HLO.replace('"n":"4"', '"n":"2"'))
    assert of_two.cost(BASE).seconds == made.cost(BASE).seconds / 2, "the control"


@pytest.mark.parametrize(
    ("scope", "name", "phase"),
    [
        ("jit(step)/transpose(jvp(Decoder))/layers/mlp/up_proj/dot_general", BASE, BACKWARD),
        (
            "jit(step)/transpose(jvp(M))/checkpoint/rematted_computation/mlp/up_proj/dot_general",
            BASE,
            RECOMPUTED,
        ),
        ("jit(step)/jvp(Decoder)/layers/mlp/up_proj/lora/dot_general", ADAPTER, FORWARD),
        ("jit(step)/transpose(jvp(D))/mlp/up_proj/lora/dot_general", ADAPTER, BACKWARD),
        ("jit(step)/jvp()/while/body/Decoder.head/lm_head/dot_general", HEAD, FORWARD),
        ("jit(step)/jvp(D)/layers/self_attn/attention/dot_general", ATTENTION, FORWARD),
    ],
)
def test_products_belong_to_their_scope(scope, name, phase):
    """The scope of the product itself tells, not that of the fusion around it."""
    made = clock(text=HLO.replace(FORWARD_SCOPE, scope))
    assert made.cost(name, phase).flops == 4 * FLOPS
    assert made.cost(name, phase).seconds == pytest.approx(4e-6, rel=1e-12)


def test_work_without_products_belongs_to_its_own_scope():
    text = HLO.replace("jit(step)/mul", "jit(step)/jvp(Decoder)/model/norm/mul")
    assert clock(text=text).cost(ELEMENTWISE, FORWARD).seconds == pytest.approx(7e-9, rel=1e-12)
    text = HLO.replace("jit(step)/mul", "jit(step)/transpose(jvp())/exp")
    assert clock(text=text).cost(HEAD, BACKWARD).seconds == pytest.approx(7e-9, rel=1e-12)


def test_links_cost_what_no_work_covers():
    """A gather that sends 2,048 bytes takes 2,048 ns. 1,000 of them pass beside the product."""
    alone = clock(SYNC)
    assert alone.uncovered == pytest.approx(4 * SENT * 1e-9, rel=1e-12)
    assert alone.cost(COLLECTIVES).bytes == 4 * SENT
    beside = clock(START, END)
    assert beside.uncovered == pytest.approx(4 * (SENT - 1000) * 1e-9, rel=1e-9)
    assert beside.links == alone.links == pytest.approx(4 * SENT * 1e-9, rel=1e-12)
    assert beside.seconds == pytest.approx(beside.fusions + beside.uncovered, rel=1e-12)
    assert clock(START, END, link=3e9).uncovered == 0


def test_a_collective_may_be_spread_over_fusions():
    """It counts where it begins, and runs beside the fusions that carry its buffers."""
    inside = """
%NAME (q: bf16[16,32]) -> bf16[48,32] {
  %q = bf16[16,32]{1,0} parameter(0)
  ROOT %gathered.1 = bf16[48,32]{1,0} all-gather(%q), replica_groups={{0,1,2}}, dimensions={0}
}
ENTRY"""
    text = HLO
    for name in ("first", "async_collective_fusion.1", "last"):
        text = text.replace("ENTRY", inside.replace("NAME", name), 1)
    made = clock(
        "%async-collective-start = (bf16[16,32]{1,0}, bf16[48,32]{1,0}) fusion(%w.1), calls=%first",
        "%state = bf16[16,32]{1,0} get-tuple-element(%async-collective-start), index=0\n"
        "  %fusion.2 = (bf16[16,32]{1,0}, bf16[48,32]{1,0}) fusion(%state), "
        'calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"500"}\n'
        "  %state.2 = bf16[16,32]{1,0} get-tuple-element(%fusion.2), index=0\n"
        "  %async-collective-done = bf16[48,32]{1,0} fusion(%state.2), calls=%last",
        text=text,
    )
    assert made.cost(COLLECTIVES).bytes == 4 * SENT
    assert made.uncovered == pytest.approx(4 * (SENT - 1500) * 1e-9, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_products_of_a_head_in_chunks_are_in_its_group(tied):
    """Also where the table of tokens is the head as well."""
    config = dataclasses.replace(LLAMA, tie_word_embeddings=tied, num_hidden_layers=1)
    model, batch, predicted = Decoder(config), 2, 128
    shape = (batch, predicted)
    rows = dict(ids=jnp.int32, targets=jnp.int32, weights=jnp.float32, predict_at=jnp.int32)
    rows = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in rows.items()}
    init = functools.partial(model.init, jax.random.key(0))
    params = jax.eval_shape(init, rows["ids"])["params"]
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=4, alpha=8)])
    adapter, base = lj.split(tree)
    forward = lj.adapt(model.apply)

    def loss(adapter, base, rows):
        tree = lj.join(adapter, base)
        return jnp.sum(token_values(cross_entropy, forward, tree, rows, chunk=predicted))

    text = jax.jit(jax.grad(loss)).lower(adapter, base, rows).compile().as_text()
    made = read_clock(text, None)
    once = 2 * batch * predicted * LLAMA.hidden_size * LLAMA.vocab_size
    assert made.cost(HEAD, FORWARD).flops + made.cost(HEAD, BACKWARD).flops == 2 * once


def test_kernels_take_an_assumed_share_of_the_peak():
    call = (
        "%splash_mha_fwd.1 = bf16[2,8,16]{2,1,0} custom-call(%q.1, %q.1, %q.1), "
        'custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(D)/attention/call"}'
    )
    q = "%q.1 = bf16[2,8,16]{2,1,0} parameter(2)\n  "
    made = clock(q + call)
    flops = 4 * 2 * 2 * (2 * 8 * 16) * 8
    assert made.cost(ATTENTION, FORWARD).flops == flops
    assert made.kernels == pytest.approx(flops / (0.5 * 1e12), rel=1e-12)
    other = clock(q + call.replace("splash_mha_fwd", "mine"))
    assert (other.kernels, other.unknown) == (0, {"mine": 4})


SPLASH = """
%inside (q.2: bf16[2,8,16], w.4: bf16[16,32]) -> bf16[2,8,16] {
  %q.2 = bf16[2,8,16]{2,1,0} parameter(0)
  %w.4 = bf16[16,32]{1,0} parameter(1)
  %scaled = bf16[16,32]{1,0} multiply(%w.4, %w.4), metadata={op_name="jit(step)/jvp(D)/norm/mul"}
  ROOT %splash_mha_fwd.1 = bf16[2,8,16]{2,1,0} custom-call(%q.2, %q.2, %q.2), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(D)/attention/call"}
}
ENTRY"""


@pytest.mark.parametrize("target", ["tpu_custom_call", "another"])
def test_a_kernel_inside_of_a_fusion_takes_its_own_time(target):
    """In its own group, beside the cycles of the fusion; the bytes are counted once."""
    fusion = (
        "%q.1 = bf16[2,8,16]{2,1,0} constant({...})\n"
        "  %fusion.3 = bf16[2,8,16]{2,1,0} fusion(%q.1, %w.1), calls=%inside, "
        'metadata={op_name="jit(step)/jvp(D)/norm/mul"}, '
        'backend_config={"estimated_cycles":"200"}'
    )
    text = HLO.replace("ENTRY", SPLASH.replace("tpu_custom_call", target), 1)
    made, alone = clock(fusion, text=text), clock()
    is_kernel = target == "tpu_custom_call"
    flops = 4 * 2 * 2 * (2 * 8 * 16) * 8 if is_kernel else 0
    seconds = flops / (0.5 * 1e12)
    assert made.cost(ATTENTION, FORWARD).flops == flops
    assert made.cost(ATTENTION, FORWARD).seconds == pytest.approx(seconds, rel=1e-12)
    assert made.kernels == pytest.approx(seconds, rel=1e-12)
    assert made.fusions - alone.fusions == pytest.approx(4 * 200e-9, rel=1e-9)
    assert made.seconds == pytest.approx(made.fusions + made.kernels, rel=1e-12)
    arrays = 4 * 2 * (3 * 2 * 8 * 16 + 2 * 8 * 16) if is_kernel else 0  # three read, one written
    assert made.cost(ATTENTION, FORWARD).bytes == arrays


FILLED = """
%fill (f: bf16[16,32]) -> bf16[16,32] {
  %f = bf16[16,32]{1,0} parameter(0)
  ROOT %filled = bf16[16,32]{1,0} negate(%f), backend_config={"estimated_cycles":"30"}
}
%turns (t: bf16[16,32]) -> bf16[16,32] {
  %t = bf16[16,32]{1,0} parameter(0)
  ROOT %turned = bf16[16,32]{1,0} tanh(%t), backend_config={"estimated_cycles":"900"}
}
ENTRY"""


@pytest.mark.parametrize(("scope", "cycles"), [(UNEVEN, 30), ("any", 900)])
def test_of_turns_that_an_even_choice_does_not_take_the_other_branch_counts(scope, cycles):
    conditional = (
        "%is_uneven = pred[] constant(false)\n"
        "  %sums = bf16[16,32]{1,0} conditional(%is_uneven, %w.1, %w.1), "
        "true_computation=%turns, false_computation=%fill, "
        f'metadata={{op_name="jit(step)/jvp(D)/{scope}/cond"}}'
    )
    made = clock(conditional, text=HLO.replace("ENTRY", FILLED, 1))
    assert made.seconds - clock().seconds == pytest.approx(4 * cycles * 1e-9, rel=1e-9)


def test_the_memory_takes_its_own_time_for_a_group():
    """By its rate alone, gathers included, whose cycles nothing states; links take none."""
    gather = (
        "%rows = s32[6]{0} constant({...})\n"
        "  %gathered.2 = bf16[6,32]{1,0} gather(%w.1, %rows), offset_dims={1}, "
        'slice_sizes={1,32}, metadata={op_name="jit(step)/jvp(D)/experts/gather"}'
    )
    made, alone = clock(gather), clock()
    assert made.seconds == alone.seconds and made.unknown == {"gather": 4}
    group = Group(ELEMENTWISE, FORWARD)
    assert group not in alone.memory, "the control"
    assert made.memory[group] == pytest.approx(4 * 2 * 6 * 32 * 2 * 1e-9, rel=1e-12)
    product = Group(BASE, FORWARD)
    assert made.memory[product] == pytest.approx(made.groups[product].bytes * 1e-9, rel=1e-12)
    assert COLLECTIVES not in {group.name for group in clock(SYNC).memory}
    text = HLO.replace("COLLECTIVE", SYNC).replace("DONE", gather).replace("SCOPE", FORWARD_SCOPE)
    plan = clock_of(text, TPU)
    seconds = [part.memory_seconds for part in plan.groups if part.group != COLLECTIVES]
    assert plan.memory == pytest.approx(sum(seconds), rel=1e-12)
    shown = io.StringIO()
    print_clocks(Console(file=shown, width=160), TPU, [("LoRA", plan)])
    assert "ms by HBM" in shown.getvalue() and "at 1 GB/s" in shown.getvalue()
    assert clock_of(text, dataclasses.replace(TPU, clock=None)).memory is None


def test_arrays_in_a_chips_own_memory_take_no_time_of_its_main_memory():
    gather = (
        "%rows = s32[6]{0} constant({...})\n"
        "  %gathered.2 = bf16[6,32]{1,0:T(8,128)(2,1)PLACE} gather(%w.1, %rows), "
        'offset_dims={1}, slice_sizes={1,32}, metadata={op_name="jit(step)/jvp(D)/gather"}'
    )
    group, part = Group(ELEMENTWISE, FORWARD), 4 * 6 * 32 * 2
    main, own = (clock(gather.replace("PLACE", place)) for place in ("", "S(1)"))
    assert main.groups[group].bytes == own.groups[group].bytes == 2 * part
    assert main.memory[group] == pytest.approx(2 * part * 1e-9, rel=1e-12)
    assert own.memory[group] == pytest.approx(part * 1e-9, rel=1e-12), "it is read, not written"
    # A copy that brings an array to the chip's own memory reads it.
    copy = (
        "%copy-start = (bf16[16,32]{1,0:S(1)}, bf16[16,32]{1,0}, u32[]) copy-start(%w.1), "
        'metadata={op_name="jit(step)/jvp(D)/mul"}'
    )
    moved, alone = clock(copy), clock()
    assert moved.seconds == alone.seconds
    copies = Group(COPIES, FORWARD)
    assert moved.memory[copies] == pytest.approx(4 * 16 * 32 * 2 * 1e-9, rel=1e-12)
    assert copies not in alone.memory, "the control"


def test_calls_of_cublas_are_products():
    """As XLA wrote one, for an H100: the batch axis of the operands comes first."""
    call = (
        "%left = bf16[4,6,16]{2,1,0} constant({...})\n  "
        "%right = bf16[4,16,32]{2,1,0} constant({...})\n"
        "  %matmul = (bf16[4,6,32]{2,1,0}, s8[64]{0}) custom-call(%left, %right), "
        'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(D)/up_proj"}, '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
        '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
    )
    with_product = clock(call).cost(BASE, FORWARD).flops
    assert with_product - clock().cost(BASE, FORWARD).flops == 4 * 2 * 4 * 6 * 16 * 32
    other = call.replace("__cublas$lt$matmul", "another")
    assert clock(other).cost(BASE, FORWARD).flops == clock().cost(BASE, FORWARD).flops


def test_without_a_clock_there_are_flops_and_bytes():
    """The compiler of this CPU estimates nothing."""
    shape = jax.ShapeDtypeStruct((24, 24), jnp.float32)
    text = jax.jit(lambda a, b: jnp.tanh(a @ b) @ b).lower(shape, shape).compile().as_text()
    made = read_clock(text, None)
    assert made.flops == work_of(text).flops == 2 * 2 * 24**3
    assert made.seconds == 0 and made.cost(BASE).bytes > 0
    with pytest.raises(NotUnderstood):
        read_clock("HloModule nothing")


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_conditional_the_costliest_branch_counts(turned):
    """Also where nothing has seconds: of a step, that updates or skips, the update."""
    shape = jax.ShapeDtypeStruct((24, 24), jnp.float32)
    sides = [lambda x: jnp.tanh(x @ x) @ x, lambda x: x]

    def step(is_good, x):
        return jax.lax.cond(is_good, *(reversed(sides) if turned else sides), x)

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((), bool), shape).compile().as_text()
    assert "conditional(" in text
    assert read_clock(text, None).flops == work_of(text).flops == 2 * 2 * 24**3


# A step of two scanned layers, whose products are counted by hand.

LAYERS, TOKENS, WIDTH, INNER, RANK = 2, 24, 40, 56, 3
PARAMS = {
    "up_proj": {"kernel": jax.ShapeDtypeStruct((LAYERS, WIDTH, INNER), jnp.float32)},
    "down_proj": {"kernel": jax.ShapeDtypeStruct((LAYERS, INNER, WIDTH), jnp.float32)},
}


def layers(params, x, remat):
    def layer(x, kernels):
        with jax.named_scope("up_proj"):
            inner = x @ kernels["up_proj"]["kernel"]
        with jax.named_scope("down_proj"):
            return x + jnp.tanh(inner) @ kernels["down_proj"]["kernel"], None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params)[0]


@functools.cache
def step_clock(remat):
    rules = [lj.LoraRule(targets=["up_proj", "down_proj"], rank=RANK)]
    adapter, base = lj.split(lj.lorafy(PARAMS, rules))
    forward = lj.adapt(functools.partial(layers, remat=remat))

    def loss(adapter, base, x):
        return jnp.sum(forward(lj.join(adapter, base), x) ** 2)

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    return read_clock(jax.jit(jax.grad(loss)).lower(adapter, base, x).compile().as_text(), None)


def test_groups_have_the_flops_counted_by_hand():
    """Forward, and for the gradients of inputs, of A and of B."""
    made = step_clock(remat=True)
    base = LAYERS * 2 * 2 * TOKENS * WIDTH * INNER
    factors = LAYERS * 2 * 2 * TOKENS * RANK * (WIDTH + INNER)
    assert made.cost(BASE, FORWARD).flops == base
    assert made.cost(BASE, BACKWARD).flops == base
    assert made.cost(ADAPTER, FORWARD).flops == factors
    assert made.cost(ADAPTER, BACKWARD).flops == 2 * factors
    assert 0 < made.cost(BASE, RECOMPUTED).flops <= base
    assert 0 < made.cost(ADAPTER, RECOMPUTED).flops <= factors
    assert sum(made.cost(name).flops for name in (BASE, ADAPTER)) == made.flops
    kept = step_clock(remat=False)
    assert kept.cost(BASE, RECOMPUTED) == kept.cost(ADAPTER, RECOMPUTED) == Cost(), "the control"
    assert kept.cost(BASE, FORWARD).flops == kept.cost(BASE, BACKWARD).flops == base


LLAMA = DecoderConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
KERNELS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112)


@pytest.mark.parametrize(("full", "times"), [(False, 4), (True, 6)])
def test_the_flops_that_a_step_needs(full, times):
    """4ND for adapters and 6ND in full, with the head's predictions; pairs of attention thrice."""
    plain = jax.eval_shape(lambda: Decoder(LLAMA).init(jax.random.key(0), jnp.ones((1, 2), int)))
    rules = lj.TrainRule(targets=".*") if full else lj.LoraRule(targets="all-linear", rank=2)
    params = lj.lorafy(plain["params"], [rules])
    needed = model_flops(LLAMA, params, batch=2, seq=10, predicted=6)
    attention = 3 * 4 * 2 * 3 * 64 * 55  # thrice 4 x rows x layers x width x pairs
    assert needed == times * (2 * 10 * KERNELS + 2 * 6 * 64 * 1000) + attention
    near = dataclasses.replace(LLAMA, sliding_window=4, windowed_layers=(0, 1, 2))
    pairs = 4 * 5 // 2 + 6 * 4
    with_windows = model_flops(near, params, batch=2, seq=10, predicted=6)
    assert needed - with_windows == 3 * 4 * 2 * 3 * 64 * (55 - pairs)


TPU = dataclasses.replace(
    Machine("v5e:2x1", (types.SimpleNamespace(platform="tpu"),) * 2, 2**34, 1e12),
    clock=1e9,
    link=1e9,
    bandwidth=1e9,
    kernel_share=0.5,
)


def test_a_plan_tells_the_share_of_the_peak():
    text = HLO.replace("COLLECTIVE", START).replace("DONE", END).replace("SCOPE", FORWARD_SCOPE)
    made = clock_of(text, TPU, model_flops=1000)
    assert made.mfu == pytest.approx(1000 / (2 * 1e12 * made.seconds), rel=1e-12)
    assert made.seconds == pytest.approx(made.fusions + made.kernels + made.uncovered, rel=1e-12)
    assert sum(part.seconds for part in made.groups) == pytest.approx(made.seconds, rel=1e-12)
    faster = clock_of(text, with_assumptions(TPU, None, 100.0))
    assert faster.seconds < made.seconds and faster.mfu is None
    assert clock_of("HloModule other", TPU) is None
    on_gpu = clock_of(text, dataclasses.replace(TPU, clock=None), model_flops=1000)
    assert on_gpu.seconds is on_gpu.mfu is None and on_gpu.groups[0].flops == 4 * FLOPS
    shown = io.StringIO()
    print_clocks(Console(file=shown, width=120), TPU, [("LoRA", made), ("other", None)])
    assert f"{1e3 * made.uncovered:,.1f}" in shown.getvalue()
    assert "never measured on a chip" in shown.getvalue() and "--link-gbytes" in shown.getvalue()


def test_assumptions_without_an_effect_are_errors():
    with pytest.raises(
        UserError, match=r"--kernel-share 0.4 and --link-gbytes 3 only affects plans for TPUs"
    ):
        with_assumptions(dataclasses.replace(TPU, clock=None), 0.4, 3.0)
    assert with_assumptions(TPU, 0.4, None) == dataclasses.replace(TPU, kernel_share=0.4)


def test_the_largest_number_of_cycles_is_no_estimate():
    made = clock(text=HLO.replace('"estimated_cycles":"1000"', f'"estimated_cycles":"{2**63 - 1}"'))
    assert made.seconds == pytest.approx(clock().seconds - 4 * 1000e-9, rel=1e-12)
    assert made.unknown == {"fusion": 4}
