"""Shardings of adapted trees, and the bytes that devices send each other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import init, models
from lora_jax.models.layers.placement import Placement
from lora_jax.sharding import place, shardings
from lora_jax.training.layout import Layout
from tests.models import tiny, tiny_encoders
from tests.support import assert_close, draw, lorafied, with_random_factors
from train.plan.clock.work import work_of
from train.plan.machines import find_machine
from train.processes.mesh import make_mesh

TABLE = [
    (r".*/up/kernel", P("fsdp", "tensor")),
    (r".*/experts/kernel", P("expert", "tensor", "fsdp")),
    (r"embed/embedding", P("tensor", "fsdp")),
    (r".*/kernel", P(None, "fsdp")),
]


@pytest.fixture(scope="module")
def mesh():
    auto = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 2, 2), ("expert", "fsdp", "tensor"), axis_types=auto)


def spec_of(sharding):
    return tuple(sharding.spec)


def test_factors_lie_as_their_base(mesh):
    shapes = {
        "layers": {"up": {"kernel": (3, 8, 12)}, "experts": {"kernel": (5, 4, 6)}},
        "embed": {"embedding": (10, 8)},
        "head": {"kernel": (8, 10), "bias": (10,)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    rules = [
        lj.TrainRule(targets=["embed"], rows=[2, 5]),
        lj.TrainRule(targets=["head"]),
        lj.LoraRule(targets=["up"], rank=3, dora=True, init=init.pissa),
        lj.LoraRule(targets=["experts"], rank=2, bias_on_b=True),
    ]
    where = shardings(lj.lorafy(params, rules), TABLE, mesh)
    up, experts = where["layers"]["up"]["kernel"], where["layers"]["experts"]["kernel"]
    assert spec_of(up.base) == (None, "fsdp", "tensor")
    assert spec_of(up.a) == (None, None, "fsdp") and spec_of(up.b) == (None, None, "tensor")
    assert [spec_of(x) for x in up.start] == [(None, None, "fsdp"), (None, None, "tensor")]
    assert spec_of(up.magnitude) == (None, "tensor")
    assert spec_of(up.scale) == (None,)
    assert spec_of(experts.base) == ("expert", "tensor", "fsdp")
    assert spec_of(experts.a) == ("expert", None, "tensor")
    assert spec_of(experts.bias) == ("expert", "fsdp")
    assert spec_of(experts.b) == ("expert", None, "fsdp")
    table = where["embed"]["embedding"]
    assert spec_of(table.base) == ("tensor", "fsdp") and spec_of(table.value) == (None, "fsdp")
    assert spec_of(where["head"]["kernel"].value) == (None, "fsdp")
    assert spec_of(where["head"]["bias"].value) == (None,)  # no line: replicated


def test_what_is_placed_lies_there_and_is_the_same(mesh):
    params = {"layers": {"up": {"kernel": draw(1, (3, 8, 12))}}, "key": jax.random.key(0)}
    tree = with_random_factors(lorafied(params, [lj.LoraRule(targets=["up"], rank=3)]))
    there = place(tree, TABLE, mesh)
    node = there["layers"]["up"]["kernel"]
    assert {s.data.shape for s in node.base.addressable_shards} == {(3, 4, 6)}
    assert {s.data.shape for s in node.a.addressable_shards} == {(3, 3, 4)}
    assert {s.data.shape for s in node.b.addressable_shards} == {(3, 3, 6)}
    here = jax.device_get(tree["layers"]["up"]["kernel"])
    for name in ("base", "a", "b"):
        np.testing.assert_array_equal(getattr(node, name), getattr(here, name))


def test_abstract_trees_have_shardings_too(mesh):
    params = {"up": {"kernel": jax.ShapeDtypeStruct((8, 12), jnp.float32)}}
    tree = lj.lorafy(params, [lj.LoraRule(targets=["up"], rank=3)])
    assert spec_of(shardings(tree, [(r"up/.*", P("fsdp"))], mesh)["up"]["kernel"].base) == (
        None,
        "fsdp",
    )


def test_axes_that_do_not_divide_are_left_out(mesh):
    where = shardings(
        {"a": draw(1, (6, 5)), "b": draw(1, (2, 8))},
        [(".*", P(("fsdp", "tensor"), "tensor"))],
        mesh,
    )
    assert spec_of(where["a"]) == ("fsdp", None)  # 6 = 2·3, 5 is odd
    assert spec_of(where["b"]) == ("fsdp", "tensor")


@pytest.mark.parametrize(
    ("n", "spec"), [(4, (("expert", "fsdp"), None, "tensor")), (5, ("expert", "fsdp", "tensor"))]
)
def test_of_a_name_at_two_axes_the_first_that_it_divides_counts(mesh, n, spec):
    twice = [(".*", P(("expert", "fsdp"), "fsdp", "tensor"))]
    params = {"experts": {"kernel": jax.ShapeDtypeStruct((3, n, 8, 6), jnp.float32)}}
    rules = [lj.LoraRule(targets=["experts"], rank=2)]
    kernel = shardings(lj.lorafy(params, rules), twice, mesh)["experts"]["kernel"]
    assert spec_of(kernel.base) == (None, *spec)
    assert spec_of(kernel.a) == (None, spec[0], None, spec[1])
    assert spec_of(kernel.b) == (None, spec[0], None, spec[2])


def test_tables_that_cannot_be(mesh):
    with pytest.raises(
        ValueError, match="mesh has no axis 'rows'. Its axes are expert, fsdp, tensor"
    ):
        shardings({"a": draw(1, (6, 5))}, [("a", P("rows"))], mesh)
    with pytest.raises(ValueError, match=r"a of shape \[6\] has fewer axes than .*'fsdp'"):
        shardings({"a": draw(1, (6,))}, [("a", P("fsdp", None))], mesh)


CONFIGS = [
    *(tiny.config(case) for case in ("llama with biases", "qwen3 moe", "mixtral", "gemma2")),
    *(tiny.config(case) for case in tiny.CASES if case.startswith("phi3")),
    *(models.read_config(tiny_encoders.fields(case)) for case in ("bert", "roberta", "gpt2")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_each_family_says_where_all_its_kernels_lie(config):
    table = models.partition_specs(config)
    unsaid = [
        row.path
        for row in models.key_table(config)
        if row.path.endswith(("kernel", "embedding"))
        and not any(re.fullmatch(pattern, row.path) for pattern, _ in table)
    ]
    assert [path for path in unsaid if "token_type" not in path and "pooler" not in path] == []


# --- what is sent


def sent_bytes(compiled):
    return work_of(compiled.as_text()).sent_bytes


CONFIG = {
    **tiny.fields("llama3"),
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BATCH, SEQ, RANK = 8, 8, 2


# Each axis with each compiler, and with another axis on one of them.
CASES = [
    pytest.param("cpu", mesh, marks=pytest.mark.slow)
    for mesh in ("tensor=4", "fsdp=2,tensor=2", "data=2,sequence=2")
] + [
    pytest.param("v5e:2x2", mesh, marks=pytest.mark.tpu_compiler)
    for mesh in ("fsdp=4", "data=2,tensor=2", "sequence=2,tensor=2")
]


@pytest.mark.parametrize(("machine", "text"), CASES)
def test_a_step_sends_what_the_base_needs_and_its_adapter_twice(machine, text, request):
    """The bound: the plain model forward and back to its input, and the adapter's bytes twice.

    (Once when it is gathered, once for each axis that its gradient is summed over. Over the tensor
    axis neither is needed, but xA or its gradient is summed there: r numbers a token.)
    """
    devices = None
    if machine != "cpu":
        request.getfixturevalue("tpu_compiler")
        devices = find_machine(machine).devices
    config = models.read_config(CONFIG)
    layout = Layout.of(make_mesh(text, BATCH, devices), config)
    model = layout.constrained(models.Decoder(config, remat=True))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((BATCH, SEQ), jnp.int32))
    ids = jax.ShapeDtypeStruct(
        (BATCH, SEQ), jnp.int32, sharding=layout.of_batch((BATCH, SEQ), parts=False)
    )

    def there(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings(tree, layout.table, layout.mesh),
        )

    def loss_of(forward, tree, ids):
        logits = forward({"params": tree}, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def sent(of_what, *args):
        kept = jax.tree.map(lambda x: x.sharding, args[0])
        with jax.set_mesh(layout.mesh):
            gradient = jax.jit(jax.grad(of_what), out_shardings=kept)
            return sent_bytes(gradient.lower(*args).compile())

    plain = there(shapes["params"])
    probe = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=layout.whole)

    def of_input(probe, params, ids):
        class Nudged(Placement):
            def constrain(self, x, kind):
                return layout.constrain(x + probe if kind == "residual" else x, kind)

            def attention(self, local):
                return layout.attention(local)

        nudged = model.clone(placement=Nudged())
        return loss_of(nudged.apply, params, ids)

    needed = sent(of_input, probe, plain, ids)
    rule = lj.LoraRule(targets="all-linear", rank=RANK, alpha=5)
    tree = there(lj.lorafy(shapes["params"], [rule]))
    adapter, base = lj.split(tree)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(adapter))

    def of_adapter(adapter, base, ids):
        adapter = jax.lax.with_sharding_constraint(adapter, layout.step_shardings(tree))
        return loss_of(lj.adapt(model.apply, strict=True), lj.join(adapter, base), ids)

    ours = sent(of_adapter, adapter, base, ids)
    whole = sent(lambda params, ids: loss_of(model.apply, params, ids), plain, ids)
    print(f"{machine}, {text}: needed {needed}, adapter {size}, ours {ours}, full {whole}")
    bound = needed + (1 + sum(n > 1 for n in layout.mesh.shape.values())) * size
    assert ours <= bound
    if text != "tensor=4":  # where each device has the whole gradient of its part of the base
        assert whole > bound, "a gradient of the base must be seen"


@pytest.mark.slow
def test_no_kernel_moves_over_the_tensor_axis():
    """Two devices on tensor halve what fsdp gathers of a wider MLP.

    Where only the residual stream is constrained, kernels are gathered over both axes.
    """

    seq = 32

    def sent(text, width, kinds):
        config = models.read_config({**CONFIG, "intermediate_size": width})
        layout = Layout.of(make_mesh(text, BATCH), config)

        def loss(probe, params, ids):
            class Nudged(Placement):
                def constrain(self, x, kind):
                    x = x + probe if kind == "residual" else x
                    return layout.constrain(x, kind) if kind in kinds else x

                def attention(self, local):
                    return layout.attention(local)

            model = models.Decoder(config, remat=True, placement=Nudged())
            return jnp.sum(model.apply({"params": params}, ids, return_hidden=True) ** 2)

        model = models.Decoder(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((BATCH, seq), jnp.int32))
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes["params"],
            shardings(shapes["params"], layout.table, layout.mesh),
        )
        where = layout.of_batch((BATCH, seq), parts=False)
        ids = jax.ShapeDtypeStruct((BATCH, seq), jnp.int32, sharding=where)
        probe = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=layout.whole)
        with jax.set_mesh(layout.mesh):
            return sent_bytes(jax.jit(jax.grad(loss)).lower(probe, params, ids).compile())

    def growth(text, *kinds):
        return sent(text, 160, kinds) - sent(text, 80, kinds)

    kinds = ("residual", "inputs", "heads", "features")
    of_fsdp = growth("data=2,fsdp=2", *kinds)
    assert growth("tensor=2,fsdp=2", *kinds) == of_fsdp / 2
    assert growth("tensor=2,fsdp=2", "residual") > of_fsdp, "the control"


@pytest.mark.slow
def test_experts_sort_their_own_tokens(mesh):
    """As on one device, values and the adapter's gradients; and no activation is gathered."""
    config = models.read_config({**tiny.fields("mixtral"), "intermediate_size": 38})
    layout = Layout.of(make_mesh("fsdp=2,tensor=2", 4), config)
    ids = tiny.tokens(0, 4, 6)
    model = models.Decoder(config, remat=True)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    rules = [lj.LoraRule(targets=["experts", "gate"], rank=3, alpha=7)]
    adapter, base = lj.split(with_random_factors(lorafied(params, rules)))

    def gradients(model):
        def loss(adapter, base):
            tree = {"params": lj.join(adapter, base)}
            return jnp.sum(lj.adapt(model.apply, strict=True)(tree, ids) ** 2)

        return jax.jit(jax.value_and_grad(loss))

    there = place(lj.join(adapter, base), layout.table, layout.mesh)
    with jax.set_mesh(layout.mesh):
        apart = gradients(layout.constrained(model)).lower(*lj.split(there)).compile()
        together = gradients(layout.constrained(model, dropout=True)).lower(*lj.split(there))
        ours = apart(*lj.split(there))
    assert_close(ours, gradients(model)(adapter, base), 5e-5)  # sums of squares of many logits
    rows = r"f32\[48,\d+\]"  # 4 sequences of 6 tokens, for 2 experts each
    assert re.search(rows, together.compile().as_text()), "the control"
    assert not re.search(rows, apart.as_text())
