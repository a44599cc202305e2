"""Tests of `adapt` besides the laws: arguments, merging, refusals, dropout, compilations."""

import functools
import re
import warnings

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt.rules.axis_maps import regrouped
from lora_jax.adapt.rules.layout import labels_after
from tests.support import (
    PROGRAMS,
    array,
    assert_close,
    assert_identical,
    draw,
    numpy_init,
    with_random_factors,
)

RULE = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, init=numpy_init)


def tree_of(*shape, rule=RULE, dtype=jnp.float32):
    return with_random_factors(lj.lorafy({"a": {"kernel": draw(1, shape, dtype)}}, [rule]))


X = draw(9, (3, 5))
ONES = np.ones((1, 50), np.float32)


def test_an_adapted_function_is_pickled_where_a_jitted_one_is():
    """And a copy runs, with its rules, before and after a call."""
    fn = lambda params, x: jnp.sin(x @ params["a"]["kernel"])  # noqa: E731
    twice = lj.adapt(fn, primitives={"sin": lambda y: 2 * y})
    for forward in (lj.adapt(fn, strict=True), jax.jit(lj.adapt(fn)), twice):
        tree = tree_of(5, 7)
        want = forward(tree, X)
        copied = cloudpickle.loads(cloudpickle.dumps(forward))
        assert_identical(copied(tree, X), want)
    with pytest.raises(lj.MergeError):
        strict = cloudpickle.loads(cloudpickle.dumps(lj.adapt(merging, strict=True)))
        strict(tree, X)


def merging(params, x):
    return x @ jnp.tanh(params["a"]["kernel"])


@pytest.mark.parametrize(
    ("dora", "everything"),
    [
        pytest.param(False, False, id="LoRA-the kernel", marks=pytest.mark.slow),
        pytest.param(False, True, id="LoRA-A and B, too", marks=pytest.mark.slow),
        pytest.param(True, False, id="DoRA-the kernel", marks=pytest.mark.slow),
        pytest.param(True, True, id="DoRA-A and B, too"),
    ],
)
def test_kernels_that_wait_in_the_memory_of_the_host(dora, everything, float64):
    """Kernels that a function moves to the device bring their adapters. Gradients are as usual."""
    rule = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, dora=dora, dtype=jnp.float64)
    tree = with_random_factors(
        lj.lorafy({"a": {"kernel": draw(1, (3, 5, 5), jnp.float64)}}, [rule])
    )

    def run(params, x):
        def layer(x, kernel):
            kernel = 2 * jax.device_put(kernel, jax.memory.Space.Device)
            return jnp.tanh(x @ kernel), None

        return lax.scan(layer, x, params["a"]["kernel"])[0]

    def loss(adapter, base):
        return jnp.sum(lj.adapt(run, strict=True)(lj.join(adapter, base), x))

    x = draw(9, (3, 5), jnp.float64)
    halves = lj.split(tree)
    want = jax.jit(jax.value_and_grad(loss))(*halves)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    halves = (
        jax.device_put(halves[0], host) if everything else halves[0],
        jax.device_put(halves[1], host),
    )
    got = jax.jit(jax.value_and_grad(loss))(*halves)
    assert_close(got, want, 1e-12)


@pytest.mark.slow
def test_only_a_narrow_product_is_taken_again_for_its_magnitude():
    """One of at most a third of its inputs; to take a wider one again would cost too much time."""

    def products(fan_in, fan_out):
        rule = lj.LoraRule(targets=["a"], rank=2, dora=True)
        adapter, base = lj.split(lj.lorafy({"a": {"kernel": draw(1, (fan_in, fan_out))}}, [rule]))
        x = draw(2, (3, fan_in))

        def loss(adapter):
            run = lj.adapt(lambda params, x: x @ params["a"]["kernel"])
            return jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))

        return str(jax.make_jaxpr(jax.grad(loss))(adapter)).count("dot_general")

    assert products(66, 22) > products(66, 23)


def test_everything_but_arrays_reaches_the_function_untouched():
    seen = {}

    def fn(params, x, flag, name, nothing, call, *, size):
        seen.update(flag=flag, name=name, nothing=nothing, call=call, size=size)
        return call(x @ params["a"]["kernel"]).reshape(size, -1), {"name": name, "n": 3}

    y, extra = lj.adapt(fn)(tree_of(5, 7), X, True, "text", None, jnp.tanh, size=3)
    assert seen == {"flag": True, "name": "text", "nothing": None, "call": jnp.tanh, "size": 3}
    assert extra == {"name": "text", "n": 3} and y.shape == (3, 7)


def test_the_adapted_function_keeps_name_and_docstring():
    def loss(params):
        """The loss."""

    assert (lj.adapt(loss).__name__, lj.adapt(loss).__doc__) == ("loss", "The loss.")


def test_a_plain_tree_is_an_error():
    with pytest.raises(TypeError, match="no argument contains an adapted tree"):
        lj.adapt(lambda p, x: x @ p)(draw(1, (5, 7)), X)


def test_trained_leaves_alone_are_enough():
    tree = lj.lorafy({"a": {"kernel": draw(1, (5, 7))}}, [lj.TrainRule(targets=".*")])
    run = lj.adapt(lambda p, x: x @ p["a"]["kernel"])
    assert_identical(run(tree, X), X @ draw(1, (5, 7)))
    _, base = lj.split(tree)
    with pytest.raises(ValueError, match=r"'a/kernel' trains in full.*join"):
        run(base, X)


def test_a_weight_that_comes_out_is_the_node_that_went_in():
    tree = tree_of(5, 7)
    out, y = lj.adapt(lambda p, x: (p, x @ p["a"]["kernel"]), strict=True)(tree, X)
    assert out["a"]["kernel"] is tree["a"]["kernel"]


def elementwise(p, x):
    return x @ jnp.sin(p["a"]["kernel"])


def test_merging_warns_once_with_path_primitive_and_line():
    tree = tree_of(5, 7)
    run = lj.adapt(elementwise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        y = run(tree, X)
        run(tree, X)
    assert_close(y, elementwise(lj.merge(tree), X), 1e-5)
    (warning,) = [w for w in caught if issubclass(w.category, lj.MergeWarning)]
    line = elementwise.__code__.co_firstlineno + 1
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert "'a/kernel' meets 'sin'" in str(warning.message)


def test_strict_raises_instead():
    with pytest.raises(lj.MergeError, match=r"'a/kernel' meets 'sin' at .*test_adapt.py"):
        lj.adapt(elementwise, strict=True)(tree_of(5, 7), X)


def test_dead_uses_say_nothing():
    def fn(p, x):
        jnp.sum(p["a"]["kernel"] ** 2)
        jax.jit(lambda w: (x, jnp.sum(w**2)))(p["a"]["kernel"])
        return x @ p["a"]["kernel"]

    lj.adapt(fn, strict=True)(tree_of(5, 7), X)


def test_custom_derivatives_are_merged_at_their_boundary(float64):
    """The user's derivative survives: here it is three times the true one."""

    @jax.custom_vjp
    def tripled(x, w):
        return x @ w

    tripled.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda res, g: (3 * g @ res[1].T, 3 * res[0].T @ g)
    )
    rule = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, dtype=jnp.float64, init=numpy_init)
    tree = tree_of(5, 7, rule=rule, dtype=jnp.float64)
    adapter, base = lj.split(tree)
    x = draw(9, (3, 5), jnp.float64)

    def gradients(run):
        loss = lambda adapter, x: jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(adapter, x)

    fn = lambda p, x: tripled(x, p["a"]["kernel"])  # noqa: E731
    with pytest.warns(lj.MergeWarning, match="custom_vjp"):
        ours = gradients(lj.adapt(fn))
    theirs = gradients(lambda p, x: fn(lj.merge(p), x))
    assert_close(ours, theirs, 1e-9)


def test_custom_derivatives_elsewhere_are_kept():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 5 * tangents[0]))
    tree = tree_of(5, 7)
    forward = lj.adapt(lambda p, x: f(x @ p["a"]["kernel"]).sum())
    grad = jax.jit(jax.grad(lambda x: forward(tree, x)))(X)
    kernel = np.asarray(lj.merge(tree)["a"]["kernel"])
    assert_close(grad, 5 * np.ones((3, 7), np.float32) @ kernel.T, 1e-5)


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        ((3, 5, 7), lambda w, x: jnp.einsum("bi,eio->bo", x, w)),  # sums over a batch axis
        ((5, 3, 7), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w)),  # DenseGeneral, default roles
        ((5, 7), lambda w, x: jnp.einsum("bi,io->bio", x, w)),  # in and out are free
    ],
)
def test_a_use_against_the_roles_is_refused(shape, use):
    with pytest.raises((lj.RoleError, lj.MergeError)) as caught:
        lj.adapt(lambda p, x: use(p["a"]["kernel"], x), strict=True)(tree_of(*shape), X)
    assert "a/kernel" in str(caught.value) and "test_adapt.py" in str(caught.value)


def test_role_error_says_what_was_recorded_and_done():
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["a"]["kernel"])  # noqa: E731
    message = r"5: batch, 3: in, 7: out.*contracts the axes of sizes \[5\].*in_axes=…"
    with pytest.raises(lj.RoleError, match=message):
        lj.adapt(fn)(tree_of(5, 3, 7), X)


def test_stop_gradient_stops_the_adapter_too():
    tree = tree_of(5, 7)
    adapter, base = lj.split(tree)
    fn = lambda p, x: x @ lax.stop_gradient(p["a"]["kernel"])  # noqa: E731
    grad = jax.grad(lambda ad: lj.adapt(fn, strict=True)(lj.join(ad, base), X).sum())(adapter)
    assert not any(g.any() for g in jax.tree.leaves(grad))


def test_eager_calls_of_a_jitted_function_compile_once():
    traces = []

    @jax.jit
    def layer(w, x):
        traces.append(1)
        return jnp.tanh(x @ w)

    def fn(p, x):
        for i in range(4):
            x = layer(p["layers"][i]["kernel"], x)
        return x

    layers = [{"kernel": draw(i, (5, 5))} for i in range(4)]
    rule = lj.LoraRule(targets=["layers"], rank=2, alpha=3.0, init=numpy_init)
    tree = with_random_factors(lj.lorafy({"layers": layers}, [rule]))
    run = lj.adapt(fn, strict=True)
    run(tree, X)
    with jax.log_compiles(), warnings.catch_warnings():
        before = compilations()
        for _ in range(3):
            run(tree, X)
            lj.adapt(fn, strict=True)(tree, X)
        assert compilations() == before
        jax.jit(lambda x: x * 3)(X)
        assert compilations() > before, "the count must see a compilation"
    text = jax.jit(run).lower(tree, X).as_text()
    assert text.count("func.func private @layer") == 1, "four calls of one jitted layer stay one"
    assert_close(run(tree, X), fn(lj.merge(tree), X), 1e-5)


_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _EVENTS.append(name))


def compilations() -> int:
    """How many programs XLA compiled so far in this process."""
    return sum("backend_compile" in name for name in _EVENTS)


def test_names_and_lines_survive():
    def fn(p, x):
        with jax.named_scope("the_layer"):
            return x @ p["a"]["kernel"]

    text = jax.jit(lj.adapt(fn)).lower(tree_of(5, 7), X).as_text(debug_info=True)
    assert "the_layer/dot_general" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_activations_with_fp32_factors(dtype):
    rule = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, init=numpy_init)
    tree = tree_of(5, 7, rule=rule, dtype=dtype)
    x = X.astype(dtype)
    y = jax.jit(lj.adapt(lambda p, x: x @ p["a"]["kernel"], strict=True))(tree, x)
    assert y.dtype == dtype and tree["a"]["kernel"].a.dtype == jnp.float32
    wide = np.asarray(lj.merge(tree)["a"]["kernel"], np.float32)
    assert_close(np.asarray(y, np.float32), np.asarray(X) @ wide, 2e-2)


def test_fp16_does_not_overflow_in_xa():
    rule = lj.LoraRule(targets=["a"], rank=1, alpha=1e-3, init=numpy_init)
    tree = tree_of(64, 7, rule=rule, dtype=jnp.float16)
    weight = tree["a"]["kernel"].replace(a=array(np.full((1, 64), 50.0), jnp.float32))
    x = np.full((3, 64), 50.0, np.float16)  # xA = 160,000, over fp16's 65,504
    y = lj.adapt(lambda w, x: x @ w)(weight, jax.device_put(x))
    assert np.isfinite(y).all()


@functools.cache
def compiled(fn):
    return jax.jit(lj.adapt(fn))


class TestDropout:
    rule = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, dropout=0.4, init=numpy_init)

    @staticmethod
    def run(p, x):
        return x @ p["a"]["kernel"]

    def test_is_off_without_a_key(self):
        tree = tree_of(5, 7, rule=self.rule)
        assert_close(lj.adapt(self.run)(tree, X), self.run(lj.merge(tree), X), 1e-5)

    def test_acts_on_the_input_of_a_only(self):
        """With x scaled out by the mask, the rest is exact: y − xW is s·(mask·x/(1−p)A)B."""
        tree = tree_of(5, 7, rule=self.rule)
        weight = tree["a"]["kernel"]
        identity = np.eye(5, dtype=np.float32)
        y = self.masks(self.run, tree, identity, key=3)
        delta = y - np.asarray(weight.base)
        expected = 1.5 * np.asarray(weight.a).T @ np.asarray(weight.b) / 0.6
        ratio = delta / expected
        kept = np.isclose(ratio, 1, atol=1e-3).all(1)
        gone = np.isclose(ratio, 0, atol=1e-3).all(1)
        assert (kept | gone).all() and kept.any() and gone.any()

    def test_keeps_the_share_it_says(self):
        tree = tree_of(400, 7, rule=self.rule)
        y = self.masks(self.run, tree, np.eye(400, dtype=np.float32))
        moved = np.abs(y - np.asarray(tree["a"]["kernel"].base)).max(1) > 1e-6
        assert abs(moved.mean() - 0.6) < 0.08

    def masks(self, fn, tree, x, key=0):
        return np.asarray(compiled(fn)(tree, x, dropout_key=jax.random.key(key)))

    def test_a_rate_of_numpy_widens_nothing(self):
        """NumPy's scalars have a dtype, Python's have none; x has 16 bits."""
        tree, x, key = tree_of(5, 7, rule=self.rule), X.astype(jnp.bfloat16), jax.random.key(0)

        def jaxpr(rate):
            weight = tree["a"]["kernel"].replace(dropout=rate)
            forward = lj.adapt(lambda w, x: x @ w.astype(x.dtype))
            return str(jax.make_jaxpr(lambda x: forward(weight, x, dropout_key=key))(x))

        assert jaxpr(np.float64(0.4)) == jaxpr(0.4)

    def test_masks_differ_by_key_and_site(self):
        tree = tree_of(50, 7, rule=self.rule)
        x = ONES
        twice = lambda p, x: jnp.stack([x @ p["a"]["kernel"], x @ p["a"]["kernel"]])  # noqa: E731
        one, two = self.masks(twice, tree, x)
        assert np.abs(one - two).max() > 1e-3
        again = self.masks(twice, tree, x)
        assert_identical(again[0], one)
        assert np.abs(self.masks(twice, tree, x, key=1)[0] - one).max() > 1e-3

    def test_what_else_is_computed_changes_no_mask(self):
        """Such as a constraint on how x is sharded: a run drops the same on every mesh."""
        tree = tree_of(50, 7, rule=self.rule)
        x = ONES

        def more(p, x):
            unused = jnp.sin(x).sum()
            x = jax.lax.optimization_barrier(x)
            return jnp.where(unused > 99, 0.0, x @ p["a"]["kernel"])

        assert_identical(self.masks(more, tree, x), self.masks(self.run, tree, x))

    @pytest.mark.parametrize("remat", [False, True])
    def test_layers_of_a_scan_differ(self, remat):
        stack = {"a": {"kernel": array(np.tile(draw(1, (50, 7)), (3, 1, 1)))}}
        tree = lj.lorafy(stack, [self.rule])
        weight = tree["a"]["kernel"]
        weight = weight.replace(
            a=array(np.tile(draw(2, (2, 50)), (3, 1, 1))),
            b=array(np.ones((3, 2, 7), np.float32)),
        )

        def fn(p, x):
            body = lambda c, w: (c, x @ w)  # noqa: E731
            return lax.scan(jax.checkpoint(body) if remat else body, 0.0, p["a"]["kernel"])[1]

        ys = self.masks(fn, {"a": {"kernel": weight}}, ONES)
        assert np.abs(ys[0] - ys[1]).max() > 1e-3 and np.abs(ys[1] - ys[2]).max() > 1e-3

    def test_iterations_over_one_weight_differ(self):
        tree = tree_of(50, 7, rule=self.rule)
        x = ONES

        def fn(p, x):
            return lax.scan(lambda c, _: (c, x @ p["a"]["kernel"]), 0.0, None, length=2)[1]

        one, two = self.masks(fn, tree, x)
        assert np.abs(one - two).max() > 1e-3

    def test_gradients_see_the_same_mask_under_remat(self):
        tree = tree_of(5, 7, rule=self.rule)
        adapter, base = lj.split(tree)

        def grad(fn):
            forward = lj.adapt(fn)
            key = jax.random.key(3)
            loss = lambda ad: jnp.sum(jnp.sin(forward(lj.join(ad, base), X, dropout_key=key)))  # noqa: E731
            return jax.jit(jax.grad(loss))(adapter)

        def inner(p, x):
            return jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["a"]["kernel"], x)

        def plain(p, x):
            return jax.jit(lambda w, x: jnp.sin(x @ w))(p["a"]["kernel"], x)

        assert_close(grad(inner), grad(plain), 1e-5)

    def test_merged_uses_are_refused(self):
        tree = tree_of(5, 7, rule=self.rule)
        with pytest.raises(lj.MergeError, match="dropout"):
            lj.adapt(elementwise)(tree, X, dropout_key=jax.random.key(0))


@pytest.mark.parametrize(
    ("shape", "labels", "new", "expected"),
    [
        ((5, 21), "io", (5, 3, 7), "ioo"),
        ((3, 7, 5), "iio", (21, 5), "io"),
        ((2, 3, 5), "bbo", (6, 5), "bo"),
        ((6, 4), "ii", (4, 6), "ii"),
        ((5, 7), "io", (5, 1, 7), "ibo"),
        ((5, 1, 7), "ibo", (5, 7), "io"),
        ((3, 5, 7), "bio", (15, 7), None),
        ((5, 7), "io", (35,), None),
        ((4, 6), "io", (6, 4), None),
        ((1, 1), "io", (1,), "b"),
    ],
)
def test_reshapes_that_keep_roles_apart(shape, labels, new, expected):
    names = {"i": "in", "o": "out", "b": "batch"}
    result = labels_after([names[c] for c in labels], shape, regrouped(shape, new), new)
    assert result == (None if expected is None else [names[c] for c in expected])


def test_effects_and_ordered_callbacks_run():
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum(), ordered=True)
        return x @ p["a"]["kernel"]

    jax.block_until_ready(lj.adapt(fn, strict=True)(tree_of(5, 7), X))
    jax.effects_barrier()
    assert len(seen) == 1


def test_no_constant_is_baked_in_under_jit():
    program = PROGRAMS[0]
    params, x = program.params(jnp.float32), draw(99, program.x)
    rule = lj.LoraRule(targets=["up", "down"], rank=2, alpha=3.0, init=numpy_init)
    tree = lj.lorafy(params, [rule])
    text = jax.jit(lj.adapt(program.run)).lower(tree, x).as_text()
    baked = r"constant dense<(\[|\")"
    assert not re.search(baked, text)
    closed = jax.jit(lambda x: program.run(params, x)).lower(x).as_text()
    assert re.search(baked, closed), "the judge must see a baked constant"
