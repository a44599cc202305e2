"""A batch of which each example has its own adapter, evaluated at once or declined."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import models
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.per_example.axes import ExampleAxes
from lora_jax.adapt.traces import EagerTraces
from lora_jax.adapt.transform import RULES, run
from lora_jax.core.factored import ExamplesError
from lora_jax.lorafy import map_nodes
from lora_jax.models.families import family_of
from lora_jax.models.layers.cache import Cache, init_cache
from tests.adapt.examples import at_once, bank, check, slots
from tests.models import tiny
from tests.support import array, assert_close, draw, numpy_init, over

IDS = [2, 0, 2, 1]  # the slots of four examples
WEIGHTS = {
    # by name: the shape, the in axes, the out axes
    "up": ((6, 10), [0], [1]),
    "down": ((10, 6), [0], [1]),
    "table": ((23, 6), [0], [1]),
    "stack": ((3, 6, 6), [1], [2]),
    "kernel": ((3, 6, 10), [0, 1], [2]),
    "heads": ((6, 2, 5), [0], [1, 2]),
}


@functools.cache
def trees():
    """Three slots over one base."""
    params = {name: draw(i, WEIGHTS[name][0]) for i, name in enumerate(WEIGHTS)}
    how = {"alpha": 3.0, "rank": 2, "init": numpy_init}
    rules = [
        lj.LoraRule(targets=[name], in_axes=ins, out_axes=outs, **how)
        for name, (_, ins, outs) in WEIGHTS.items()
    ]
    return slots(params, rules)


X = draw(90, (4, 5, 6))  # [n, seq, d]
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 23, (4, 5), np.int32)


def attention(p, x):
    q = jnp.einsum("nsd,dhk->nshk", x, p["heads"])
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, q) / 3
    seen = jnp.tril(jnp.ones((5, 5), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, q).reshape(4, 5, 10) @ p["down"]


def block(p, x):
    """LayerNorm, two kinds of own derivatives, remat, noise that is the same for each adapter."""

    def inner(p, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x + jax.random.normal(jax.random.key(0), x.shape)
        return _gated(jax.nn.relu(x @ p["up"])) @ p["down"]

    return x + jax.checkpoint(inner)(p, x)


@jax.custom_vjp
def _gated(x):
    return x * jax.nn.sigmoid(x)


_gated.defvjp(lambda x: (_gated(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


def flattened(p, x):
    """[n·seq, d], then [seq·n, d], then features first with the weight on the left.

    A weight is cast, as modules cast theirs to the type that they compute in.
    """
    up = p["up"].astype(jnp.bfloat16).astype(jnp.float32)
    y = jax.nn.gelu(x.reshape(20, 6) @ up).reshape(4, 5, 10).swapaxes(0, 1)
    z = (y.reshape(20, 10) @ p["down"]).reshape(5, 4, 6)
    return lax.dot_general(p["up"], z, (((0,), (2,)), ((), ())))  # [out, seq, n]


def recurrent(p, x):
    """A loop over time in a loop over layers; the state starts as zeros for all."""

    def layer(x, w):
        step = lambda h, row: ((h := jnp.tanh(row + h @ w)), h)  # noqa: E731
        return lax.scan(step, jnp.zeros((4, 6)), x)[1], None

    return lax.scan(layer, x, p["stack"])[0]


def language_model(p, tokens):
    """An adapted table that is looked up and tied, loops, a branch, a choice of positions."""
    x = p["table"].at[tokens].get(mode="clip")
    x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["stack"][1]), x)
    x = lax.cond(jnp.arange(3)[1] > 0, lambda x: x @ p["stack"][0], lambda x: x * 0, x)
    for kernel in p["stack"]:
        x = jnp.tanh(x @ kernel)
    last = jnp.argmax(tokens, axis=1)
    picked = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([picked @ p["table"].T, x.sum(1) @ p["table"].T], axis=1)


def other_axes(p, x):
    """Everything that mixes, along axes that hold no examples."""
    y = jnp.cumsum(jnp.sort(x @ p["up"], axis=1), axis=1)[:, ::-1]
    y = jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :5] + lax.top_k(y, 10)[0]
    y = y.at[:, 2].set(0.5).at[:, 1].add(y[:, 3])
    y = lax.dynamic_update_slice(y, y[:, 1:3], (0, jnp.int32(2), 0))
    y = y + lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME")
    one, two = jnp.split(jnp.roll(y, 1, axis=1), 2, axis=2)
    return jnp.stack([one, two]).max(0) + jnp.fft.fft(one, axis=2).real


def convolved(p, x):
    numbers = ("NWC", "WIO", "NCW")
    y = lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=numbers)
    return jax.vmap(lambda row: row.T @ p["down"])(y)


FOLLOWED = {
    # by name: the function, its batch, the axis of the examples in it, and in the result
    "attention": (attention, X, 0, 0),
    "block": (block, X, 0, 0),
    "flattened": (flattened, X, 0, 2),
    "recurrent": (recurrent, array(np.asarray(X).swapaxes(0, 1)), 1, 1),
    "language model": (language_model, TOKENS, 0, 0),
    "other axes": (other_axes, X, 0, 0),
    "convolved": (convolved, X, 0, 0),
}


@over("case", FOLLOWED, often=["flattened", "language model"])
def test_each_example_has_its_own_adapter(case):
    fn, x, in_axis, out_axis = FOLLOWED[case]
    check(fn, trees(), IDS, [x], [in_axis], out_axis)


def _batch_norm(p, x):
    y = x @ p["up"]
    return (y - y.mean((0, 1))) / jnp.sqrt(y.var((0, 1)) + 1e-5)


def _until_done(p, x):
    go_on = lambda state: ~jnp.all(state[1])  # noqa: E731
    step = lambda state: ((y := state[0] @ p["stack"][0]), y.sum((1, 2)) > 0)  # noqa: E731
    return lax.while_loop(go_on, step, (x, jnp.zeros(4, bool)))[0]


def _sorted_experts(p, x):
    expert = jnp.argmax(x[:, 0], axis=-1) % 3
    order = jnp.argsort(expert)
    return lax.ragged_dot(x[order, 0], p["stack"], jnp.bincount(expert, length=3))


def _swapped(p, x):
    """A state whose examples lie along another axis after each step."""
    step = lambda y, _: ((y @ p["stack"][0]).swapaxes(0, 1), None)  # noqa: E731
    return lax.scan(step, x[:, :4], None, 2)[0]


DECLINED = {
    # the function of (p, x [n, seq, d]), and what the reason names
    "batch norm": (_batch_norm, "reduce_sum.*reduces over the examples"),
    "mean over the batch": (lambda p, x: (x - x.mean(0)) @ p["up"], "reduce_sum"),
    "sorted": (lambda p, x: jnp.sort(x @ p["up"], axis=0), "sort"),
    "accumulated": (lambda p, x: jnp.cumsum(x @ p["up"], axis=0), "cumsum"),
    "reversed": (lambda p, x: x[::-1] @ p["up"], "rev"),
    "flipped": (lambda p, x: jnp.flip(x @ p["up"], 0), "rev"),
    "rolled": (lambda p, x: jnp.roll(x, 1, axis=0) @ p["up"], "slice"),
    "rolled by a step": (lambda p, x: jnp.roll(x.reshape(20, 6), 1, 0) @ p["up"], "slice"),
    "joined": (lambda p, x: jnp.concatenate([x, x], 0) @ p["up"], "concatenate"),
    "contrasted": (lambda p, x: (y := x[:, 0] @ p["up"]) @ y.T, "dot_general.*other examples"),
    "permuted": (lambda p, x: x[jnp.argsort(x[:, 0, 0])] @ p["up"], "sort"),
    "permuted by a table": (lambda p, x: x[jnp.array([1, 0, 3, 2])] @ p["up"], "gather"),
    "permuted by itself": (lambda p, x: (x @ p["up"])[jnp.int32(x[:, 0, 0]) % 4], "gather.*index"),
    "looked up by others": (
        lambda p, x: jnp.take_along_axis(
            (y := (x @ p["up"])[:, :4, 0]), jnp.int32(y.T) % 4, axis=1
        ),
        "gather.*indices of other examples",
    ),
    "scattered to others": (
        lambda p, x: jax.vmap(lambda y, at: y.at[at].add(1.0))(
            (y := (x @ p["up"])[:, :4, 0]), jnp.int32(y.T) % 4
        ),
        "scatter-add.*of other examples",
    ),
    "scattered": (
        lambda p, x: jnp.zeros((9, 5, 10)).at[jnp.int32(x[:, 0, 0])].add(x @ p["up"]),
        "scatter-add",
    ),
    "one of them": (lambda p, x: x + x[0] @ p["stack"][0], "slice.*some of the examples"),
    "one of them, by index": (
        lambda p, x: x + lax.dynamic_index_in_dim(x, jnp.int32(x.shape[1]) - 3) @ p["stack"][0],
        "dynamic_slice",
    ),
    "experts": (_sorted_experts, "sort"),
    "until all are done": (_until_done, "reduce_and"),
    "one by one": (lambda p, x: lax.map(lambda row: row @ p["up"], x), "scan"),
    "axes swapped": (_swapped, "different axes"),
    "transposed to itself": (
        lambda p, x: (y := x[:, :4] @ p["up"]) + y.swapaxes(0, 1),
        "add.*different axes",
    ),
    "examples split": (lambda p, x: x.reshape(2, 2, 5, 6) @ p["up"], "reshape.*splits"),
    "of no example": (lambda p, x: x @ (p["up"].T @ jnp.ones((6, 6))).T, "same for all examples"),
    "formed": (lambda p, x: x @ (p["up"] * 2), "mul.*forms an adapted weight"),
    "its norm": (lambda p, x: x @ p["up"] / jnp.sum(p["up"] ** 2), "forms an adapted weight"),
    "a row of it": (lambda p, x: x[..., :1] * p["up"][2, :6], "row of an adapted weight"),
    "two of them": (lambda p, x: x @ (p["up"] @ p["down"]), "by another one"),
    "unknown": (lambda p, x: x + lax.psum(x @ p["stack"][0], "i"), "psum"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_mixed_examples_are_declined(case):
    fn, why = DECLINED[case]
    if case == "unknown":
        fn = functools.partial(_over_devices, fn)
        why = "shard_map"
    with pytest.raises(ExamplesError, match=why):
        at_once(fn, ExampleAxes((None, 0), 0), bank(trees(), IDS), X)


def _over_devices(fn, p, x):
    mesh, spec = jax.make_mesh((1,), ("i",)), jax.sharding.PartitionSpec()
    return jax.shard_map(fn, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(p, x)


def test_results_have_the_axes_that_were_asked_for():
    """Checks that only the axes that are found are accepted; unused values may mix examples."""

    def fn(p, x, *, bias):
        unused = x.mean(0) @ p["up"]
        del unused
        return {"y": (x @ p["up"] + bias[:, None]).swapaxes(0, 1), "n": jnp.ones(4), "three": 3}

    tree, bias = bank(trees(), IDS), jnp.ones((4, 1))
    asked = {"y": 1, "n": None, "three": None}
    for n in (None, 0):  # what is the same for all has any axis
        at_once(fn, ExampleAxes((None, 0), {**asked, "n": n}), tree, X, bias=bias)
    with pytest.raises(ExamplesError, match="along axis 1, but out_axes says 0"):
        at_once(fn, ExampleAxes((None, 0), {**asked, "y": 0}), tree, X, bias=bias)
    with pytest.raises(ExamplesError, match="is merged with another axis"):
        at_once(lambda p, x: (x @ p["up"]).reshape(20, 10), ExampleAxes((None, 0), 0), tree, X)
    with pytest.raises(ValueError, match="rows|adapters for 4 examples, but the batch has 3"):
        at_once(fn, ExampleAxes((None, 0), asked), tree, X[:3], bias=bias[:3])


def test_eager_calls_tell_the_places_of_examples_apart():
    """Compiled equations that were made for examples along one axis do not serve another."""

    def fn(p, x):
        return jax.jit(jnp.dot)(jnp.tanh(x @ p["up"]), p["down"])

    tree, eager, single = bank(trees(), IDS), EagerTraces(), jax.jit(lj.adapt(fn))
    x = draw(91, (4, 4, 6))
    for axis in (0, 1, 0):
        run_ = functools.partial(run, fn, Interpreter(RULES), (tree, x), {}, None, eager)
        ours = run_(ExampleAxes((None, axis), axis))
        each = [single(one, x) for one in trees()]
        rows = [np.take(each[slot], [i], axis) for i, slot in enumerate(IDS)]
        assert_close(ours, np.concatenate(rows, axis), 1e-5)


def test_a_weight_of_each_example_is_never_formed():
    """Without axes, in a rule of the caller's, by merge: nothing takes it for one weight."""
    tree = bank(trees(), IDS)
    with pytest.raises(ExamplesError, match="dot_general"):
        lj.adapt(lambda p, x: x @ p["up"])(tree, X)
    with pytest.raises(ExamplesError, match="adapter for each example"):
        lj.merge(tree)


@pytest.mark.parametrize("variant", ["dora", "bias_on_b"])
def test_a_vector_of_one_adapter_is_not_for_all_examples(variant):
    """Each example would get the magnitude or the bias of the first one's adapter."""
    rule = lj.LoraRule(targets=["kernel"], rank=2, **{variant: True})
    of_slots = slots({"kernel": draw(0, (6, 10))}, [rule])
    node = bank(of_slots, IDS)["kernel"]
    tree = {"kernel": node.replace(arrays=of_slots[0]["kernel"].arrays | node.arrays)}
    with pytest.raises(ExamplesError, match="'kernel' has a magnitude or a bias on B"):
        at_once(lambda p, x: x @ p["kernel"], ExampleAxes((None, 0), 0), tree, X)


@over("n", [1, 4], often=["1"])
def test_gradients_reach_each_adapter_from_its_own_examples(n):
    """Four of them eagerly; and under jit one example, whose axis is like others of size one."""
    ids, x = IDS[:n], X[:n]
    fn = lambda p, x: jnp.sin(jax.nn.relu(x @ p["up"]).reshape(n * 5, 10) @ p["down"])  # noqa: E731
    one = lambda p, x: (fn(p, x).reshape(n, 5, 6) * x).sum((1, 2))  # noqa: E731
    adapter, base = lj.split(bank(trees(), ids))
    factors = {k: {"a": v["a"], "b": v["b"]} for k, v in adapter.items() if k in ("up", "down")}

    def loss(factors):
        tree = lj.join({k: adapter[k] | factors.get(k, {}) for k in adapter}, base)
        return at_once(one, ExampleAxes((None, 0), 0), tree, x).sum()

    def theirs(parts):
        joined = [lj.join({**lj.split(t)[0], **p}, lj.split(t)[1]) for t, p in parts]
        return sum(lj.adapt(one)(joined[s], x)[i] for i, s in enumerate(ids))

    each = [{k: lj.split(t)[0][k] for k in factors} for t in trees()]
    of_each = jax.jit(jax.grad(lambda each: theirs(list(zip(trees(), each, strict=True)))))(each)
    want = jax.tree.map(lambda *g: np.concatenate(g), *of_each)
    gradient = jax.grad(loss) if n == 4 else jax.jit(jax.grad(loss))
    assert_close(gradient(factors), want, 1e-5)


ENCODER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 23,
    "max_position_embeddings": 32,
}
MODELS = {
    "llama": {
        "model_type": "llama",
        **ENCODER,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 23}
    | {"n_positions": 32},
    "bert": {"model_type": "bert", **ENCODER},
}
OF_CACHE = Cache(1, 1, 0, None, 0, None)


@functools.cache
def _model(case):
    """A model, its configuration and three slots; the tied table of Llama is adapted too."""
    config = models.read_config(MODELS[case])
    model = family_of(config.model_type).module(config, jnp.float32, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map_with_path(
        lambda path, leaf: array(tiny.draw(RNG, jax.tree_util.keystr(path), leaf.shape)),
        shapes,
    )
    how = {"alpha": 3.0, "init": numpy_init}
    rules = [lj.LoraRule(targets="all-linear", rank=2, **how)]
    if case == "llama":
        rules.append(lj.LoraRule(targets=["embed_tokens"], rank=3, **how))
    return model, config, slots(params, rules)


def _step(case):
    """A step of decoding, its arguments with a filled cache, and their axes."""
    model, config, slots_of = _model(case)
    cache = init_cache(config, 4, 9)
    apply = lambda p, tokens, cache: model.apply({"params": p}, tokens, cache=cache)  # noqa: E731
    _, cache = jax.jit(apply)(lj.strip(slots_of[0]), TOKENS, cache)
    return apply, (TOKENS[:, :1], cache), (0, OF_CACHE), (0, OF_CACHE)


@over("case", MODELS, often=[])
def test_models_are_followed(case):
    model, _, slots_of = _model(case)
    mask = np.arange(5) < np.array([[5], [3], [4], [5]])

    def fn(p, tokens, mask):
        return jax.tree.leaves(model.apply({"params": p}, tokens, mask))

    check(fn, slots_of, IDS, [TOKENS, mask], [0, 0], tolerance=1e-5)
    if case != "bert":
        apply, args, in_axes, _ = _step(case)

        def decode(p, tokens, cache):
            logits, new = apply(p, tokens, cache)
            return logits, new.key, new.value, new.length

        check(decode, slots_of, IDS, args, in_axes, (0, 1, 1, 0))


@pytest.mark.slow
def test_a_step_of_decoding_copies_no_more_than_the_base():
    """vmap over examples does: it turns the cache's axes around, and scatters into it."""
    apply, args, in_axes, out_axes = _step("llama")
    tree = bank(_model("llama")[2], IDS)

    def counts(fn, tree):
        """Scatters, and transposes of a layer's cache or more."""
        text = jax.jit(fn).lower(tree, *args).as_text()
        moved = re.findall(r"stablehlo\.transpose.* -> tensor<([0-9x]+)x", text)
        sizes = [np.prod(list(map(int, shape.split("x")))) for shape in moved]
        return text.count("stablehlo.scatter"), sum(n >= args[1].key[0].size for n in sizes)

    axes = ExampleAxes((None, *in_axes), out_axes)
    base = counts(apply, lj.strip(tree))
    assert counts(lambda tree, *args: at_once(apply, axes, tree, *args), tree) == base

    def vmapped(tree, tokens, cache):
        wide = jax.tree.map(
            lambda x, axis: x if axis is None else jnp.expand_dims(x, axis + 1),
            (tokens, cache),
            in_axes,
            is_leaf=lambda x: x is None,
        )

        def one(i, tokens, cache):
            own = map_nodes(
                lambda _, v: v.replace(lambda_d=v.lambda_d * v.rows[i], rows=None), tree
            )
            return lj.adapt(apply)(own, tokens, cache)

        return jax.vmap(one, (0, *in_axes), out_axes)(jnp.arange(4), *wide)

    scatters, transposes = counts(vmapped, tree)
    assert scatters > base[0] and transposes > base[1]
