"""A step's memory as it is predicted, judged by compilers; the choice among policies."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.adapt.eqns import opened
from lora_jax.core.base import as_array
from lora_jax.models import Decoder, DecoderConfig
from lora_jax.quantized import encode
from lora_jax.training.layout import Layout
from lora_jax.training.losses import token_loss
from lora_jax.training.memory import live
from lora_jax.training.memory.axes import axes_of
from lora_jax.training.memory.ladder import LADDER, choose_remat, fits, next_choice, rungs_for
from lora_jax.training.memory.live import peak_bytes, predicted_bytes
from lora_jax.training.mesh import make_mesh
from lora_jax.training.setup import Setup
from tests.support import draw, over
from train.plan.job import placed_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 509,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


def step_of(remat, devices=1, batch=4, seq=256, **mesh):
    """A traced step, and what predicts its memory."""
    config = DecoderConfig.from_hf(CONFIG)
    layout = Layout.of(make_mesh(jax.devices()[:devices], **mesh), config)
    model = Decoder(config, remat=remat, attention="blockwise")
    plain = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rules = [lj.LoraRule(targets="all-linear", rank=3, alpha=5)]
    params = placed_shapes(lj.lorafy(plain, rules), layout)
    adapter, base = lj.split(params)
    rate = optax.constant_schedule(1e-3)
    setup = Setup.make(layout, params, optax.adam(rate), rate)
    state = setup.abstract_state(adapter)
    shape = (1, batch, seq)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.of_batch(shape, parts=True))
    names = ("ids", "segment_ids", "positions", "predict_at", "targets", "weights")
    arrays = dict.fromkeys(names, ids)
    arrays["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=ids.sharding)
    loss = token_loss("cross-entropy", **layout.chunks(128))
    traced = setup.trace(setup.forward(model), loss, state, base, arrays)
    return traced, predicted_bytes(traced, layout, state, base, arrays)


def compiled_total(traced):
    memory = traced.lower().compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


MESHES = {
    "one": {"devices": 1},
    "fsdp": {"devices": 4, "fsdp": 4},
    "fsdp and tensor": {"devices": 4, "fsdp": 2, "tensor": 2},
}


@pytest.mark.slow
@over("mesh", MESHES, often=["one"])
def test_what_a_step_takes_is_predicted(mesh):
    """By its traced program; a CPU's compiler fuses less than those that the model is of."""
    mesh = MESHES[mesh]
    traced, kept = step_of(False, **mesh)
    total = compiled_total(traced)
    print(f"{mesh}: predicted {kept:,} of {total:,}: {kept / total:.3f}")
    assert kept == pytest.approx(total, rel=0.2)
    traced, again = step_of(True, **mesh)
    fewer = total - compiled_total(traced)
    print(f"recomputed: {kept - again:,} less, {fewer:,} as compiled")
    assert kept - again == pytest.approx(fewer, rel=0.25)


@pytest.mark.slow
def test_a_device_takes_its_part_of_the_batch():
    whole, part = (step_of(False, **MESHES[name])[1] for name in ("one", "fsdp"))
    _, double = step_of(False, batch=8, **MESHES["fsdp"])
    assert 3.5 * part < whole < 4.1 * part and double > 1.8 * part


def test_an_array_that_is_typed_to_differ_is_no_copy():
    """As kernels of experts are before a loop reads them."""
    mesh = make_mesh(jax.devices()[:2], fsdp=2)
    x, w = jnp.ones((4, 12)), jnp.ones((12, 12))

    def peak_of(typed):
        def part(x, w):
            w = lax.pcast(w, "fsdp", to="varying") if typed else w
            return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]

        fn = jax.shard_map(part, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
        placed = [NamedSharding(mesh, spec) for spec in (P("fsdp"), P())]
        jaxpr = jax.jit(fn).trace(x, w).jaxpr
        return peak_bytes(jaxpr, placed, [False] * 2, mesh.shape, platform="tpu")

    assert peak_of(True) == peak_of(False) > w.nbytes


def test_a_tpus_product_forms_a_weight_from_its_codes():
    """Scales are spread in another way for each platform. The control: a CPU writes W."""
    x, coded = jnp.ones((8, 128)), encode(draw(1, (128, 192)), "nf4")
    leaves, tree = jax.tree.flatten(coded)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def product(x, *leaves):
        return x @ as_array(jax.tree.unflatten(tree, leaves))

    def peak_on(platform):
        jaxpr = jax.jit(product).trace(x, *leaves).jaxpr
        n = 1 + len(leaves)
        return peak_bytes(jaxpr, [where] * n, [True] * n, {}, platform=platform)

    assert peak_on("tpu") < 4 * 128 * 192 < peak_on("cpu")


def test_a_tpus_ragged_products_read_arrays():
    """They are kernels; the operand of a product of its own is formed within it."""
    x, w = jnp.ones((8, 12)), jnp.ones((3, 12, 20), jnp.bfloat16)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def peak_of(product):
        jaxpr = jax.jit(lambda x, w: product(x, w.astype(x.dtype))).trace(x, w).jaxpr
        return peak_bytes(jaxpr, [where] * 2, [False] * 2, {}, platform="tpu")

    sizes, whole = jnp.array([3, 0, 5]), 4 * w.size
    assert peak_of(lambda x, w: x @ w.reshape(-1, 20)[:12]) < x.nbytes + w.nbytes + whole
    assert peak_of(lambda x, w: lax.ragged_dot(x, w, sizes)) >= x.nbytes + w.nbytes + whole


@jax.jit
def looped(x, w):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, jnp.stack([w[:, :12]] * 3))


PLACED = {
    "a kernel gathered": (lambda x, w: x @ w, P("a"), P("a", None)),
    "a kernel's own axis": (lambda x, w: x @ w, P("a"), P(None, "b")),
    "elements, and a row": (
        lambda x, w: jnp.sin(x) + jnp.sum(x, axis=1, keepdims=True),
        P("a"),
        P(),
    ),
    "heads": (lambda x, w: x.reshape(8, 3, 4).transpose(1, 0, 2), P("a"), P()),
    "rows joined": (lambda x, w: x.reshape(2, 4, 12).sum(2).reshape(-1), P("b"), P()),
    "looked up": (lambda x, w: w[jnp.argmax(x, axis=1)], P("a"), P(None, "b")),
    "padded": (lambda x, w: jnp.concatenate([x, x], axis=1)[:, 3:], P("a"), P()),
    "a loop": (looped, P("a"), P()),
}


@pytest.mark.parametrize("name", PLACED)
def test_axes_are_the_partitioners(name):
    """Each device holds the part of each result that XLA gives it."""
    function, *specs = PLACED[name]
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:4], "a")
    mesh = jax.sharding.Mesh(mesh.devices.reshape(2, 2), ("a", "b"))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip([(8, 12), (12, 20)], specs, strict=True)
    ]
    traced = jax.jit(function).trace(*args)
    program = live._Program(dict(mesh.shape), on_tpu=False)
    values = [live._outside(axes_of(arg.sharding, arg.ndim)) for arg in args]
    given = traced.lower().compile().output_shardings
    for out, value, placed in zip(
        opened(traced.jaxpr)[0].outvars,
        program.run(traced.jaxpr, values),
        jax.tree.leaves(given),
        strict=True,
    ):
        parts = [math.prod(mesh.shape[axis] for axis in named) for named in value.axes]
        mine = tuple(size // n for size, n in zip(out.aval.shape, parts, strict=True))
        assert mine == placed.shard_shape(out.aval.shape)
    assert any(axes for value in values for axes in value.axes)


def test_memory_of_the_host_takes_none_of_the_device():
    def bytes_of(space):
        def f(x):
            kept = jax.device_put(jnp.sin(x), space)
            return jnp.sum(x) + jnp.sum(jax.device_put(kept, jax.memory.Space.Device))

        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        jaxpr = jax.jit(f).trace(jax.ShapeDtypeStruct((1000,), jnp.float32)).jaxpr
        return peak_bytes(jaxpr, [where], [False], {}, platform="tpu")

    assert bytes_of(jax.memory.Space.Device) - bytes_of(jax.memory.Space.Host) == 4000


SIZES = {"none": 30, "products": 20, "projections": 15, "attention": 12, "full": 10, "offload": 4}


@pytest.mark.parametrize(
    ("capacity", "remat", "looked_at"),
    [
        (33, "none", 1),
        (32, "products", 2),
        (17, "projections", 3),
        (16, "attention", 4),
        (13, "full", 5),
        (10, "offload", 6),
        (1, "offload", 6),
        (None, "full", 0),
    ],
)
def test_the_first_that_fits_with_a_margin(capacity, remat, looked_at):
    choice = choose_remat(LADDER, SIZES.__getitem__, capacity)
    assert choice.remat == remat and [*choice.predicted] == [*LADDER[:looked_at]]
    assert choice.lower == LADDER[LADDER.index(remat) + 1 :]
    if capacity:
        assert fits(SIZES[remat], capacity) == (capacity > 1)
        assert ("nothing takes less" in choice.describe()) == (capacity == 1)
    else:
        assert "not known" in choice.describe()


def test_one_policy_down_and_then_the_one_that_was_predicted_not_to_fit():
    choice, sizes = choose_remat(LADDER, SIZES.__getitem__, 13), []
    while choice is not None:
        sizes.append((choice.remat, choice.predicted.get("full"), choice.is_last))
        assert choice.fits == (choice.remat == "full")  # the next one was not predicted
        choice = next_choice(choice, 14 if choice.remat == "full" else None)
    assert sizes == [("full", 10, False), ("offload", 14, False), ("attention", 14, True)]
    assert choose_remat(("none", "full"), SIZES.__getitem__, 33).above is None


def test_policies_that_differ_on_a_platform():
    assert rungs_for("tpu", "splash") == rungs_for("gpu", "flash") == LADDER
    assert rungs_for("gpu", "cudnn") == ("none", "products", "projections", "full", "offload")
    assert rungs_for("cpu", "blockwise") == ("none", "full")
