"""Tokens go to the devices of their experts: numbers as on one device, and no kernel moves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cases.mixtures import choose_experts, gated
from lora_jax.cases.sharded import make_layout
from lora_jax.models.decoder.dispatch import UNEVEN
from lora_jax.models.decoder.experts import implementation
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.training import exchange
from lora_jax.training.layout import Layout
from lora_jax.training.mesh import make_mesh
from tests.models import tiny
from tests.support import array, assert_close, lorafied, with_random_factors
from train.plan.clock.work import NotUnderstood, work_of
from train.plan.flops.checked import step_work
from train.plan.flops.jaxpr import Count, count_flops

pytestmark = pytest.mark.slow

EXPERTS, WIDTH, INNER, CHOSEN = 8, 12, 10, 2
BATCH, SEQ = 4, 18
NAMES = ("gate", "up", "down")


@functools.cache
def case(choice):
    """An adapter and its base, and the arguments of a mixture whose tokens choose so."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return array(rng.normal(size=shape), jnp.float32)

    params = {name: {"kernel": normal(EXPERTS, WIDTH, INNER)} for name in NAMES[:2]}
    params["down"] = {"kernel": normal(EXPERTS, INNER, WIDTH)}
    base = lj.quantized.quantize(params, "int8") if choice == "codes" else params
    rule = lj.LoraRule(targets=list(NAMES), rank=3, alpha=7, bias_on_b=choice == "a bias on B")
    tree = with_random_factors(lorafied(base, [rule]))
    chosen = array(choose_experts(choice, EXPERTS, (BATCH, SEQ, CHOSEN)))
    return tree, normal(BATCH, SEQ, WIDTH), jax.nn.softmax(normal(BATCH, SEQ, CHOSEN)), chosen


def lowered(tree, x, weights, chosen, experts, layout=None):
    """The sum of squares of a mixture, and its gradients, for a mesh or for one device."""
    mixed = make_mixture(gated, implementation(experts))
    mixed = mixed if layout is None else layout.mixture(mixed)

    def fn(tree, x, weights):
        kernels = tuple(tree[name]["kernel"] for name in NAMES)
        return mixed(x, weights, chosen, kernels, ())

    def loss(adapter, base, x, weights):
        out = lj.adapt(fn, strict=True)(lj.join(adapter, base), x, weights)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True))
    if layout is None:
        return run.lower(*lj.split(tree), x, weights).compile(), lj.split(tree)
    halves = lj.split(layout.placed(tree))
    with jax.set_mesh(layout.mesh):
        return run.lower(*halves, x, weights).compile(), halves


def layout_of(**sizes):
    return make_layout(jax.devices()[: int(np.prod([*sizes.values()]))], **sizes)


CASES = [
    ({"expert": 2, "tensor": 2}, "one part", "ragged", 1),
    ({"data": 2, "expert": 2}, "one part of some", "blocks", 3),
    ({"expert": 2, "tensor": 2}, "a bias on B", "blocks", 3),
    ({"expert": 2, "tensor": 2}, "a bias on B", "ragged", 1),
    ({"expert": 4}, "one part", "blocks", 3),
    ({"fsdp": 2, "expert": 2}, "codes", "blocks", 1),
]


@pytest.mark.parametrize(("sizes", "choice", "experts", "chunks"), CASES, ids=str)
def test_numbers_are_those_of_one_device(sizes, choice, experts, chunks, monkeypatch):
    """Values and gradients, all tokens on one device's experts included."""
    tree, x, weights, chosen = case(choice)
    layout = layout_of(**sizes)
    shares = layout.mesh.shape["expert"]
    size = shares * x.nbytes // layout.batch_parts
    monkeypatch.setattr(exchange, "CHUNK_BYTES", size // chunks)
    there, halves = lowered(tree, x, weights, chosen, experts, layout)
    assert not waits(there.as_text()), "devices would wait for those with an even choice"
    alone, whole = lowered(tree, x, weights, chosen, experts)
    assert_close(there(*halves, x, weights), alone(*whole, x, weights), 5e-5)


def waits(text):
    """The collectives of turns that run only where tokens choose experts unevenly."""
    sends = re.compile(r" (all-reduce|all-gather|reduce-scatter)(-start)?\(")
    return [line for line in text.splitlines() if UNEVEN in line and sends.search(line)]


def kernels_in(text):
    """The numbers of experts of the arrays that hold several experts' kernels."""
    shapes = re.findall(rf"\[(\d+),(?:{WIDTH},{INNER}|{INNER},{WIDTH})\]", text)
    return {int(n) for n in shapes}


def test_kernels_stay_and_a_plan_counts_an_even_choice(monkeypatch):
    """No device has the kernels of others; turns for an uneven choice are not counted."""
    text, gathered, alone = (
        lowered(*case("even"), "blocks", layout)[0].as_text()
        for layout in (layout_of(expert=4), layout_of(fsdp=4), None)
    )
    assert max(kernels_in(text)) == EXPERTS // 4
    assert max(kernels_in(gathered)) == EXPERTS, "the control"
    flops = work_of(text).flops
    assert flops < 0.6 * work_of(alone).flops
    (note,) = step_work(text, None, 4).notes
    assert "equally often" in note
    monkeypatch.setattr("train.plan.clock.walk.UNEVEN", "no such scope")
    with pytest.raises(NotUnderstood):  # the control
        work_of(text)


def test_turns_of_a_loop_are_those_of_an_even_choice(monkeypatch):
    """A loop over further turns has none as a rule, and its scope says so."""
    shape = jax.ShapeDtypeStruct((24, 24), jnp.float32)

    def step(n_turns, x):
        total = x @ x
        with jax.named_scope(UNEVEN):
            return jax.lax.fori_loop(0, n_turns, lambda _, total: total @ x, total)

    lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((), jnp.int32), shape)
    text = lowered.compile().as_text()
    assert work_of(text).flops == 2 * 24**3
    traced = jax.make_jaxpr(step)(3, jnp.ones((24, 24)))
    assert count_flops(traced) == Count(2 * 24**3)
    monkeypatch.setattr("train.plan.clock.walk.UNEVEN", "no such scope")
    monkeypatch.setattr("train.plan.flops.jaxpr.UNEVEN", "no such scope")
    with pytest.raises(NotUnderstood):
        work_of(text)
    assert count_flops(traced) == Count(2 * 2 * 24**3, exact=False), "the control"


def test_a_family_routes_as_on_one_device():
    """DeepSeek-V3, whose router knows groups, with two parts of its experts."""
    model, params = tiny.decoder("deepseek v3")
    layout = Layout.of(make_mesh(jax.devices()[:4], expert=2, tensor=2), model.config)
    ids = tiny.tokens(1, 4, 6)
    placed = layout.placed(params)
    with jax.set_mesh(layout.mesh):
        ours = jax.jit(layout.constrained(model).apply)({"params": placed}, ids)
    assert_close(ours, jax.jit(model.apply)({"params": params}, ids), 1e-4)


def test_quantized_experts_of_stacked_layers():
    """Codes of a layer's experts come out of the stack before devices divide them."""
    model, params = tiny.decoder("qwen3 moe")
    params = lj.quantized.quantize(params, "int8")
    rule = lj.LoraRule(targets=["q_proj", "v_proj"], rank=3, alpha=7)
    tree = with_random_factors(lorafied(params, [rule]))
    layout = Layout.of(make_mesh(jax.devices()[:4], expert=2, fsdp=2), model.config)
    ids = tiny.tokens(1, 4, 6)

    def outputs(model, tree):
        adapter, base = lj.split(tree)

        def loss(adapter):
            logits = lj.adapt(model.apply)({"params": lj.join(adapter, base)}, ids)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)

    with jax.set_mesh(layout.mesh):
        ours = outputs(layout.constrained(model), layout.placed(tree))
    assert_close(ours, outputs(model, tree), 1e-4)


@pytest.mark.parametrize("prefix", [exchange.SUMMED_OVER, "another_name_"])
def test_a_block_forms_its_own_expert_alone(prefix, monkeypatch):
    """No array has `down` of several experts as floats; the control has one."""
    monkeypatch.setattr(exchange, "SUMMED_OVER", prefix)
    tree, x, weights, chosen = case("codes")
    layout = layout_of(expert=2)
    mixed = layout.mixture(make_mixture(gated, implementation("blocks")))

    def fn(tree, x, weights):
        return mixed(x, weights, chosen, tuple(tree[name]["kernel"] for name in NAMES), ())

    with jax.set_mesh(layout.mesh):
        text = str(jax.make_jaxpr(lj.adapt(fn, strict=True))(tree, x, weights))
    formed = re.findall(rf"f32\[{EXPERTS // 2},{INNER},{WIDTH}\]", text)
    assert bool(formed) == (prefix == "another_name_")
