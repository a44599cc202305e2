"""Attention sharded over a mesh: each device's part against dense attention on one device."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cases.attention import AttentionShape
from lora_jax.models.layers.attend import attend
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.masks import Mask, MaskTokens, Split
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from tests.models import tiny
from tests.support import AS_FOR_USERS, assert_close, draw, over
from train.plan.clock.work import work_of
from train.processes.mesh import make_mesh

BLOCKS = Blockwise(block=3, spans=4)
ALL = {"packed": True, "window": 3, "padding": "right", "cap": 1.5, "scale": 0.9, "sinks": True}


def layout_of(text: str) -> Layout:
    """A layout on as many devices as its mesh needs."""
    size = math.prod(int(part.split("=")[1]) for part in text.split(","))
    return Layout(make_mesh(text, 4, jax.devices()[:size]), ())


def differentiated(case: AttentionShape, layout: Layout, how: Any, **options: Any) -> Any:
    """Values and gradients of what the queries that see anything give."""
    mask, arrays = case.mask(), case.arrays()
    looks = np.asarray(mask.visible()).any(-1)[..., None, None]
    cotangent = jnp.where(looks, draw(4, arrays[0].shape), 0.0)

    def run(arrays: Any, mask: Mask) -> Any:
        *given, sinks = arrays
        out = attend(
            AttentionInputs(*given, mask, case.scale, case.cap, sinks), attention=how, **options
        )
        return jnp.sum(out * cotangent), jnp.where(looks, out, 0.0)

    gradient = jax.value_and_grad(run, has_aux=True)
    with jax.set_mesh(layout.mesh):
        (_, out), got = jax.jit(gradient, compiler_options=tiny.FAST_COMPILE)(
            (*arrays, case.head_sinks()), mask
        )
    return out, *(x for x in got if x is not None)


CASES = [
    ("sequence=4", AttentionShape(32, **ALL), BLOCKS),
    ("data=2,sequence=2", AttentionShape(24, causal=False, padding="left"), BLOCKS),
    (
        "sequence=2,tensor=2",
        AttentionShape(24, kv_heads=1, group=4, sinks=True),
        BLOCKS,
    ),  # keys are repeated
    ("sequence=4", AttentionShape(24, window=5), "dense"),
    ("sequence=4", AttentionShape(20, window=4), BLOCKS),  # no multiple of 8: nothing is exchanged
    ("sequence=4", AttentionShape(18), BLOCKS),  # no multiple of 4: each device has the row
    ("fsdp=2,sequence=2", AttentionShape(20, packed=True), BLOCKS),
    ("sequence=2,tensor=2", AttentionShape(24, padding="left"), BLOCKS),
    ("tensor=4", AttentionShape(10, kv_heads=3, group=1, **ALL), BLOCKS),  # heads stay whole
    ("fsdp=2,tensor=2", AttentionShape(10, slots=31, padding="left"), BLOCKS),
]


@over(("text", "case", "how"), CASES, often=[str(CASES[1])], called=str)
def test_devices_compute_what_one_does(text: str, case: AttentionShape, how: Any) -> None:
    layout = layout_of(text)
    want = differentiated(case, layout, "dense")
    assert_close(differentiated(case, layout, how, placement=layout), want, 1e-5)
    assert all(np.abs(x).max() > 1e-2 for x in want)


def test_a_local_function_gets_a_device_s_part() -> None:
    """Its queries, heads and batch; all keys; numbers as numbers; and which queries those are."""
    case, seen = AttentionShape(24, batch=2, kv_heads=2), []

    def local(q: Any, k: Any, v: Any, mask: Mask, scale: Any, cap: Any) -> Any:
        seen.append((q.shape, k.shape, mask, scale, cap))
        place = jax.lax.axis_index("sequence")
        expected = jnp.asarray(mask.split.slots(case.seq))[place]
        return q * jnp.all(mask.queries.slots == expected)

    layout = layout_of("sequence=2,tensor=2")
    q, k, v = case.arrays()
    with jax.set_mesh(layout.mesh):
        call = jax.jit(lambda *arrays: layout.attention(local)(*arrays, case.mask(), 0.3, 2.0))
        np.testing.assert_array_equal(call(q, k, v), q)  # what is exchanged comes back
    (of_q, of_k, mask, scale, cap) = seen[0]
    assert of_q == (2, 12, 3, 7) and of_k == (2, 24, 1, 7) and (scale, cap) == (0.3, 2.0)
    assert mask.split == Split("sequence", 2, paired=True) and not mask.aligned
    assert mask.keys.positions.shape == (2, 24) and mask.queries.positions.shape == (2, 12)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_queries_of_all_devices_see_as_many_keys(parts: int) -> None:
    slots = Split("sequence", parts, paired=True).slots(48)
    assert sorted(slots.flat) == list(range(48))
    assert len({int(np.sum(row + 1)) for row in slots}) == 1


@pytest.mark.slow
def test_derivatives_of_other_kinds() -> None:
    """Forward mode, and the gradient of rematerialised layers in a scan."""
    case, layout = AttentionShape(16), layout_of("sequence=4")
    mask, (q, k, v) = case.mask(), case.arrays()
    along = draw(9, q.shape)

    def layers(how: Any, q: Any, **options: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, _: None) -> tuple[Any, None]:
            return x + attend(AttentionInputs(x, k, v, mask), attention=how, **options), None

        return jax.lax.scan(layer, q, None, length=2)[0]

    def both(how: Any, **options: Any) -> Any:
        run = functools.partial(layers, how, **options)
        with jax.set_mesh(layout.mesh):
            forward = jax.jit(lambda q: jax.jvp(run, (q,), (along,)))(q)
            return forward, jax.jit(jax.grad(lambda q: jnp.sum(run(q) ** 2)))(q)

    assert_close(both(BLOCKS, placement=layout), both("dense"), 1e-5)


# Sizes of a layer; attention alone, on abstract shapes.
HEADS, KV_HEADS, HEAD_DIM, PARTS = 3, 1, 8, 4


def compiled(how: Any, seq: int, *, causal: bool = True) -> jax.stages.Compiled:
    """The gradient of a device's part of attention over so many tokens."""
    layout = layout_of(f"sequence={PARTS}")

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        slots = jnp.arange(seq, dtype=jnp.int32)
        tokens = MaskTokens(slots, slots[None], segments)
        mask = Mask(queries=tokens, keys=tokens, window=seq // 2, causal=causal, aligned=True)
        return jnp.sum(attend(AttentionInputs(q, k, v, mask), attention=how, placement=layout) ** 2)

    where = jax.NamedSharding(layout.mesh, jax.P(None, "sequence"))
    arrays = [
        jax.ShapeDtypeStruct((1, seq, heads, HEAD_DIM), jnp.float32, sharding=where)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    segments = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    with jax.set_mesh(layout.mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segments)
        return lowered.compile(compiler_options=AS_FOR_USERS)


@pytest.mark.slow
def test_no_device_has_a_score_for_each_pair() -> None:
    """Nor for each of its own queries and all keys; and its memory grows with the length."""
    few, many = 512, 4096

    def largest(program: jax.stages.Compiled) -> int:
        shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", program.as_text())
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    def memory(program: jax.stages.Compiled) -> int:
        return program.memory_analysis().temp_size_in_bytes

    ours, theirs = (
        [compiled(how, seq) for seq in (few, many)] for how in (Blockwise(block=16), "dense")
    )
    assert largest(ours[1]) < 0.5 * many**2 / PARTS
    assert largest(theirs[1]) >= HEADS * many**2 / PARTS, "the control"
    growth = [memory(long) / memory(short) for short, long in (ours, theirs)]
    print(f"growth with eight times the tokens: {growth[0]:.1f}, dense {growth[1]:.1f}")
    assert growth[0] < 9
    assert growth[1] > 50, "the control"


@pytest.mark.slow
def test_a_causal_row_costs_a_device_half() -> None:
    """One program without a choice runs on all devices, so that each does as much."""
    seq, blocks = 128, Blockwise(block=16)
    causal, all_pairs = (compiled(blocks, seq, causal=causal) for causal in (True, False))
    ours, whole = (work_of(program.as_text()).flops for program in (causal, all_pairs))
    print(f"{ours / whole:.3f} of the products")
    assert "conditional" not in causal.as_text()
    assert ours <= 0.6 * whole
    split = Split("sequence", PARTS, paired=True)
    assert ours / whole == pytest.approx(blocks.pairs(seq, split) / seq**2, rel=1e-3)


def test_rows_that_cannot_be_split() -> None:
    layout = layout_of("sequence=4")
    layout.check_lengths([12])
    with pytest.raises(TrainingError, match=r"sequence=4, .* rows of 18 tokens. .* of 8"):
        layout.check_lengths([18])
    with pytest.raises(
        TrainingError, match=r"rows of 18, 22 tokens. .* packing=True gives all rows one"
    ):
        layout.check_lengths([12, 18, 22])
    assert layout.split(16).paired and not layout.split(12).paired and layout.split(18) is None
    assert dataclasses.replace(layout, mesh=layout_of("data=4").mesh).split(16) is None
