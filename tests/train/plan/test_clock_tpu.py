"""The compiler's estimate of two layers of Llama-3.1-8B's MLP on v5e (extra `tpu`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.training.sharded_products import COMPILER_OPTIONS
from tests.train.plan.test_clock import layers
from tests.train.plan.tiny_plans import FIELDS, asked, planned_for, write
from train.console.errors import UserError
from train.plan import __main__ as planning
from train.plan.clock.groups import ADAPTER, BACKWARD, BASE, COLLECTIVES, FORWARD, RECOMPUTED
from train.plan.clock.read import read_clock
from train.plan.clock.walk import Cost
from train.plan.clock.work import work_of
from train.plan.machines import KINDS, find_machine

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]

LAYERS, TOKENS, WIDTH, INNER, RANK = 2, 2048, 4096, 14336, 16
PEAK = KINDS["v5e"].flops


@functools.cache
def lowered(chips, remat):
    """The gradient of two scanned layers: a row a chip, and the kernels sharded over chips."""
    mesh = Mesh(np.array(find_machine("v5e:2x2").devices[:chips]), ("fsdp",))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        name: {"kernel": array((LAYERS, *sizes), jnp.bfloat16, None, "fsdp")}
        for name, sizes in (("up_proj", (WIDTH, INNER)), ("down_proj", (INNER, WIDTH)))
    }
    rules = [lj.LoraRule(targets=list(params), rank=RANK)]
    adapter, base = lj.split(lj.lorafy(params, rules))
    adapter, base = (
        jax.tree.map(lambda x: x if x.sharding else array(x.shape, x.dtype), half)
        for half in (adapter, base)
    )
    forward = lj.adapt(functools.partial(layers, remat=remat))

    def loss(adapter, base, x):
        return jnp.sum(forward(lj.join(adapter, base), x).astype(jnp.float32) ** 2)

    x = array((chips * TOKENS, WIDTH), jnp.bfloat16, "fsdp")
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(adapter, base, x)


def test_cycles_of_products_are_near_their_flops_at_peak():
    """And equal in two compilations; without rematerialisation, nothing is recomputed."""
    made, again = (read_clock(lowered(1, True).compile().as_text()) for _ in range(2))
    base = LAYERS * 2 * 2 * TOKENS * WIDTH * INNER
    factors = LAYERS * 2 * 2 * TOKENS * RANK * (WIDTH + INNER)
    for phase in (FORWARD, BACKWARD):
        assert made.cost(BASE, phase).flops == base
        assert base / PEAK <= made.cost(BASE, phase).seconds <= 1.25 * base / PEAK
    assert made.cost(ADAPTER, FORWARD).flops == factors
    assert made.cost(ADAPTER, BACKWARD).flops == 2 * factors
    assert made.cost(BASE, RECOMPUTED).seconds > 0
    assert (made.uncovered, made.kernels, made.cost(COLLECTIVES)) == (0, 0, Cost())
    assert again == made
    kept = read_clock(lowered(1, False).compile().as_text())
    assert kept.cost(BASE, RECOMPUTED) == Cost(), "the control"
    assert kept.fusions < made.fusions


def test_the_time_of_a_step_is_the_estimate(tmp_path):
    """A plan has one time; a share of the peak is an error, because it would have no effect."""
    model = write(tmp_path, FIELDS)
    on_tpu = ("--topology", "v5e:1x1", "--dtype", "bfloat16", "--tokens", 9600)
    _, _, made = planned_for(model, *on_tpu)
    out = planning.plan_as_json(made, asked(model, *on_tpu).plan, find_machine("v5e:1x1"))
    assert out["step_seconds"] == out["clocks"]["step"]["seconds"] > 0
    assert out["chip_hours"] == pytest.approx(100 * out["step_seconds"] / 3600, rel=1e-12)
    with pytest.raises(UserError, match=r"--utilisation 0.5 has no effect, because the compiler"):
        planning.make_job(asked(model, *on_tpu, "--utilisation", 0.5).plan)


def test_links_of_four_chips_carry_what_is_sent():
    """At 90 GB/s, a collective takes as long as its bytes. Faster links leave less to wait for."""
    text = lowered(4, True).compile().as_text()
    made, work = read_clock(text), work_of(text)
    assert made.cost(COLLECTIVES).bytes == work.sent_bytes > 0
    np.testing.assert_allclose(made.links, work.sent_bytes / (2 * KINDS["v5e"].link), rtol=1e-9)
    assert 0 < made.uncovered <= made.links
    fast = read_clock(text, link=1e15)
    assert fast.uncovered < 1e-3 * made.uncovered and fast.fusions == pytest.approx(made.fusions)


def test_whole_products_take_less_time_than_windowed_ones():
    """Two products of 512 tokens a chip with kernels that 16 chips share."""
    mesh = Mesh(np.array(find_machine("v5e:4x4").devices), ("fsdp",))
    rows = NamedSharding(mesh, P("fsdp"))

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def mlp(x, up, down):
        inner = jax.lax.with_sharding_constraint(x @ up, rows)
        return inner @ down

    up, down = array((WIDTH, INNER), "fsdp"), array((INNER, WIDTH), None, "fsdp")
    program = jax.jit(mlp, out_shardings=rows).lower(array((16, 512, WIDTH), "fsdp"), up, down)
    made, sent = {}, {}
    for form, options in COMPILER_OPTIONS.items():
        text = program.compile(compiler_options=options).as_text()
        made[form], sent[form] = read_clock(text), work_of(text).sent
    assert "collective-permute" in sent["windowed"], "the control"
    assert list(sent["whole"]) == ["all-gather"]
    assert sent["whole"]["all-gather"] <= sum(sent["windowed"].values())
    assert made["whole"].fusions <= 0.5 * made["windowed"].fusions
    assert made["whole"].seconds < made["windowed"].seconds
