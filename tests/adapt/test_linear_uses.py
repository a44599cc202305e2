"""Uses of a weight other than products with x that keep its factors."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.adapt.uses import uses
from tests.adapt.test_primitives import halves, merged, mesh_of_four, one, rule, two, values
from tests.core.coded import coded_program
from tests.support import assert_close, over


def in_shards(body):
    def use(w, x):
        specs = (P("m"), P("m", None))
        return jax.shard_map(body, mesh=mesh_of_four(), in_specs=specs, out_specs=P("m"))(x, w)

    return use


def gathered_first(x, w):
    return jnp.einsum("ni,eio->neo", x, lax.all_gather(w, "m", axis=0))


def gathered_last(x, w):
    return jnp.einsum("ni,ioe->neo", x, lax.all_gather(w, "m", axis=2))


def sent_round(x, w):
    return x @ lax.ppermute(w, "m", [(i, (i + 1) % 4) for i in range(4)])


def sent_to_some(x, w):
    return x @ lax.ppermute(w, "m", [(0, 1), (1, 3)])


def layer(carry, _):
    x, w = carry
    return (jnp.sin(x @ w), w), None


def several_layers(carry, _):
    (x, w), _ = lax.scan(jax.jit(layer), carry, None, 2)
    return lax.cond(x[0, 0] > 0, lambda x, w: (x, w), lambda x, w: (-x, w), x, w), None


def carried(body):
    return lambda w, x: lax.scan(body, (x, w), None, 3)[0][0]


def magnitude(y):
    return jnp.real(y) + 2.0 * jnp.imag(y)


def mixed(dtype):
    """x in a dtype without fractions, multiplied as it is."""

    def use(w, x):
        whole = jnp.round(4.0 * x).astype(dtype)
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(whole, w, dims, preferred_element_type=w.dtype) * x[:, :1]

    return use


DORA = {"dora": True}
BY_BROADCAST = [
    one("product by broadcasting", (5, 7), lambda w, x: (x[..., None] * w).sum(-2), (2, 13, 5)),
    one("of w[None]", (5, 7), lambda w, x: (w[None] * x[..., None]).sum(1), (13, 5)),
    one("mirrored", (5, 7), lambda w, x: (w * x[:, None]).sum(-1), (13, 7)),
    one("with DoRA", (5, 7), lambda w, x: (x[..., None] * w).sum(-2), (13, 5), **DORA),
    one("of a stack", (3, 5, 7), lambda w, x: (x[:, None, :, None] * w).sum(-2), (13, 5)),
    one("and summed over the rows", (5, 7), lambda w, x: (x[..., None] * w).sum((0, 1)), (13, 5)),
    one(
        "over one of two in axes",
        (2, 5, 7),
        lambda w, x: jnp.einsum("ni,io->no", x, w.sum(0)),
        (13, 5),
        in_axes=[0, 1],
        out_axes=[2],
    ),
    one("over a stack", (3, 5, 7), lambda w, x: x @ w.sum(0), (13, 5), rank=1),
    one(
        "over a stack in the middle",
        (5, 2, 7),
        lambda w, x: x @ w.mean(1),
        (13, 5),
        in_axes=[0],
        out_axes=[2],
        rank=1,
    ),
]
STACKED_GAINS = [
    one("mirrored stack", (3, 5, 7), lambda w, x: jnp.einsum("no,eio->nei", x, w), (13, 7), **DORA),
    one(
        "mirrored stack, weight first",
        (3, 5, 7),
        lambda w, x: jnp.einsum("eio,no->ein", w, x),
        (13, 7),
        **DORA,
    ),
    one(
        "mirrored stacks, one of them batched",
        (5, 3, 2, 7),
        lambda w, x: jnp.einsum("nbo,iabo->bnai", x, w),
        (13, 2, 7),
        in_axes=[0],
        out_axes=[3],
        **DORA,
    ),
]
DTYPES = [
    one(
        "complex",
        (5, 7),
        lambda w, x: magnitude((x + 2j * jnp.cos(x)) @ w.astype(jnp.complex128)),
        (13, 5),
    ),
    one("complex and back", (5, 7), lambda w, x: x @ w.astype(jnp.complex128).real, (13, 5)),
    one(
        "complex, mirrored",
        (5, 7),
        lambda w, x: magnitude((1j * x) @ w.astype(jnp.complex128).T),
        (13, 7),
    ),
    one("integers", (5, 7), mixed(jnp.int8), (13, 5)),
    one("truth values", (5, 7), mixed(jnp.bool_), (13, 5)),
]
CHAINS = [
    two("of two", (5, 11), (11, 7), lambda a, b, x: x @ (a @ b), (13, 5)),
    two("of two, transposed", (11, 5), (7, 11), lambda a, b, x: x @ (a.T @ b.T), (13, 5)),
    two(
        "of two, used both ways",
        (5, 11),
        (7, 11),
        lambda a, b, x: x @ (a @ b.T) @ (a @ b.T).T,
        (13, 5),
    ),
    one("with itself", (5, 11), lambda w, x: x @ (w @ w.T), (13, 5)),
    one("of a power", (5, 5), lambda w, x: x @ (w @ w @ w), (13, 5)),
    two(
        "of two stacks",
        (3, 5, 11),
        (3, 11, 7),
        lambda a, b, x: jnp.einsum("ni,eio->neo", x, a @ b),
        (13, 5),
    ),
    two(
        "of a stack and one weight",
        (3, 5, 11),
        (11, 7),
        lambda a, b, x: jnp.einsum("ni,eio->neo", x, a @ b),
        (13, 5),
    ),
    two(
        "of one weight and a stack",
        (5, 11),
        (3, 11, 7),
        lambda a, b, x: jnp.einsum("ni,ieo->neo", x, jnp.einsum("ik,eko->ieo", a, b)),
        (13, 5),
    ),
    two(
        "of stacks, each their own",
        (3, 5, 11),
        (2, 11, 7),
        lambda a, b, x: jnp.einsum("ni,eifo->nefo", x, jnp.einsum("eik,fko->eifo", a, b)),
        (13, 5),
    ),
    two("of an outer kind", (5, 1), (1, 7), lambda a, b, x: x @ (a @ b), (13, 5)),
    two("of single ones", (1, 1), (1, 1), lambda a, b, x: x @ (a @ b), (13, 1)),
]


def either(a, b, x):
    """One of two weights, or one of their changed copies."""
    return x @ lax.cond(x[0, 0] > 0, lambda: a, lambda: b) + x @ lax.cond(
        x[0, 1] > 0, lambda a, b: 2.0 * b, jax.jit(lambda a, b: a[::-1]), a, b
    )


def the_same(w, x):
    y, again = lax.cond(x[0, 0] > 0, lambda w, x: (x @ w, w), lambda w, x: (-x @ w, w), w, x)
    return y @ again.T


def a_row_each(a, b, x):
    return jax.vmap(lambda row: row @ lax.cond(row[0] > 0, lambda: a, lambda: b))(x)


def a_row_the_same(w, x):
    return jax.vmap(lambda row: row @ lax.cond(row[0] > 0, lambda: w, lambda: w))(x)


def where(a, b, x):
    return jnp.einsum("ni,nio->no", x, jnp.where(x[:, :1, None] > 0, a, b))


def of_three(a, b, x):
    return x @ lax.select_n(jnp.int32(2), a, b, a + b)


def ranks(program, **settings):
    """The program, with another rank for the second weight."""
    rules = (rule(["a"], rank=1, **settings), rule(["b"], rank=3, **settings))
    return dataclasses.replace(program, name=f"{program.name}, ranks that differ", rules=rules)


SHAPES = ((5, 7), (5, 7))
CHOICES = [
    two("a branch that returns a weight", *SHAPES, either, (13, 5)),
    ranks(two("a branch", *SHAPES, either, (13, 5))),
    one("branches that return the same weight", (5, 7), the_same, (13, 5)),
    two(
        "a branch that returns a weight transposed",
        (5, 7),
        (7, 5),
        lambda a, b, x: x @ lax.cond(x[0, 0] > 0, lambda: a, lambda: b.T),
        (13, 5),
    ),
    two(
        "a branch in a branch",
        *SHAPES,
        lambda a, b, x: (
            x
            @ lax.cond(x[0, 0] > 0, lambda: a, lambda: lax.cond(x[0, 1] > 0, lambda: b, lambda: a))
        ),
        (13, 5),
    ),
    two("a branch for each row", *SHAPES, a_row_each, (13, 5)),
    ranks(two("a branch for each row", *SHAPES, a_row_each, (13, 5))),
    one("a branch for each row that returns the same", (5, 7), a_row_the_same, (13, 5)),
    two("where, by row", *SHAPES, where, (13, 5)),
    two("select one of three", *SHAPES, of_three, (13, 5)),
    two("select with DoRA", *SHAPES, where, (13, 5), **DORA),
    two(
        "select by layer",
        (3, 5, 7),
        (3, 5, 7),
        lambda a, b, x: jnp.einsum(
            "ni,eio->neo", x, jnp.where(jnp.array([True, False, True])[:, None, None], a, b)
        ),
        (13, 5),
    ),
]


def raveled(a, b, x):
    """Laid out as a vector with other arrays, and taken apart again."""
    vector, unravel = ravel_pytree({"a": a, "plain": x[0], "b": b})
    tree = unravel(vector)
    return jnp.sin(x @ tree["a"]) @ tree["b"] + tree["plain"][:3]


def sliced_out(a, b, x):
    vector = jnp.concatenate([a.ravel(), jnp.ones(2, x.dtype), b.ravel()])
    return jnp.sin(x @ vector[:35].reshape(5, 7)) @ vector[37:].reshape(7, 3)


FOLDS = [
    two("ravel_pytree and back", (5, 7), (7, 3), raveled, (13, 5)),
    two("slices of a vector", (5, 7), (7, 3), sliced_out, (13, 5)),
    one("flattened and back", (5, 7), lambda w, x: x @ w.reshape(-1).reshape(5, 7), (13, 5)),
]
CASES = [
    *FOLDS,
    *CHOICES,
    *CHAINS,
    *BY_BROADCAST,
    *STACKED_GAINS,
    *DTYPES,
    one("all_gather that adds an axis", (12, 7), in_shards(gathered_first), (8, 3)),
    one("all_gather that adds the last axis", (12, 7), in_shards(gathered_last), (8, 3)),
    one("ppermute", (20, 7), in_shards(sent_round), (8, 5)),
    one("ppermute to some", (20, 7), in_shards(sent_to_some), (8, 5)),
    one("carried through jit", (5, 5), carried(jax.jit(layer)), (13, 5)),
    one("carried through remat", (5, 5), carried(jax.checkpoint(jax.jit(layer))), (13, 5)),
    one("carried through loops and branches", (5, 5), carried(several_layers), (13, 5)),
]
OFTEN = [
    "ravel_pytree and back",
    "a branch for each row, ranks that differ",
    "where, by row",
    "select one of three",
    "select by layer",
    "of two, used both ways",
    "of a power",
    "of single ones",
    "mirrored",
    "with DoRA",
    "over one of two in axes",
    "over a stack",
    "integers",
    "all_gather that adds the last axis",
    "carried through loops and branches",
]
EAGERLY = [  # one of each way of putting weights together, choosing, and passing them on
    "ravel_pytree and back",
    "a branch that returns a weight",
    "select one of three",
    "of a power",
    "over a stack",
    "mirrored",
    "complex, mirrored",
    "ppermute to some",
    "carried through loops and branches",
]


@over("case", CASES, often=OFTEN)
@pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")  # some are mirrored, on purpose
def test_values_and_gradients(case, float64):
    _, adapter, base, x = halves(case, jnp.float64)
    run = lj.adapt(case.run, strict=True)

    @jax.jit
    def found(adapter, base, x):
        return [values(case, way, adapter, base, x) for way in (run, merged(case))]

    with jax.numpy_dtype_promotion("standard"):  # the cases' own literals are not the point
        ours, theirs = found(adapter, base, x)
        assert_close(ours, theirs, 1e-9)
        if case.name in EAGERLY:
            assert_close(run(lj.join(adapter, base), x), theirs[0][1], 1e-9)


def warned(case, tree, x, **how):
    """The weights that are merged."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        outputs = jax.jit(lj.adapt(case.run))(tree, x, **how)
    return outputs, [re.findall(r"[Tt]he weight '(\w+)/kernel'", str(w.message)) for w in found]


def of_rules(*rules):
    """The product of two weights, with a rule for each."""
    case = two("of two", (5, 11), (11, 7), lambda a, b, x: x @ (a @ b), (13, 5))
    return dataclasses.replace(case, rules=rules)


@pytest.mark.parametrize(
    ("a", "b", "merges"),
    [({"dora": True}, {}, "b"), ({}, {"dora": True}, "b"), ({}, {"bias_on_b": True}, "a")],
)
def test_a_product_of_weights_merges_one_of_them_at_most(a, b, merges):
    case = of_rules(rule(["a"], **a), rule(["b"], **b))
    _, tree, x = case.inputs()
    outputs, found = warned(case, tree, x)
    assert found == [[merges]]
    if not b.get("bias_on_b"):  # which a merged weight lacks
        assert_close(outputs, jax.jit(merged(case))(tree, x), 1e-5)


def test_a_product_of_weights_with_dropout_merges_the_other_one():
    case = of_rules(rule(["a"]), rule(["b"], dropout=0.5))
    _, tree, x = case.inputs()
    (one, found), (other, _) = (
        warned(case, tree, x, dropout_key=jax.random.key(i)) for i in (0, 1)
    )
    assert found == [["a"]]
    assert np.abs(np.subtract(one, other)).max() > 1e-3
    ours, theirs = jax.jit(lambda *of: (lj.adapt(case.run, strict=True)(*of), merged(case)(*of)))(
        tree, x
    )
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b, x: jnp.concatenate([a.ravel(), b.ravel()])[30:50] * x[0, 0],
        lambda a, b, x: x @ (2.0 * jnp.concatenate([a.ravel(), b.ravel()]))[:35].reshape(5, 7),
        lambda a, b, x: jax.jit(jnp.ravel)(a) @ a.ravel() + b.reshape(7, 3).reshape(-1) * x[0, 0],
        lambda a, b, x: x @ a.ravel().reshape(7, 5).T,
    ],
)
def test_a_vector_that_is_used_as_such_is_formed(use):
    case = two("a vector", (5, 7), (7, 3), use, (13, 5))
    _, tree, x = case.inputs()
    outputs, found = warned(case, tree, x)
    assert found
    assert_close(outputs, jax.jit(merged(case))(tree, x), 1e-5)


def test_explain_names_every_weight_that_is_joined_with_another():
    case = two("joined", (5, 7), (7, 5), lambda a, b, x: x @ (a @ b) @ (a + b.T), (13, 5))
    _, tree, x = case.inputs()
    found = [(record.path, record.how) for record in uses(case.run, tree, x)]
    assert {("a/kernel", "factored"), ("b/kernel", "factored")} <= set(found)
    assert {how for _, how in found} == {"factored"}


@pytest.mark.parametrize("name", ["of two", "where, by row", "a branch that returns a weight"])
def test_a_base_that_is_no_array_keeps_its_factors(name):
    case = coded_program(next(case for case in CASES if case.name == name))
    _, tree, x = case.inputs()
    run = next(case for case in CASES if case.name == name).run
    both = jax.jit(lambda tree, x: (lj.adapt(run, strict=True)(tree, x), run(lj.merge(tree), x)))
    assert_close(*both(tree, x), 1e-5)
