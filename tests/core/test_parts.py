"""A user's own variant is one part: all code that depends on a weight's layout handles it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import optim, sharding
from lora_jax.adapt.rules.choices import common_form
from lora_jax.core.parts import AXES, shape_of_axes
from lora_jax.core.weight import Part
from lora_jax.variants import PARTS, VARIANTS, Variants
from tests.laws import test_laws as laws
from tests.support import (
    PROGRAMS,
    assert_close,
    assert_identical,
    draw,
    lorafied,
    with_random_factors,
)

NAMED = {program.name: program for program in PROGRAMS}


def with_core(weight, node, core):
    """s·A·diag(d)·B: a trained factor for each column of rank."""
    return weight.replace(a=weight.a * jnp.expand_dims(core, range(core.ndim, weight.a.ndim)))


CORE = Part("core", ("batch", "rank"), lambda node: jnp.ones(node.shape_of("core")), with_core)


def with_inputs(weight, node, inputs):
    """A trained factor for each row of W + s·AB; seen by products as a larger A is."""
    ones = jnp.expand_dims(inputs, node.n_batch)
    return weight.replace(a=weight.a * ones.astype(weight.a.dtype))


INPUTS = Part(
    "inputs", ("batch", "in"), lambda node: jnp.ones(node.shape_of("inputs")), with_inputs
)
PROGRAMS_WITH_PARTS = {
    name: dataclasses.replace(
        NAMED[name],
        rules=tuple(dataclasses.replace(r, extras=[CORE, INPUTS]) for r in NAMED[name].rules),
    )
    for name in ("mlp", "scanned and rematerialised", "einsum with heads")
}
STACK = PROGRAMS_WITH_PARTS["scanned and rematerialised"]
programs = pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, id=name, marks=() if program is STACK else pytest.mark.slow)
        for name, program in PROGRAMS_WITH_PARTS.items()
    ],
)


def by_hand(tree):
    """The tree with the parts multiplied into A, as plain LoRA."""

    def dense(node):
        if not lj.is_node(node):
            return node
        n = node.n_batch
        a = node.a * node.core.reshape(*node.core.shape, *[1] * (node.a.ndim - n - 1))
        a = a * jnp.expand_dims(node.inputs, n)
        return node.replace(a=a, core=None, inputs=None)

    return jax.tree.map(dense, tree, is_leaf=lj.is_node)


@pytest.mark.slow
@programs
def test_the_laws(program, float64):
    laws.test_factored_equals_merged(program, None)
    laws.test_inverses(program)
    laws.test_no_frozen_gradient(program)


@pytest.mark.slow
@programs
def test_more_laws(program, float64):
    laws.test_commutes_with_jit_and_vmap(program, None)
    laws.test_locality(program)


@programs
def test_it_is_the_algebra(program, float64):
    _, tree, x = program.inputs(jnp.float64)
    plain = jax.tree.map(
        lambda n: n.replace(core=None, inputs=None) if lj.is_node(n) else n,
        tree,
        is_leaf=lj.is_node,
    )

    @jax.jit
    def answers(tree, plain, x):
        forward = laws.adapted(program)
        return forward(tree, x), program.run(lj.merge(by_hand(tree)), x), forward(plain, x)

    ours, expected, without = jax.device_get(answers(tree, plain, x))
    assert_close(ours, expected, 1e-9)
    assert np.abs(ours - without).max() > 1e-2


@pytest.mark.slow
def test_it_trains_is_counted_saved_and_sharded(tmp_path):
    program = STACK
    params, tree, x = program.inputs()
    adapter, base = lj.split(tree)
    up = adapter["layers/up/kernel"]
    assert {name: part.shape for name, part in up.items()} == {
        "a": (3, 2, 5),
        "b": (3, 2, 11),
        "core": (3, 2),
        "inputs": (3, 5),
    }
    forward = lj.adapt(program.run)
    loss = lambda adapter: jnp.sum(jnp.sin(forward(lj.join(adapter, base), x)))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(adapter)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    # "down" is adapted in two of its three layers only.
    assert lj.count_params(tree)[0] == 3 * (2 * (5 + 11) + 2 + 5) + 2 * (2 * (11 + 5) + 2 + 11)

    adapter = jax.device_get(adapter)
    updates, _ = optim.lora_plus(16.0).update(adapter, optax.EmptyState())
    assert_close(updates["layers/up/kernel"]["core"], up["core"], 0)
    assert_close(updates["layers/up/kernel"]["b"], 16 * adapter["layers/up/kernel"]["b"], 0)

    part, params = ({"layers": {"up": t["layers"]["up"]}} for t in (tree, params))
    lj.save_adapter(tmp_path / "adapter", part)
    loaded = lj.load_adapter(tmp_path / "adapter", params, extras=[CORE, INPUTS])
    assert_identical(loaded, part)
    with pytest.raises(lj.AdapterError, match=r"has the part 'core'.*extras=\[part\]"):
        lj.load_adapter(tmp_path / "adapter", params)

    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    where = sharding.shardings(tree, [(r".*kernel", P("tensor", None))], mesh)
    node = where["layers"]["up"]["kernel"]
    assert tuple(node.inputs.spec) == (None, "tensor")
    assert tuple(node.core.spec) == (None, None)


@pytest.mark.slow
def test_ranks_that_differ_are_padded_and_filed_without_padding(tmp_path):
    params = {"layers": {"kernel": draw(1, (3, 5, 7))}}
    rules = [
        lj.LoraRule(targets=["layers"], layers=[0], rank=3, alpha=4.0, extras=[CORE]),
        lj.LoraRule(targets=["layers"], layers=[2], rank=1, alpha=3.0, extras=[CORE]),
    ]
    tree = with_random_factors(lorafied(params, rules))
    assert tree["layers"]["kernel"].core.shape == (3, 3)
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", params, extras=[CORE])
    node, again = (t["layers"]["kernel"] for t in (tree, loaded))
    assert_identical((again.a, again.b), (node.a, node.b))
    used = np.arange(3) < np.array([3, 0, 1])[:, None]
    assert_identical(again.core, np.where(used, node.core, np.float32(0)))


def test_the_registry_has_each_option_and_each_part_once():
    options = [(v.option, *(setting.name for setting in v.settings)) for v in VARIANTS]
    assert [one.name for one in dataclasses.fields(Variants)] == [*itertools.chain(*options)]
    assert len(PARTS) == sum(len(variant.parts) for variant in VARIANTS)


@pytest.mark.parametrize("name", ["a", "scale", "gain", "value"])
def test_names_that_are_taken_are_refused(name):
    part = dataclasses.replace(CORE, name=name)
    with pytest.raises(ValueError, match=f"array with the name '{name}'"):
        lj.LoraRule(targets=["up"], extras=[part])
    with pytest.raises(ValueError, match="with the name 'core'"):
        lj.LoraRule(targets=["up"], extras=[CORE, CORE])


def test_arrays_reach_products_in_one_order():
    """Programs, and so their names in a cache, do not depend on the order of a dictionary."""
    params = {"up": {"kernel": jnp.ones((3, 5))}}
    node = lj.lorafy(params, [lj.LoraRule(targets=["up"], rank=2, alpha=3)])["up"]["kernel"]
    arrays = dict(reversed(node.arrays.items()))
    assert list(arrays) != list(node.arrays)
    assert [*node.replace(arrays=arrays).factored().parts] == [*node.factored().parts]


@pytest.mark.parametrize("name", ["rows", "active"])
def test_no_weight_tells_the_shape_of_a_mask(name):
    """The negative numbers of examples and tokens in a layout are not axes of the weight."""
    labels = ("batch", "in", "out")
    assert shape_of_axes(AXES["b"], (7, 5, 3), labels, 2) == (7, 2, 3)
    with pytest.raises(ValueError, match="shape \\(7, 5, 3\\) of a weight does not determine"):
        shape_of_axes(AXES[name], (7, 5, 3), labels, 2)


@pytest.mark.parametrize("name", ["rows", "active"])
def test_a_weight_with_a_mask_and_one_without_have_no_common_form(name):
    params = {"stack": jnp.ones((7, 5, 3))}
    rule = lj.LoraRule(targets=["stack"], rank=2, in_axes=[-2], out_axes=[-1])
    weight = lj.lorafy(params, [rule])["stack"].factored()
    masked = weight.replace(**{name: np.ones((4, 2), np.float32)})
    assert common_form([weight, weight]) is not None and common_form([masked, masked]) is not None
    assert common_form([weight, masked]) is None and common_form([masked, weight]) is None
