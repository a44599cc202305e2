"""Warnings and errors of `adapt` name a line of the user's own file, and what to do."""

import linecache
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

import lora_jax as lj
from lora_jax.adapt import user_code
from lora_jax.adapt.uses import uses
from tests.support import array, assert_close, draw, numpy_init, variables_of, with_random_factors

RULE = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, init=numpy_init)
X = draw(9, (3, 5))


def tree_of(*shape):
    return with_random_factors(lj.lorafy({"a": {"kernel": draw(1, shape)}}, [RULE]))


def by_norm(p, x):
    return x @ p["a"]["kernel"] / jnp.linalg.norm(p["a"]["kernel"])  # a merge inside of jnp


def by_softmax(p, x):
    w = p["a"]["kernel"]
    return x @ nn.softmax(w)


def by_flax(p, x):
    return nn.Dense(
        p["a"]["kernel"].shape[1], promote_dtype=lambda *v, **_: [*v[:1], jnp.sin(v[1]), *v[2:]]
    ).apply({"params": {"kernel": p["a"]["kernel"], "bias": p["a"]["kernel"][0] * 0}}, x)


def by_output(p, x):
    return x @ p["a"]["kernel"], p["a"]["kernel"].T


@pytest.mark.parametrize(
    ("fn", "offset"), [(by_norm, 1), (by_softmax, 2), (by_flax, 2)], ids=lambda v: str(v)[:20]
)
@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit], ids=["eagerly", "jit"])
def test_a_merge_names_the_users_line(fn, offset, wrap):
    n_out = 7 if wrap is jax.jit else 11  # it is said while JAX traces: once for each shape
    tree, line = tree_of(5, n_out), fn.__code__.co_firstlineno + offset
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = wrap(lj.adapt(fn))(tree, X)
    assert_close(y, jax.jit(fn)(lj.merge(tree), X), 1e-5)
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}
    merged = [record for record in uses(fn, tree, X) if record.how == "merged"]
    assert merged and all(f"{__file__}:{line}" in record.place for record in merged)


def merge_inside_of_a_jitted_layer(w, x):
    return x @ jnp.sin(w)


def merge_inside_of_jax(w, x):
    return x @ w / jnp.linalg.norm(w)


def merge_inside_of_a_scan(w, x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ jnp.sin(w)), None), x, length=2)[0]


def no_merge(w, x):
    return x @ w


LAYERS = {
    "jit": (jax.jit(merge_inside_of_a_jitted_layer), True),
    "remat": (jax.checkpoint(merge_inside_of_a_jitted_layer), True),
    "remat of jit": (jax.checkpoint(jax.jit(merge_inside_of_jax)), True),
    "JAX": (merge_inside_of_jax, True),
    "scan": (jax.jit(merge_inside_of_a_scan), True),
    "control": (jax.jit(no_merge), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_merge_names_each_layer_of_equal_shapes(name):
    """In the first call, in a later one by another function, and under a later jit."""
    layer, merges = LAYERS[name]
    names = ["a", "b", "c"]
    params = {name: {"kernel": draw(index, (5, 5))} for index, name in enumerate(names)}
    tree = with_random_factors(
        lj.lorafy(params, [lj.LoraRule(targets=".*kernel", rank=2, init=numpy_init)])
    )

    def model(p, x):
        for name in names:
            x = layer(p[name]["kernel"], x)
        return x

    expected = {f"{name}/kernel" for name in names} if merges else set()
    for run in (lj.adapt(model), lj.adapt(model), jax.jit(lj.adapt(model))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = run(tree, X)
        assert_close(y, model(lj.merge(tree), X), 1e-5)
        messages = [str(warning.message) for warning in caught]
        assert {message.split("'")[1] for message in messages} == expected
        assert all(f"{__file__}:" in message for message in messages)
        assert len(messages) == len(set(messages))


def test_transposed_layers_of_equal_shapes_are_all_named():
    layer = jax.jit(lambda w, x: x @ w.T)
    params = {"a": {"kernel": draw(1, (5, 5))}, "b": {"kernel": draw(2, (5, 5))}}
    tree = with_random_factors(
        lj.lorafy(params, [lj.LoraRule(targets=".*kernel", rank=2, init=numpy_init)])
    )

    def model(p, x):
        return layer(p["b"]["kernel"], layer(p["a"]["kernel"], x))

    for run in (lj.adapt(model), jax.jit(lj.adapt(model))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(tree, X)
        named = [str(warning.message).split("'")[1] for warning in caught]
        assert sorted(named) == ["a/kernel", "b/kernel"]


def test_a_merge_names_the_users_line_wherever_jax_lies(monkeypatch):
    """As with pip's --target or PYTHONPATH: JAX is in no folder of packages."""
    outside = tuple(prefix for prefix in user_code._PACKAGES if "site-packages" not in prefix)
    assert outside != user_code._PACKAGES
    monkeypatch.setattr(user_code, "_PACKAGES", outside)
    user_code._is_package_file.cache_clear()
    line = by_norm.__code__.co_firstlineno + 1
    try:
        with pytest.warns(lj.MergeWarning) as caught:
            lj.adapt(by_norm)(tree_of(5, 13), X)
    finally:
        user_code._is_package_file.cache_clear()
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}


def test_lines_inside_of_packages_are_told_too():
    module = nn.Dense(7)
    tree = with_random_factors(
        lj.lorafy(
            variables_of(module, X), [lj.LoraRule(targets=".*kernel", rank=2, init=numpy_init)]
        )
    )
    (record,) = uses(module.apply, tree, X)
    assert __file__ in record.place and "(in flax/linen/linear.py:" in record.place


def test_a_cell_of_a_notebook_is_told_by_its_line():
    file, code = "/nowhere/ipykernel_1/2.py", "def cell(p, x):\n    return x @ p['a']['kernel']\n"
    linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # as IPython does
    names = {}
    exec(compile(code, file, "exec"), names)
    (record,) = uses(names["cell"], tree_of(5, 7), X)
    assert record.place == "line 2, \"return x @ p['a']['kernel']\""


def test_an_output_names_the_call():
    with pytest.raises(lj.MergeError, match=rf"is an output of the function at {__file__}:\d+"):
        lj.adapt(lambda p, x: jnp.sin(x.sum()) * p["a"]["kernel"].T, strict=True)(tree_of(5, 7), X)


def field(y, t, p):
    return jnp.tanh(y @ p["a"]["kernel"]) - t


TIMES = array([0.0, 0.5, 1.0])


@pytest.mark.slow
def test_an_ode_says_how_it_stays_factored():
    """All merges at odeint's own derivative; with the field adapted and the tree in args, not."""
    tree = tree_of(5, 5)
    solve = lambda p, x: odeint(field, x, TIMES, p)  # noqa: E731
    with pytest.raises(lj.MergeError) as caught:
        lj.adapt(solve, strict=True)(tree, X)
    assert __file__ in str(caught.value)
    for part in ("derivative of its own", "lora_jax.adapt(field)", "args", "primitives="):
        assert part in str(caught.value)

    run = lj.adapt(lambda y, t, p: field(y, t, p), strict=True)
    adapter, base = lj.split(tree)

    def loss(solve, adapter, x):
        return jnp.sum(jnp.sin(solve(lj.join(adapter, base), x)))

    ours = jax.grad(lambda *v: loss(lambda p, x: odeint(run, x, TIMES, p), *v), (0, 1))(adapter, X)
    theirs = jax.grad(lambda *v: loss(lambda p, x: solve(lj.merge(p), x), *v), (0, 1))(adapter, X)
    assert_close(ours, theirs, 1e-4)


def transposed(p, x):
    return x @ p["a"]["kernel"].T


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit], ids=["eagerly", "jit"])
def test_a_kernel_that_is_only_used_transposed_under_default_roles(wrap):
    tree, line = tree_of(7, 5), transposed.__code__.co_firstlineno + 1
    with pytest.warns(lj.RoleWarning, match="'a/kernel'.*other way round.*trace=") as caught:
        y = wrap(lj.adapt(transposed, strict=True))(tree, X)
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}
    assert_close(y, transposed(lj.merge(tree), X), 1e-5)


def test_roles_that_fit_and_tied_tables_say_nothing():
    kernel = {"a": {"kernel": draw(1, (7, 5))}}
    looked = with_random_factors(lj.lorafy(kernel, [RULE], trace=(transposed, kernel, X)))
    lj.adapt(transposed, strict=True)(looked, X)
    there_and_back = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["a"]["kernel"].T  # noqa: E731
    lj.adapt(there_and_back, strict=True)(tree_of(5, 7), X)
    table = {"embedding": draw(1, (11, 5))}
    rule = lj.LoraRule(targets=["embedding"], rank=2, init=numpy_init)
    tied = with_random_factors(lj.lorafy(table, [rule]))
    lj.adapt(lambda p, x: x @ p["embedding"].T, strict=True)(tied, X)


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda y: y if y.sum() > 0 else -y, jax.errors.TracerBoolConversionError),
        (np.asarray, jax.errors.TracerArrayConversionError),
        (lambda y: range(7)[y.argmax()], jax.errors.TracerIntegerConversionError),
        (lambda y: y[y > 0], jax.errors.NonConcreteBooleanIndexError),
    ],
    ids=["bool", "array", "integer", "boolean index"],
)
def test_python_code_that_needs_elements_is_told_what_tracing_means(use, error):
    with pytest.raises(error) as caught:
        lj.adapt(lambda p, x: use(x @ p["a"]["kernel"]))(tree_of(5, 7), X)
    assert any("lora_jax.adapt traces the function" in note for note in caught.value.__notes__)


def test_a_number_is_no_dropout_key():
    with pytest.raises(
        TypeError, match=r"dropout_key=0 is not a PRNG key. Write jax.random.key\(0\)"
    ):
        lj.adapt(lambda p, x: x @ p["a"]["kernel"])(tree_of(5, 7), X, dropout_key=0)


@pytest.mark.slow
def test_a_use_inside_of_a_function_that_is_known_counts():
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    tree = tree_of(5, 7)
    lj.adapt(lambda p, x: inner(p["a"]["kernel"], x))(tree, X)

    def both(p, x):
        return inner(p["a"]["kernel"], x) @ p["a"]["kernel"].T

    lj.adapt(both)(tree, X)


def test_a_product_that_merges_names_the_roles():
    """Two in axes, under the roles of the name: the remedy is other roles, not another product."""
    params = {"attn_vec_einsum": {"w": draw(1, (2, 3, 5))}}
    fn = lambda p, x: jnp.einsum("tnh,nhd->td", x, p["attn_vec_einsum"]["w"])  # noqa: E731
    rules = [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)]
    x = draw(2, (4, 2, 3))
    with pytest.warns(lj.MergeWarning, match="2: batch, 3: in, 5: out.*trace=.*in_axes=") as caught:
        lj.adapt(fn)(lj.lorafy(params, rules), x)
    assert "einsum)" not in str(caught[0].message)
    lj.adapt(fn, strict=True)(lj.lorafy(params, rules, trace=(fn, params, x)), x)
