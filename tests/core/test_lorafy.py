"""The transform of a tree, and what it keeps."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from tests.support import (
    PROGRAMS,
    NnxModel,
    array,
    assert_close,
    assert_identical,
    draw,
    with_random_factors,
)


def zeros(*shape):
    return array(np.zeros(shape, np.float32))


KERNEL = {"q_proj": {"kernel": draw(1, (5, 7)), "bias": draw(2, (7,))}}
RULE = lj.LoraRule(targets=["q_proj"], rank=2, alpha=3.0)


def llama_2_7b():
    """The abstract tree of Llama-2-7B: 6,738,415,616 parameters."""

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    d, f, n, v = 4096, 11008, 32, 32000
    attention = {f"{name}_proj": {"kernel": shaped(n, d, d)} for name in "qkvo"}
    mlp = {name: {"kernel": shaped(n, d, f)} for name in ("gate_proj", "up_proj")}
    mlp["down_proj"] = {"kernel": shaped(n, f, d)}
    norms = {f"{name}_layernorm": {"scale": shaped(n, d)} for name in ("input", "post_attention")}
    layers = {"self_attn": attention, "mlp": mlp, **norms}
    return {
        "model": {
            "embed_tokens": {"embedding": shaped(v, d)},
            "layers": layers,
            "norm": {"scale": shaped(d)},
        },
        "lm_head": {"kernel": shaped(d, v)},
    }


def test_llama_2_7b_is_counted_from_shapes_alone():
    start = time.perf_counter()
    tree = lj.lorafy(llama_2_7b(), [lj.LoraRule(targets=["q_proj", "v_proj"], rank=8)])
    line = lj.summary(tree)
    assert time.perf_counter() - start < 5  # about 0.2 s; a second of real weights takes minutes
    assert line == (
        "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def test_abstract_kernels_of_one_type_are_traced_once():
    shapes = []

    def init(key, shape, dtype):
        shapes.append(shape.a)
        return lj.init.kaiming(key, shape, dtype)

    sizes = {"first": (5, 7), "second": (5, 7), "third": (5, 7), "last": (7, 5)}
    params = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in sizes.items()
    }
    tree = lj.lorafy(params, [lj.LoraRule(targets=["kernel"], rank=2, init=init)])
    assert sorted(shapes) == [(5, 2), (7, 2)]
    arrays = jax.tree.leaves(tree)
    assert len({id(array) for array in arrays}) == len(arrays) == 16
    factors = {
        name: (node["kernel"].a.shape, node["kernel"].b.shape) for name, node in tree.items()
    }
    assert factors == {name: ((2, size), (2, out)) for name, (size, out) in sizes.items()}
    assert all(tree[name]["kernel"].base is params[name]["kernel"] for name in sizes)


def test_factors_have_the_documented_shapes_and_draws():
    tree = lj.lorafy(PROGRAMS[2].params(jnp.float32), PROGRAMS[2].rules)
    query = tree["query"]["kernel"]  # [5, 3, 7]: in 0, out 1 and 2
    assert (query.a.shape, query.b.shape, query.scale.shape) == ((2, 5), (2, 3, 7), ())
    big = lj.lorafy({"w": zeros(400, 300)}, [lj.LoraRule(targets=["w"], rank=50)])["w"]
    a = np.asarray(big.a)
    assert np.abs(a).max() <= 1 / 20
    assert_close(np.std(a) * np.sqrt(3) * 20, 1.0, 0.02)
    assert not np.asarray(big.b).any() and big.a.dtype == big.b.dtype == jnp.float32


def test_batch_axes_get_independent_draws_and_are_no_fan_in():
    stack = lj.lorafy({"w": zeros(3, 400, 5)}, [lj.LoraRule(targets=["w"], rank=20)])["w"]
    a = np.asarray(stack.a)
    assert a.shape == (3, 20, 400)
    assert_close(np.abs(a).max(), 1 / 20, 0.01)
    assert np.abs(a[0] - a[1]).max() > 0.01


def test_untouched_leaves_and_the_base_are_the_same_objects():
    tree = lj.lorafy(KERNEL, [RULE])
    assert tree["q_proj"]["kernel"].base is KERNEL["q_proj"]["kernel"]
    assert tree["q_proj"]["bias"] is KERNEL["q_proj"]["bias"]


def test_a_trained_leaf_is_a_copy_that_can_be_donated():
    tree = lj.lorafy(KERNEL, [lj.TrainRule(targets=["bias"])])
    adapter, base = lj.split(tree)
    jax.jit(lambda adapter: jax.tree.map(jnp.negative, adapter), donate_argnums=0)(adapter)
    assert not KERNEL["q_proj"]["bias"].is_deleted()


def test_draws_are_the_same_in_every_process():
    """Another process drew these; Python's own hashes of strings differ from process to process."""
    drawn = [-0.37785605, -0.2742095, -0.413728, 0.083871424, -0.28034922]
    here = lj.lorafy({"w": zeros(5, 7)}, [lj.LoraRule(targets=["w"], rank=2)])["w"].a
    np.testing.assert_allclose(np.asarray(here)[0], drawn, rtol=1e-7)


def test_another_key_gives_other_draws():
    one, two = (lj.lorafy(KERNEL, [RULE], key=jax.random.key(seed)) for seed in (0, 1))
    one_a, two_a = (np.asarray(tree["q_proj"]["kernel"].a) for tree in (one, two))
    assert np.abs(one_a - two_a).max() > 0.01
    assert_identical(lj.lorafy(KERNEL, [RULE]), one)


def test_ranks_that_differ_are_padded_with_zeros_which_are_not_counted():
    rules = [lj.LoraRule(targets=["w"], layers=[0], rank=2), lj.LoraRule(targets=["w"], rank=5)]
    weight = lj.lorafy({"w": zeros(3, 7, 11)}, rules)["w"]
    assert weight.ranks == (2, 5, 5) and weight.a.shape == (3, 5, 7)
    a = np.asarray(weight.a)
    assert not a[0, 2:].any() and a[0, :2].all() and a[1].all()
    assert lj.count_params({"w": weight})[0] == (2 + 5 + 5) * (7 + 11)


def test_padding_is_a_fixed_point_of_training(float64):
    rules = [lj.LoraRule(targets=["w"], layers=[0], rank=2), lj.LoraRule(targets=["w"], rank=5)]
    tree = lj.lorafy({"w": draw(1, (2, 7, 7), jnp.float64)}, rules)
    adapter, base = lj.split(tree)
    a, b = (np.asarray(adapter["w"][name]) for name in "ab")
    adapter["w"]["b"] = array(b + a.sum(-1)[..., None] * 0.1, b.dtype)
    forward, x = lj.adapt(lambda p, x: x @ p["w"][0] @ p["w"][1]), draw(3, (13, 7), jnp.float64)

    @jax.jit
    @jax.grad
    def gradients(adapter):
        return jnp.sum(jnp.sin(forward(lj.join(adapter, base), x)))

    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.device_get(gradients(adapter)["w"])
    assert not gradient["a"][0, 2:].any() and not gradient["b"][0, 2:].any()
    assert gradient["a"][0, :2].any() and gradient["b"][0, :2].any()


@pytest.mark.parametrize("init", [lj.init.kaiming, lj.init.gaussian, lj.init.orthogonal])
def test_initialisers_leave_the_function_alone(init):
    tree = lj.lorafy(KERNEL, [lj.LoraRule(targets=["q_proj"], rank=4, alpha=3.0, init=init)])
    assert_close(lj.merge(tree), KERNEL, 1e-6)
    weight = tree["q_proj"]["kernel"]
    a, b = np.asarray(weight.a), np.asarray(weight.b)
    assert a.any() and b.any() == (init is lj.init.orthogonal)


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match="even rank"):
        lj.lorafy(KERNEL, [lj.LoraRule(targets=["q_proj"], rank=3, init=lj.init.orthogonal)])


@pytest.mark.parametrize("init", [lj.init.pissa, lj.init.fast_pissa(), lj.init.olora])
def test_a_rank_beyond_the_kernels_is_refused(init):
    """The message is about the user's rank, not about shapes of factors."""
    with pytest.raises(ValueError, match="rank 6 is too large: a kernel of 5 by . has 5"):
        lj.lorafy(KERNEL, [lj.LoraRule(targets=["q_proj"], rank=6, init=init)])


def test_an_initialiser_of_ones_own_is_checked():
    def wrong(key, shape, dtype):
        return jnp.zeros((1, 1), dtype), jnp.zeros(shape.b, dtype)

    with pytest.raises(
        ValueError, match=r"wrong returned A of shape \(1, 1\).*expected .*\(5, 2\)"
    ):
        lj.lorafy(KERNEL, [lj.LoraRule(targets=["q_proj"], rank=2, init=wrong)])


def test_merging_rounds_once():
    """In bf16, W + s·AB is summed in fp32: nearer to the exact sum than two roundings get."""
    base = draw(1, (31, 37), jnp.bfloat16)
    tree = lj.lorafy({"w": base}, [lj.LoraRule(targets=["w"], rank=2, alpha=3.0)])
    weight = tree["w"].replace(b=draw(2, (2, 37)))
    exact = np.asarray(base, np.float64) + 1.5 * np.asarray(weight.a, np.float64).T @ np.asarray(
        weight.b, np.float64
    )
    assert_identical(lj.merge({"w": weight})["w"], exact.astype(jnp.bfloat16))
    assert weight.merged().dtype == jnp.bfloat16


def test_boxed_leaves_keep_their_boxes_and_paths_skip_them():
    boxed = {"q_proj": {"kernel": nn.Partitioned(KERNEL["q_proj"]["kernel"], names=("in", "out"))}}
    tree = lj.lorafy(boxed, [RULE])
    assert set(lj.split(tree)[0]) == {"q_proj/kernel"}
    assert tree["q_proj"]["kernel"].names == ("in", "out")
    assert_identical(lj.strip(tree), boxed)
    _, state = nnx.split(NnxModel(nnx.Rngs(0)))
    state = lj.lorafy(state, [lj.LoraRule(targets=["up"], rank=2)])
    assert isinstance(state["up"]["kernel"], nnx.Param)


def test_lorafy_runs_under_jit():
    tree = jax.jit(lambda params: lj.lorafy(params, [RULE]))(KERNEL)
    assert_identical(tree, lj.lorafy(KERNEL, [RULE]))


def test_an_adapted_tree_is_not_adapted_again():
    with pytest.raises(ValueError, match="already adapted.*strip"):
        lj.lorafy(lj.lorafy(KERNEL, [RULE]), [RULE])


@pytest.mark.parametrize(
    "use",
    [
        lambda w: jnp.ones((3, 5)) @ w,
        lambda w: w + 1,
        lambda w: w.T @ jnp.ones(5) if hasattr(w, "T") else w @ jnp.ones(7),
        lambda w: jnp.sin(w),
        lambda w: np.asarray(w),
        lambda w: w[0],
    ],
)
def test_a_node_used_as_an_array_says_what_to_do(use):
    with pytest.raises(TypeError, match=r"LoraWeight.*lora_jax\.adapt"):
        use(lj.lorafy(KERNEL, [RULE])["q_proj"]["kernel"])


def test_nodes_let_anything_through():
    tree = lj.lorafy(KERNEL, [RULE])
    for value in (None, True, "text"):
        mapped = jax.tree.map(lambda _, value=value: value, tree)
        assert mapped["q_proj"]["kernel"].a is value


def test_join_refuses_what_does_not_belong():
    adapter, base = lj.split(lj.lorafy(KERNEL, [RULE]))
    with pytest.raises(ValueError, match="q_prj/kernel.*most similar.*q_proj/kernel"):
        lj.join({"q_prj/kernel": adapter["q_proj/kernel"]}, base)
    both = [RULE, lj.TrainRule(targets=["bias"])]
    _, base = lj.split(lj.lorafy(KERNEL, both))
    with pytest.raises(ValueError, match="no arrays for the adapted weight 'q_proj/bias'"):
        lj.join(adapter, base)


@pytest.mark.parametrize("half", [True, False], ids=["base", "adapted"])
@pytest.mark.parametrize(
    "rules",
    [
        lambda rank: [lj.LoraRule(targets=["q_proj"], rank=rank)],
        pytest.param(
            lambda rank: [lj.LoraRule(targets=["q_proj"], rank=rank, xs=True)],
            marks=pytest.mark.slow,
        ),
        lambda rank: [lj.TrainRule(targets=["kernel"], rows=range(rank))],
    ],
    ids=["LoRA", "LoRA-XS", "rows"],
)
def test_join_refuses_another_rank(rules, half):
    tree, other = (lj.lorafy(KERNEL, rules(rank)) for rank in (2, 3))
    adapter, base = lj.split(other)[0], lj.split(tree)[1] if half else tree
    with pytest.raises(
        ValueError, match="q_proj/kernel.*has the shape.*3.*in the adapter, but.*2.*in the tree"
    ):
        lj.join(adapter, base)
    stacked = jax.tree.map(lambda x: np.stack([x, x]), lj.split(tree)[0])
    joined = jax.jit(jax.vmap(lambda adapter: lj.merge(lj.join(adapter, base))))(stacked)
    assert joined["q_proj"]["kernel"].shape == (2, 5, 7)


@pytest.mark.parametrize(
    "rules",
    [
        [
            lj.LoraRule(targets=["q_proj", "o_proj"], rank=2, share_a=True),
            lj.TrainRule(targets=["bias"]),
        ],
        [lj.LoraRule(targets=["layers"], rank=3, dora=True)],
        pytest.param(
            [
                lj.LoraRule(
                    targets=["layers", "q_proj"], rank=2, tinylora=True, u=3, weight_tying=1.0
                )
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["LoRA with a shared A", "DoRA of a stack", "tied vectors"],
)
def test_stacked_adapters(rules):
    """Adapters that are stacked along leading axes, joined and mapped over, are each its own."""
    params = {
        "q_proj": {"kernel": draw(1, (5, 7)), "bias": draw(2, (7,))},
        "o_proj": {"kernel": draw(3, (5, 3))},
        "layers": {"kernel": draw(4, (4, 5, 7))},
    }
    tree = lj.lorafy(params, rules)
    _, base = lj.split(tree)
    draws = [lj.split(with_random_factors(tree, seed))[0] for seed in range(6)]
    stacked = jax.tree.map(
        lambda *arrays: array(np.stack(arrays).reshape(2, 3, *arrays[0].shape)), *draws
    )

    def run(params, x):
        q = x @ params["q_proj"]["kernel"] + params["q_proj"]["bias"]
        return q + (x @ params["o_proj"]["kernel"]).sum() + x @ params["layers"]["kernel"]

    joined = lj.join(stacked, base)
    assert_identical(lj.split(joined)[0], stacked)
    axes = jax.tree.map(lambda a, b: 0 if a.ndim > b.ndim else None, joined, tree)
    forward = jax.vmap(jax.vmap(lj.adapt(run), (axes, None)), (axes, None))
    x = draw(5, (5,))
    alone = jax.jit(lj.adapt(run))
    each = np.stack([alone(lj.join(one, base), x) for one in draws])
    assert_close(np.asarray(jax.jit(forward)(joined, x)).reshape(6, 4, 7), each, 1e-5)
    name, parts = next(iter(stacked.items()))
    wrong = {**stacked, name: {**parts, **{part: array[0] for part, array in [*parts.items()][:1]}}}
    with pytest.raises(ValueError, match="has the shape .*in the adapter, but .*in the tree"):
        lj.join(wrong, base)


@pytest.mark.slow
def test_a_layer_of_lora_xs_trains_no_number_beyond_its_rank():
    """Its file would hold numbers that no product reads, and norms would count them."""
    rules = [lj.LoraRule(targets=["up"], layers=[n], rank=2 * n + 1, xs=True) for n in (0, 1)]
    latent = lj.lorafy({"up": {"kernel": draw(1, (2, 5, 7))}}, rules)["up"]["kernel"].latent
    expected = np.ones((2, 3, 3), bool)
    expected[0] = np.arange(9).reshape(3, 3) == 0
    np.testing.assert_array_equal(np.asarray(latent) != 0, expected)


@pytest.mark.slow
def test_dora_leaves_a_layer_without_an_adapter_as_it_is():
    kernel, x = draw(1, (2, 5, 7)), draw(2, (3, 5))
    rules = [lj.LoraRule(targets=["up"], layers=[1], rank=2, dora=True)]
    tree = with_random_factors(lj.lorafy({"up": {"kernel": kernel}}, rules))
    both = jax.jit(lj.adapt(lambda p, x: [x @ p["up"]["kernel"][n] for n in (0, 1)]))(tree, x)
    expected = [np.asarray(x) @ layer for layer in np.asarray(kernel)]
    assert_close(both[0], expected[0], 1e-6)
    assert np.abs(both[1] - expected[1]).max() > 0.1


def test_the_summary_says_that_dropout_needs_a_key():
    rules = [lj.LoraRule(targets=["q_proj"], rank=2, dropout=0.1)]
    line = lj.summary(lj.lorafy(KERNEL, rules))
    assert line.endswith("|| dropout 0.1 (needs dropout_key)")
    assert lj.summary(lj.lorafy(KERNEL, rules), in_training=True).endswith("|| dropout 0.1")
    assert "dropout" not in lj.summary(lj.lorafy(KERNEL, [RULE]))


def test_the_base_alone_runs():
    _, base = lj.split(lj.lorafy(KERNEL, [RULE]))
    x = draw(3, (3, 5))
    y = lj.adapt(lambda p, x: x @ p["q_proj"]["kernel"])(lj.join({}, base), x)
    assert_identical(y, x @ KERNEL["q_proj"]["kernel"])


def test_swap_refuses_another_adaptation():
    tree = lj.lorafy(KERNEL, [RULE])
    other = lj.lorafy(KERNEL, [RULE, lj.TrainRule(targets=["bias"])])
    with pytest.raises(ValueError, match="q_proj/bias"):
        lj.swap(tree, other)
    turned = lj.LoraRule(targets=["q_proj"], in_axes=[1], out_axes=[0])
    with pytest.raises(ValueError, match="in axes"):
        lj.swap(tree, lj.lorafy(KERNEL, [turned]))
    with pytest.raises(ValueError, match="Call lorafy first"):
        lj.swap(tree, KERNEL)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="same path, 'a/w'"):
        lj.lorafy({"a/w": jnp.ones((5, 7)), "a": {"w": jnp.ones((5, 7))}}, [RULE])
