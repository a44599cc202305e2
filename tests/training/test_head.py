"""The head in chunks: gathered once, its derivatives, and the rows that go through it at a time."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import Decoder, DecoderConfig
from lora_jax.training.layout import Layout, make_mesh
from lora_jax.training.losses import predictions_at_once, token_values
from lora_jax.training.losses.tokens import cross_entropy
from tests.models import tiny
from tests.support import array, assert_close, lorafied, over, with_random_factors
from tests.training.test_losses import bag, batch, lora, total
from train.plan.clock.work import work_of
from train.plan.job import placed_shapes
from train.plan.machines import find_machine

ROWS = 8  # two on each of four devices
HEADS = {  # the rules, and whether the table of words is the head
    "frozen": ([lora("q_proj")], False),
    "tied": ([lora("q_proj")], True),
    "adapted": ([lora("lm_head")], False),
}


class InTheLoop(Layout):
    """Leaves it to XLA where the head is gathered."""

    def head_shardings(self, params):
        return None


def gradient(model, layout, base, chunk):
    """The gradient of a loss, for the adapter and a batch."""
    forward = lj.adapt(layout.constrained(model).apply)

    def loss(adapter, data):
        return total(forward, lj.join(adapter, base), data, **layout.chunks(chunk))

    return jax.value_and_grad(loss)


def outer_constraints(jaxpr, shape):
    """Counts the constraints on arrays of a shape: outside of loops, and inside."""
    outer = inner = 0
    for eqn in jaxpr.eqns:
        outer += eqn.primitive.name == "sharding_constraint" and eqn.outvars[0].aval.shape == shape
        for value in eqn.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                a, b = outer_constraints(getattr(value, "jaxpr", value), shape)
                outer, inner = outer + (eqn.primitive.name != "scan") * a, inner + b
                inner += (eqn.primitive.name == "scan") * a
    return outer, inner


@over("case", HEADS, often=[])
def test_the_head_is_gathered_before_the_loop(case):
    rules, tied = HEADS[case]
    model, plain = tiny.decoder("smollm2" if tied else "llama2")
    layout = Layout.of(make_mesh(jax.devices()[:4], fsdp=4), model.config)
    adapter, base = lj.split(layout.placed(with_random_factors(lorafied(plain, rules))))
    data = {name: np.tile(x[:2], (ROWS // 2, 1)) for name, x in batch().items()}
    data = layout.batch(data, parts=False)
    shape = (61, 24) if tied else (24, 61)
    with jax.set_mesh(layout.mesh):
        step = jax.jit(gradient(model, layout, base, chunk=2)).trace(adapter, data)
        assert outer_constraints(step.jaxpr.jaxpr, shape) == (1, 0)
        one = jax.jit(gradient(model, layout, base, chunk=0))
        assert_close(step.lower().compile()(adapter, data), one(adapter, data), 1e-6)
        left = InTheLoop(layout.mesh, layout.table)
        control = jax.jit(gradient(model, left, base, chunk=2)).trace(adapter, data)
    assert outer_constraints(control.jaxpr.jaxpr, shape) == (0, 0)


@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("tpu_compiler")
def test_a_tpu_gathers_the_head_once():
    """The compiler of TPUs leaves in a loop what stands there: a gather for each chunk."""
    words, width, rows, seq = 8192, 512, 4, 512
    sizes = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": 1}
    model = Decoder(DecoderConfig.from_hf(tiny.fields("llama2") | sizes), jnp.bfloat16)
    plain = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), plain)
    whole = Layout.of(make_mesh(find_machine("v5e:2x2").devices, fsdp=4), model.config)
    sent = {}
    for layout in (whole, InTheLoop(whole.mesh, whole.table)):
        params = placed_shapes(lj.lorafy(plain, [lora("q_proj")]), layout)
        adapter, base = lj.split(params)
        where = layout.of_batch((rows, seq), parts=False)
        ints = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=where)
        with jax.set_mesh(layout.mesh):
            step = jax.jit(
                lambda adapter, base, data, layout=layout: gradient(model, layout, base, 128)(
                    adapter, data
                )
            ).lower(adapter, base, dict.fromkeys(batch(), ints))
        sent[type(layout)] = work_of(step.compile().as_text()).sent["all-gather"]
    head, chunks = 2 * words * width, seq // 128
    passed_on = 3 * head // 4  # by each of four chips
    print(sent, passed_on)
    assert sent[Layout] < 1.5 * passed_on
    assert sent[InTheLoop] > (chunks - 0.5) * passed_on, "the control"


def test_a_frozen_head_takes_two_products_a_chunk():
    """One that trains takes five: it runs again, and has a gradient."""

    def products(rules):
        model, plain = bag()
        adapter, base = lj.split(lj.lorafy(plain, rules))
        forward = lj.adapt(model.apply)
        loss = lambda adapter: total(forward, lj.join(adapter, base), batch(), chunk=9)  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(adapter).as_text()
        return sum("dot_general" in line for line in text.splitlines())

    table = lj.TrainRule(targets=["embed_tokens"])
    assert products([table]) == 2
    assert products([table, lj.TrainRule(targets=["lm_head"])]) > 2


def values(hidden, kernel, data, chunk):
    """Log-probabilities through a head alone."""

    def forward(variables, x, *, method=None, return_hidden=False, logits_at=None, **_):
        x = hidden if method is None else x
        return x if return_hidden else x @ variables["params"]

    return token_values(cross_entropy, forward, kernel, data, chunk=chunk)


@pytest.fixture(scope="module")
def plain_head():
    draw = np.random.default_rng(3).standard_normal
    data = batch(m=10)
    data["ids"] = data["ids"][:, :10]
    data["predict_at"] = np.arange(10, dtype=np.int32)[None].repeat(3, axis=0)
    hidden, kernel, a, b = (
        array(draw(shape), jnp.float32) for shape in [(3, 10, 7), (7, 61), (3, 10, 7), (7, 61)]
    )
    weights = array(draw((3, 10)), jnp.float32)
    return hidden, kernel, a, b, weights, data


def test_other_derivatives_are_those_of_all_logits(plain_head):
    """Forward mode; of the head or of what goes into it; second derivatives."""
    hidden, kernel, a, b, weights, data = plain_head

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(chunk):
        loss = lambda hidden, kernel: jnp.sum(weights * values(hidden, kernel, data, chunk))  # noqa: E731
        slope = jax.grad(loss, argnums=0)
        return [
            jax.jvp(loss, (hidden, kernel), (a, b)),
            jax.jvp(lambda x: loss(x, kernel), (hidden,), (a,)),
            jax.grad(loss, argnums=1)(hidden, kernel),
            jax.jvp(lambda x: slope(x, kernel), (hidden,), (a,)),
            jax.vmap(lambda s: jax.grad(loss)(s * hidden, kernel))(jnp.array([0.5, 1.0])),
        ]

    assert_close(derivatives(9), derivatives(0), 1e-5)


def test_values_without_a_derivative_and_parameters_that_dead_code_reads(plain_head):
    """One value says if a token is the likeliest; one product in the head serves no logits.

    A token may have two targets, each with a value of its own.
    """
    hidden, kernel, *_, data = plain_head
    tree = {"head": kernel, "table": kernel.T}
    two = (data["targets"][..., None] + np.arange(2)) % 61

    def right(logits, targets):
        return jnp.argmax(logits, axis=-1) == targets

    def at_targets(logits, targets):
        return jnp.take_along_axis(logits, targets, axis=-1)

    def loss(hidden, chunk):
        def forward(variables, x, *, method=None, return_hidden=False, logits_at=None, **_):
            x, params = hidden if method is None else x, variables["params"]
            x @ params["table"].astype(x.dtype).T
            return x if return_hidden else x @ params["head"]

        of = functools.partial(token_values, chunk=chunk)
        both = of(lambda *args: (cross_entropy(*args), right(*args)), forward, tree, data)
        of_two = of(at_targets, forward, tree, data | {"targets": two})
        return jnp.sum(both[0]), (of(right, forward, tree, data), both[1], of_two)

    slope = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    assert_close(slope(hidden, 9), slope(hidden, 0), 1e-5)
    logits = np.asarray(hidden) @ np.asarray(kernel)
    expected = np.take_along_axis(logits, two, axis=-1)
    assert_close(slope(hidden, 9)[0][1][2], expected, 1e-5)


@pytest.mark.slow
def test_bf16_is_no_further_from_fp32(plain_head):
    """By the root mean square, than with all logits at once, where tokens count or do not.

    A gradient of another loss is rounded once more, after it is multiplied by the token's.
    """
    hidden, kernel, _, _, weights, data = plain_head
    half = [x.astype(jnp.bfloat16) for x in (hidden, kernel)]

    def away(weights):
        def gradient_of(hidden, kernel, chunk):
            def loss(x):
                return jnp.sum(weights * values(x, kernel, data, chunk).astype(jnp.float32))

            return np.asarray(jax.jit(jax.grad(loss))(hidden), np.float64)

        exact = gradient_of(*(x.astype(jnp.float32) for x in half), 0)
        found = [gradient_of(*half, chunk) - exact for chunk in (9, 0)]
        return [np.sqrt(np.mean(error**2)) for error in found]

    chunked, whole = away(jnp.asarray(data["weights"], jnp.float32))
    assert 0 < chunked <= whole
    chunked, whole = away(weights)
    assert whole < chunked < 1.25 * whole


@pytest.mark.parametrize(
    ("platform", "words", "parts", "rows"),
    [
        ("cpu", 128_256, 1, 256),
        ("tpu", 128_256, 1, 1024),
        ("gpu", 128_256, 4, 4096),
        ("tpu", 151_936, 1, 768),
        ("gpu before sm_80", 49_152, 1, 2560),
        ("tpu", 10**6, 1, 256),
    ],
)
def test_rows_of_a_chunk(platform, words, parts, rows):
    """By hand: 2**29 bytes over four for each word here, a multiple of 256."""
    placement = SimpleNamespace(platform=platform, word_parts=parts)
    assert predictions_at_once(placement, words) == rows
