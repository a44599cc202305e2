"""A base that is not an array keeps every law that an array keeps."""

import dataclasses
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import sharding
from lora_jax.adapt.roles import infer_roles
from lora_jax.adapt.uses import uses
from tests.adapt.random_programs import check, programs
from tests.adapt.test_random_programs import COMMON, ways
from tests.core.coded import (
    Coded,
    check_variant,
    coded,
    coded_program,
    decoded,
    fixed,
    is_on,
    with_coded_kernels,
)
from tests.laws import test_laws as laws
from tests.support import (
    MORE_PROGRAMS,
    PROGRAMS,
    THOROUGH,
    array,
    assert_close,
    assert_identical,
    draw,
    lorafied,
    over,
    with_random_factors,
)

CODED = [coded_program(program) for program in PROGRAMS + MORE_PROGRAMS]
FORMED = [coded_program(program, fixed) for program in PROGRAMS + MORE_PROGRAMS]
NAMED = {program.name: program for program in CODED}
STACK, TIED = NAMED["scanned and rematerialised"], NAMED["embedding looked up and tied"]
FEW = {STACK.name, TIED.name}
# The laws share what can go wrong: half of the programs for each do.
HALF = [p for i, p in enumerate(CODED) if i % 2 == 0 or p.name in FEW]
OTHERS = [p for i, p in enumerate(CODED) if i % 2 or p.name in FEW]


def pairs(programs, cases):
    """Returns each of the few programs with all cases, each other one with one of them."""
    n = len(cases)
    return [
        (program, case)
        for i, program in enumerate(programs)
        for j, case in enumerate(cases)
        if program.name in FEW or j == i % n
    ]


@over("program", HALF, often={TIED.name})
def test_identity_where_b_is_zero(program):
    params, x = program.params(jnp.float32), draw(99, program.x)
    fresh = lorafied(params, program.rules)
    assert is_on(fresh)
    forward = laws.adapted(program)

    @jax.jit
    def answers(fresh, alone, params, x):
        return forward(fresh, x), forward(alone, x), program.run(decoded(params), x)

    ours, alone, expected = answers(fresh, lj.join({}, lj.split(fresh)[1]), params, x)
    assert_close(ours, expected, 1e-6)
    assert_close(alone, ours, 1e-6)


@over("program", CODED, often={STACK.name})
def test_factored_equals_merged(program, float64):
    laws.test_factored_equals_merged(program, None)


@over(
    "program",
    [p for i, p in enumerate(FORMED) if i % 2 or p.name in FEW],
    often=(),
    rare=[p.name for i, p in enumerate(FORMED) if i % 2 and p.name not in FEW],
)
def test_factored_equals_merged_where_every_cut_forms_the_array(program, float64):
    laws.test_factored_equals_merged(program, None)


def named(case):
    program, law = case
    return f"{program.name}-{getattr(law, '__name__', law)}"


TRANSFORMS = [
    laws.test_commutes_with_jit_and_vmap,
    laws.test_vmap_over_adapters,
    laws.test_commutes_with_forward_mode_and_linearize,
]


@over(
    ("program", "law"),
    pairs([p for p in HALF if "sorted" not in p.name], TRANSFORMS),  # no vmap of ragged_dot
    often=(),
    called=named,
)
def test_transforms(law, program, float64):
    law(program, None)


LAWS = [laws.test_inverses, laws.test_locality, laws.test_no_frozen_gradient]


@over(
    ("program", "law"),
    pairs(OTHERS, LAWS),
    often=[named((STACK, law)) for law in LAWS[:2]],
    called=named,
)
def test_the_other_laws(law, program):
    law(program)


@pytest.mark.slow
def test_swap_compiles_nothing():
    laws.test_swap_compiles_nothing(STACK)


CHANGES = [{"dora": True}, {"dora": True, "dropout": 0.5}, {"dropout": 0.5}, {"bias_on_b": True}]


@over(
    ("program", "changes"),
    [  # a tied table takes no dropout and no bias on B
        (program, changes)
        for program, changes in pairs(HALF, CHANGES)
        if program is not TIED or changes is CHANGES[0]
    ],
    often=(),
    called=named,
)
def test_variants_and_dropout(program, changes, float64):
    """As over the array that the codes stand for: values, and gradients of the adapter."""
    check_variant(program, changes)


@pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")  # some use a kernel only mirrored
@pytest.mark.slow
@settings(max_examples=50 if THOROUGH else 6, **COMMON)
@given(programs(), ways)
def test_random_programs(program, way):
    with jax.enable_x64(True):
        check(with_coded_weights(program), way)


def with_coded_weights(program):
    """The program over coded weights, of which it is checked that they are."""
    rules = [weight.rule() for weight in program.weights]

    def inputs():
        params, _, x = program.inputs()
        params = with_coded_kernels(params, rules)
        looked = [lj.LoraRule(targets=".*", rank=2, alpha=3.0, dtype=jnp.float64)]
        trace = (program.run, params, x) if program.by_looking else None
        fresh = lj.lorafy(params, looked if trace else rules, trace=trace)
        assert is_on(fresh)
        return params, fresh, x

    run = lambda params, x: program.run(decoded(params), x)  # noqa: E731
    return types.SimpleNamespace(inputs=inputs, run=run, has_ragged=program.has_ragged)


def test_a_coded_leaf_without_a_rule_is_run_as_it_is(float64):
    """Beside an adapted one, and in a tree of which nothing is adapted."""
    params = {
        "a": {"kernel": coded(draw(1, (5, 11), jnp.float64))},
        "b": {"kernel": draw(2, (11, 7), jnp.float64)},
    }
    x = draw(9, (13, 5), jnp.float64)

    def run(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    rule = lj.LoraRule(targets=["b"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    assert tree["a"]["kernel"] is params["a"]["kernel"]
    forward = lj.adapt(run, strict=True)

    @jax.jit
    def answers(tree, params, x):
        plain = run(decoded(lj.merge(tree)), x), run(decoded(params), x)
        return (forward(tree, x), forward(params, x)), plain

    assert_close(*answers(tree, params, x), 1e-12)
    assert lj.count_params(tree) == (2 * (11 + 7), 5 * 11 + 11 * 7 + 2 * (11 + 7))


def test_other_uses_form_the_array_and_say_so():
    params = {"kernel": coded(draw(1, (5, 7)))}
    x = draw(9, (13, 5))

    def run(params, x):
        return x @ jnp.sin(params["kernel"])

    with pytest.warns(lj.MergeWarning, match="W is formed there"):
        y = lj.adapt(run)(params, x)
    assert_close(y, run(decoded(params), x), 1e-6)
    assert [use.how for use in uses(run, params, x)] == ["merged"]


@pytest.mark.parametrize("movable", [True, False])
def test_what_is_only_moved_stays_coded(movable):
    """Casts, transposes and scans of a cast stack form nothing that a rule need say."""
    kernel = coded(draw(1, (3, 5, 5)), movable=movable)
    x = draw(9, (13, 5))

    def run(params, x):
        stack = params["kernel"].astype(jnp.bfloat16)
        y = lax.scan(lambda y, w: (jnp.tanh(y @ w.T), None), x.astype(jnp.bfloat16), stack)[0]
        return y @ stack[1] + y @ lax.dynamic_index_in_dim(stack, 2, keepdims=False)

    params = {"kernel": kernel}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = jax.jit(lj.adapt(run, strict=True))(params, x)
    expected = jax.jit(lambda params, x: run(decoded(params), x))(params, x)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(expected, np.float32))


def test_roles_are_inferred_from_its_use():
    kernel = coded(draw(1, (7, 5)))
    looked = infer_roles(lambda w, x: x @ w.T, (kernel, draw(9, (13, 5))), {id(kernel): "w"})
    assert (looked["w"].roles.in_axes, looked["w"].roles.out_axes) == ((-1,), (-2,))
    abstract = jax.eval_shape(lambda kernel: kernel, kernel)
    looked = infer_roles(lambda w, x: x @ w.T, (abstract, draw(9, (13, 5))), {id(abstract): "w"})
    assert (looked["w"].roles.in_axes, looked["w"].roles.out_axes) == ((-1,), (-2,))


@pytest.mark.slow
def test_saved_and_loaded_over_its_base(tmp_path):
    _, tree, x = STACK.inputs()
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", lj.strip(tree))
    assert_identical(loaded, tree)
    other = jax.tree.map(lambda v: v, lj.strip(tree))
    up = other["layers"]["up"]["kernel"]
    scales = array(np.asarray(up.scales) * np.float32(1.5))
    other["layers"]["up"]["kernel"] = dataclasses.replace(up, scales=scales)
    with pytest.raises(lj.AdapterError, match="another base.*layers/up/kernel"):
        lj.load_adapter(tmp_path / "adapter", other)


@pytest.mark.slow
@pytest.mark.parametrize("init", [lj.init.pissa, lj.init.olora])
def test_factors_taken_out_of_it(init, float64):
    program = dataclasses.replace(
        STACK, rules=tuple(dataclasses.replace(r, init=init) for r in STACK.rules)
    )
    params, tree, x = program.inputs(jnp.float64)
    fresh = lorafied(params, program.rules)
    forward = laws.adapted(program)

    @jax.jit
    def answers(fresh, tree, params, x):
        at_first = forward(fresh, x), program.run(decoded(params), x)
        return at_first, (forward(tree, x), program.run(lj.merge(tree), x))

    at_first, later = answers(fresh, tree, params, x)
    assert_close(*at_first, 1e-5)
    assert_close(*later, 1e-9)


def test_rows_of_it_train(float64):
    table = coded(draw(1, (11, 5), jnp.float64))
    tree = lj.lorafy({"embedding": table}, [lj.TrainRule(targets=["embedding"], rows=[3, 7])])
    tree = with_random_rows(tree)
    program = TIED
    x = draw(9, (2, 4, 5), jnp.float64)
    ours, expected, plain = jax.device_get(rows_seen(program)({"embed": tree}, x))
    assert_close(ours, expected, 1e-9)
    assert np.abs(ours - plain).max() > 1e-2


def with_random_rows(tree):
    adapter, base = lj.split(tree)
    changed = jax.tree.map(lambda v: array(np.asarray(v) + np.cos(7 * np.asarray(v))), adapter)
    return lj.join(changed, base)


def rows_seen(program):
    """Returns a function: what a program answers adapted, merged, and without an adapter."""

    @jax.jit
    def answers(tree, x):
        plain = program.run(decoded(lj.strip(tree)), x)
        return laws.adapted(program)(tree, x), program.run(lj.merge(tree), x), plain

    return answers


@pytest.mark.slow
def test_sharded_as_its_axes(float64):
    """Codes and scales lie on the mesh as W would, and values and gradients are one device's."""
    program = coded_program(laws.EVEN[1])
    _, tree, x = program.inputs(jnp.float64)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    table = [(r".*up/kernel", P(None, "tensor")), (r".*down/kernel", P("tensor", None))]
    spread = sharding.place(tree, table, mesh)
    up, down = (spread["layers"][name]["kernel"].base for name in ("up", "down"))
    specs = [tuple(a.sharding.spec) for a in (up.codes, up.scales, down.codes, down.scales)]
    assert specs == [(None, None, "tensor")] * 2 + [(None, "tensor", None), (None, None, None)]
    x_spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))

    def values(tree, x):
        adapter, base = lj.split(tree)
        f = lambda adapter: jnp.sum(jnp.sin(laws.adapted(program)(lj.join(adapter, base), x)))  # noqa: E731
        return jax.value_and_grad(f)(adapter)

    expected = jax.jit(lambda tree, x: values(decoded(tree), x))(tree, x)
    assert_close(jax.jit(values)(spread, x_spread), expected, 1e-9)


def test_in_shard_map(float64):
    """Each device has its part of codes and scales, and gathers them where the function does."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    params = {"kernel": coded(draw(1, (6, 20), jnp.float64))}
    rule = lj.LoraRule(targets=["kernel"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    x = draw(9, (13, 6), jnp.float64)

    def run(params, x):
        def part(w, x):
            return x @ w, x @ lax.all_gather(w, "tensor", axis=1, tiled=True)

        there = (P(None, "tensor"), P())
        local = jax.shard_map(part, mesh=mesh, in_specs=there, out_specs=there, check_vma=False)
        return local(params["kernel"], x)

    ours = jax.jit(lj.adapt(run, strict=True))(tree, x)
    expected = np.asarray(x) @ np.asarray(lj.merge(tree)["kernel"])
    assert_close(ours, (expected, expected), 1e-9)


def test_the_backward_pass_keeps_codes():
    """W is formed again in each layer; formed before the call, it is kept, and costs its memory."""
    params = {"layers": {"kernel": coded(draw(1, (8, 96, 96)))}}
    rule = lj.LoraRule(targets=["layers"], rank=2, alpha=3.0)
    adapter, base = lj.split(lj.lorafy(params, [rule]))
    x = draw(9, (4, 96))

    def run(params, x):
        return lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, params["layers"]["kernel"])[0]

    def temporaries(prepare):
        def loss(adapter, base, x):
            return jnp.sum(lj.adapt(run)(prepare(lj.join(adapter, base)), x))

        compiled = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 8 * 96 * 96
    assert temporaries(lambda tree: tree) < whole / 2
    assert temporaries(decoded) >= whole


KERNEL = lj.LoraRule(targets=["kernel"])


def test_coded_is_smaller_and_a_leaf():
    kernel = coded(draw(1, (5, 7)))
    assert lj.base.is_base(kernel) and not lj.base.is_base(draw(1, (5, 7)))
    tree = lj.lorafy({"kernel": jax.eval_shape(lambda x: x, kernel)}, [KERNEL])
    assert isinstance(tree["kernel"].base, Coded)
