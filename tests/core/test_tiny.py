"""LoRA-XS, VeRA and TinyLoRA: frozen arrays are shared or follow from W, few numbers train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import training
from tests.support import (
    array,
    assert_close,
    assert_identical,
    draw,
    lorafied,
    over,
    with_random_factors,
)

PARAMS = {
    "layers": {"up": {"kernel": draw(1, (3, 5, 7))}, "down": {"kernel": draw(2, (3, 7, 5))}},
    "out": {"kernel": draw(3, (5, 7))},
}
X = draw(4, (11, 5))
BOTH = pytest.mark.parametrize("name", ["xs", "vera"])
ALL = over("name", ["xs", "vera", "tinylora"], often=["xs"])


def run(params, x):
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["out"]["kernel"]


def rule(name, **more):
    own = {"u": 4, "weight_tying": 0.5} if name == "tinylora" else {}
    return lj.LoraRule(**{"targets": ["layers", "out"], "rank": 3, name: True} | own | more)


def tree(name, seed=7, **more):
    return with_random_factors(lorafied(PARAMS, [rule(name, **more)]), seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xs": True, "vera": True}, "xs cannot be combined with vera"),
        ({"xs": True, "dora": True}, "xs cannot be combined with dora.* decomposes W"),
        (
            {"vera": True, "freeze_a": True},
            "vera cannot be combined with freeze_a.* shares one random A and B",
        ),
        ({"vera": True, "bias_on_b": True}, "vera cannot be combined with bias_on_b"),
        ({"xs": True, "init": lj.init.pissa}, "xs cannot be combined with init"),
        ({"xs": True, "uses": "each"}, "uses='each' gives a table one plain LoRA.*xs, vera"),
    ],
)
def test_rules_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        lj.LoraRule(targets=["up"], rank=2, **changes)


def test_ranks_that_cannot_be():
    with pytest.raises(
        ValueError, match="rank 6 is too large: a kernel of 7 by 5 has 5 singular values"
    ):
        lj.lorafy(PARAMS, [rule("xs", rank=6)])
    rules = [rule("vera", targets=["up"], layers=[0]), rule("vera", targets=["up"], rank=2)]
    with pytest.raises(ValueError, match=r"the layers of 'layers/up/kernel' have the ranks \[2, 3"):
        lj.lorafy(PARAMS, rules)


def test_the_factors_of_tinylora_are_singular_vectors_and_roots_of_their_values():
    """As in PEFT, whose vector would else mean another change. NumPy in float64 is the judge."""
    kernel = np.asarray(PARAMS["out"]["kernel"], np.float64)
    node = tree("tinylora", weight_tying=0)["out"]["kernel"]
    u, s, vt = np.linalg.svd(kernel)
    roots = np.sqrt(s[:3])
    assert_close(np.abs(np.asarray(node.a).T), np.abs(u[:, :3] * roots), 1e-5)
    assert_close(np.abs(np.asarray(node.b)), np.abs(roots[:, None] * vt[:3]), 1e-5)
    assert_close(np.asarray(node.a).T @ np.asarray(node.b), (u[:, :3] * s[:3]) @ vt[:3], 1e-5)


@pytest.mark.slow
def test_the_factors_of_xs_are_singular_vectors():
    """NumPy in float64 is the judge; W itself stays what it was."""
    fresh = lorafied(PARAMS, [rule("xs", layers=[0]), rule("xs", rank=2)])
    up = fresh["layers"]["up"]["kernel"]
    assert up.base is PARAMS["layers"]["up"]["kernel"] and up.ranks == (3, 2, 2)
    for layer, rank in enumerate(up.ranks):
        u, s, vt = np.linalg.svd(np.asarray(up.base[layer], np.float64))
        a, b = np.asarray(up.a[layer]).T, np.asarray(up.b[layer])
        assert_close(a[:, :rank] @ b[:rank], (u[:, :rank] * s[:rank]) @ vt[:rank], 1e-5)
        assert_close(np.abs(b[:rank]), np.abs(vt[:rank]), 1e-5)
        assert (b[np.arange(rank), np.abs(b[:rank]).argmax(axis=1)] > 0).all()
        assert not a[:, rank:].any() and not b[rank:].any()
        assert not np.asarray(up.latent)[layer, rank:].any()
    assert up.latent.shape == (3, 3, 3)
    u, s, vt = np.linalg.svd(np.asarray(draw(1, (90, 70)), np.float64), full_matrices=False)
    large = array((u * 0.9 ** np.arange(70)) @ vt, jnp.float32)  # values that are all close
    one = lorafied({"kernel": large}, [rule("xs", targets=["kernel"], rank=5)])["kernel"]
    a, b = np.asarray(one.a), np.asarray(one.b)
    assert_close(a.T @ b, (u[:, :5] * 0.9 ** np.arange(5)) @ vt[:5], 1e-3)
    assert_close(np.linalg.norm(a, axis=1), 0.9 ** np.arange(5), 1e-4)
    many = lorafied({"kernel": draw(1, (50, 60))}, [rule("xs", targets=["kernel"], rank=40)])
    assert 0.9e-5 < np.std(many["kernel"].latent) < 1.1e-5
    assert lj.count_params(fresh)[0] == 2 * (9 + 4 + 4) + 9


def test_all_weights_of_vera_share_one_pair():
    fresh = lj.lorafy(PARAMS, [rule("vera")])
    up, down, out = (
        *(fresh["layers"][n]["kernel"] for n in ("up", "down")),
        fresh["out"]["kernel"],
    )
    assert up.shared_a.shape == (3, 5) and up.shared_b.shape == (3, 7)  # no axis of layers
    assert up.shared_a is out.shared_a and up.shared_b is out.shared_b
    np.testing.assert_array_equal(up.shared_a, np.asarray(down.shared_a)[:, :5])
    np.testing.assert_array_equal(down.shared_b, np.asarray(up.shared_b)[:, :5])
    assert (np.asarray(up.lambda_d) == np.float32(0.1)).all() and not np.asarray(up.lambda_b).any()
    assert float(up.scale[0]) == 1
    large = {"kernel": jnp.ones((600, 400))}
    node = lj.lorafy(large, [rule("vera", targets=["kernel"], rank=50)])["kernel"]
    for matrix, fan in ((node.shared_a, 600), (node.shared_b, 50)):  # PEFT's kaiming uniform
        assert 0.99 < np.abs(matrix).max() / np.sqrt(6 / fan) <= 1
        assert abs(np.std(matrix) / np.sqrt(2 / fan) - 1) < 0.02
    other = lj.lorafy(PARAMS, [rule("vera")], key=jax.random.key(1))
    assert not np.allclose(other["out"]["kernel"].shared_a, out.shared_a)


@over("name", ["xs", "vera", "tinylora"], often=["vera", "tinylora"])
def test_only_what_is_tiny_trains(name):
    one = tree(name, **{"weight_tying": 0} if name == "tinylora" else {})
    adapter, base = lj.split(one)
    each = {"xs": {"latent"}, "vera": {"lambda_d", "lambda_b"}, "tinylora": {"v"}}[name]
    assert all(parts.keys() == each for parts in adapter.values())
    assert_identical(lj.join(adapter, base), one)
    n = sum(x.size for x in jax.tree.leaves(adapter))
    assert lj.count_params(one)[0] == n
    assert n == {"xs": 7 * 9, "vera": 7 * 3 + 3 * 7 + 3 * 5 + 7, "tinylora": 7 * 4}[name]
    mask = lj.trainable_mask(one)["out"]["kernel"]
    assert {k for k, on in mask.arrays.items() if on} == each and mask.base is False
    assert not lj.join({}, base)["out"]["kernel"].is_on
    both = jax.jit(lambda t, p, x: (lj.adapt(run)(t, x), run(p, x)))
    assert_close(*both(lj.join({}, base), PARAMS, X), 1e-6)


@ALL
def test_scanned_is_unrolled_and_merged(name):
    """Also where the stack is sliced, gathered, transposed, joined or chosen from."""

    def unrolled(params, x):
        for i in range(3):
            up, down = (params["layers"][n]["kernel"][i] for n in ("up", "down"))
            x = x + jnp.tanh(x @ up) @ down
        return x @ params["out"]["kernel"]

    def roundabout(params, x):
        up, down = (params["layers"][n]["kernel"] for n in ("up", "down"))
        picked = jnp.take(up, jnp.asarray([2, 0]), axis=0)
        both = jnp.concatenate([up, 2 * picked])  # end to end, along the stack
        wide = jnp.concatenate([both[3], jnp.swapaxes(down, 1, 2)[1]], axis=1)
        rows = jnp.broadcast_to(up[1].sum(axis=0), (x.shape[0], 7))
        which = jnp.where(x[0, 0] > 0, up[0], picked[1]) * jnp.arange(7.0)
        either = lax.cond(x[0, 1] > 0, lambda: up[1] + up[0], lambda: up[2] * 2)
        return x @ wide @ jnp.ones((14, 7)) + rows + x @ which + x @ either

    one = tree(name, alpha=2.0)

    @jax.jit
    def answers(one, params, x):
        merged = lj.merge(one)
        return [(lj.adapt(f)(one, x), f(merged, x), f(params, x)) for f in fns]

    fns = (run, unrolled, roundabout)
    for ours, expected, plain in jax.device_get(answers(one, PARAMS, X)):
        assert_close(ours, expected, 1e-5)
        assert np.abs(expected - plain).max() > 1e-2, "it must be seen"


@over("remat", [False, True], often=())
def test_a_scan_over_layers_holds_no_copies_of_the_pair(remat):
    """Compiled memory of a gradient; plain LoRA of this rank, which has a pair a layer, fails."""
    layers, width, rank = 24, 64, 128
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}}
    x = jax.ShapeDtypeStruct((8, width), jnp.float32)

    def chain(params, x):
        def layer(x, weights):
            return jnp.tanh(x @ weights["kernel"]), None

        return lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])[0]

    def needed(**changes):
        one = lj.lorafy(params, [lj.LoraRule(targets=["layers"], rank=rank, **changes)])
        adapter, base = lj.split(one)

        def loss(adapter, base, x):
            return jnp.sum(jnp.square(lj.adapt(chain)(lj.join(adapter, base), x)))

        step = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile().memory_analysis()
        kernels = 4 * layers * width * width
        return step.temp_size_in_bytes + step.argument_size_in_bytes - kernels

    pair = 4 * 2 * width * rank
    assert needed(vera=True) < 12 * pair < layers * pair / 1.5 < needed()


@pytest.mark.slow
@ALL
def test_a_file_holds_what_trains(name, tmp_path):
    one = tree(name)
    lj.save_adapter(tmp_path / "a", one)
    held = training_arrays(tmp_path / "a")
    assert_identical(held, jax.tree.map(np.asarray, lj.split(one)[0]))
    loaded = lj.load_adapter(tmp_path / "a", PARAMS)
    assert_identical(loaded, one)
    if name == "vera":
        assert loaded["out"]["kernel"].shared_b is loaded["layers"]["up"]["kernel"].shared_b
    assert_identical(lj.load_adapter(tmp_path / "a", with_random_factors(one, seed=1)), one)
    abstract = jax.eval_shape(lambda: PARAMS)
    planned = lj.load_adapter(tmp_path / "a", abstract, allow_base_mismatch=True)
    assert jax.tree.structure(planned) == jax.tree.structure(one)
    part = {"layers": one["layers"]}  # a part of the tree, whose pair may be wider than its own
    lj.save_adapter(tmp_path / "part", part)
    loaded = lj.load_adapter(tmp_path / "part", {"layers": PARAMS["layers"]})
    assert_identical(loaded, part)


def training_arrays(folder):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(adapter=ocp.args.StandardRestore())
        return checkpointer.restore(folder, args)["adapter"]


def test_a_pair_without_a_seed_is_filed_once(tmp_path):
    one = tree("vera")
    pair = {"a": draw(8, (3, 7)), "b": draw(9, (3, 7))}

    def changed(node):
        a, b = (pair[n][:, : node.shape[-2 + i]] for i, n in enumerate("ab"))
        return node.replace(shared_a=a, shared_b=b, seed=None)

    one = jax.tree.map(lambda n: changed(n) if lj.is_node(n) else n, one, is_leaf=lj.is_node)
    lj.save_adapter(tmp_path / "a", one)
    held = training_arrays(tmp_path / "a")
    shared = [x for parts in held.values() for n, x in parts.items() if n.startswith("shared")]
    assert len(shared) == 4  # two widths of A, two of B
    loaded = lj.load_adapter(tmp_path / "a", PARAMS)
    assert_identical(loaded, one)
    assert loaded["out"]["kernel"].shared_a is loaded["layers"]["up"]["kernel"].shared_a


@pytest.mark.slow
def test_xs_on_another_base_is_refused(tmp_path):
    """Also where another base is accepted; rounding is not another base."""
    lj.save_adapter(tmp_path / "a", tree("xs"))
    noise = lambda x: np.float32(0.3) * np.asarray(draw(5, x.shape))  # noqa: E731
    other = jax.tree.map(lambda x: array(np.asarray(x) + noise(x)), PARAMS)
    with pytest.raises(lj.AdapterError, match="trained on another base"):
        lj.load_adapter(tmp_path / "a", other)
    with pytest.raises(lj.AdapterError, match="LoRA-XS, whose A and B are singular vectors"):
        lj.load_adapter(tmp_path / "a", other, allow_base_mismatch=True)
    near = jax.tree.map(lambda x: array(np.asarray(x) * np.float32(1 + 1e-6)), PARAMS)
    lj.load_adapter(tmp_path / "a", near, allow_base_mismatch=True)


@pytest.mark.slow
@BOTH
def test_swapping_compiles_nothing_anew(name):
    traces = []

    @jax.jit
    def forward(params, x):
        traces.append(1)
        return lj.adapt(run)(params, x)

    one = tree(name)
    other = with_random_factors(
        lj.lorafy(PARAMS, [rule(name, alpha=9.0)], key=jax.random.key(3)), seed=5
    )
    forward(one, X)
    assert_close(forward(lj.swap(one, other), X), jax.jit(lj.adapt(run))(other, X), 1e-5)
    assert len(traces) == 1


@pytest.mark.slow
@over(
    ("name", "optimizer"),
    [(name, o) for name in ("xs", "vera") for o in ("adamw", "muon", "adafactor", "lion")]
    + [("tinylora", o) for o in ("muon", "adafactor")],
    often=["xs, muon"],
    called=", ".join,
)
def test_optimisers_take_what_trains(name, optimizer):
    adapter, base = lj.split(tree(name))
    whole = lj.join(adapter, base)
    rate = optax.constant_schedule(1e-2)
    chosen = training.make_optimizer(optimizer, rate, whole, weight_decay=0.5, grad_clip=1.0)

    def loss(adapter):
        return jnp.sum(jnp.square(lj.adapt(run)(lj.join(adapter, base), X)))

    @jax.jit
    def step(adapter):
        before, gradients = jax.value_and_grad(loss)(adapter)
        updates, _ = chosen.update(gradients, chosen.init(adapter), adapter)
        return before, gradients, loss(optax.apply_updates(adapter, updates))

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        before, gradients, after = jax.device_get(step(adapter))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients)) or name == "tinylora"
    assert after < before


@pytest.mark.slow
@over("name", ["xs", "vera", "tinylora"], often=["vera"])
def test_on_a_mesh(name):
    """A and B lie as W's axes do; an array that weights share is placed once."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "layers": {"up": {"kernel": draw(1, (3, 8, 12))}, "down": {"kernel": draw(2, (3, 12, 8))}},
        "out": {"kernel": draw(3, (8, 12))},
    }
    x = draw(4, (11, 8))
    one = with_random_factors(lj.lorafy(params, [rule(name)]))
    there = lj.sharding.place(one, [(".*kernel", P("fsdp", "tensor"))], mesh)
    up, out = there["layers"]["up"]["kernel"], there["out"]["kernel"]
    specs = {k: tuple(v.sharding.spec) for k, v in up.arrays.items() if k != "scale"}
    if name == "vera":
        assert up.shared_b is out.shared_b
        assert (specs["shared_a"], specs["shared_b"]) == ((None, "fsdp"), (None, "tensor"))
        assert (specs["lambda_d"], specs["lambda_b"]) == ((None, None), (None, "tensor"))
    else:
        middle = "latent" if name == "xs" else "projection"
        assert set(specs[middle]) == {None} and specs["a"] == (None, None, "fsdp")

    def loss(adapter, base, x):
        return jnp.sum(jnp.sin(lj.adapt(run, strict=True)(lj.join(adapter, base), x)))

    values = [jax.jit(jax.value_and_grad(loss))(*lj.split(t), x) for t in (there, one)]
    assert_close(*values, 1e-5)


@over("name", ["xs", "vera"], often=["vera"])
def test_a_convolution_in_groups(name):
    """Each group has all columns of rank, and d scales them in each."""

    def convolved(params, x):
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )

    params = {"kernel": draw(1, (3, 5, 14))}
    made = lj.LoraRule(targets=["kernel"], rank=3, in_axes=[0, 1], out_axes=[2], **{name: True})
    one, x = with_random_factors(lorafied(params, [made])), draw(2, (2, 11, 10))
    ours, expected, plain = jax.jit(
        lambda one, params, x: (
            lj.adapt(convolved, strict=True)(one, x),
            convolved(lj.merge(one), x),
            convolved(params, x),
        )
    )(one, params, x)
    assert_close(ours, expected, 1e-5)
    assert np.abs(np.asarray(expected) - np.asarray(plain)).max() > 1e-2
