"""Every variant of LoRA keeps the laws, on a stack, an einsum kernel, experts and an embedding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import init
from lora_jax.core.weight import is_node
from tests.support import (
    MORE_PROGRAMS,
    PROGRAMS,
    array,
    assert_close,
    assert_identical,
    dots_of_size,
    draw,
    lorafied,
    over,
    with_random_factors,
)

NAMED = {program.name: program for program in PROGRAMS + MORE_PROGRAMS}
# A stacked kernel, an einsum kernel, an expert kernel, an embedding.
USUAL = [
    NAMED["scanned and rematerialised"],
    NAMED["einsum with heads"],
    NAMED["experts, tokens sorted"],
    NAMED["embedding looked up and tied"],
]
# Where a vector over the columns takes other ways than the factors do.
WITH_COLUMNS = [
    NAMED["weight as the left operand"],
    NAMED["experts, all of them on every token"],
    NAMED["convolution"],
]
VARIANTS = {
    "rsLoRA": {"scaling": "alpha/sqrt(rank)"},
    "gaussian": {"init": init.gaussian},
    "orthogonal": {"init": init.orthogonal},
    "PiSSA": {"init": init.pissa},
    "fast PiSSA": {"init": init.fast_pissa(2)},
    "OLoRA": {"init": init.olora},
    "DoRA": {"dora": True},
    "DoRA from PiSSA": {"dora": True, "init": init.pissa},
    "LoRA-FA": {"freeze_a": True},
    "LoRA-FA with DoRA": {"freeze_a": True, "dora": True},
    "LoRA-XS": {"xs": True},
    "VeRA": {"vera": True},
    "TinyLoRA": {"tinylora": True, "u": 5},
}
# Random factors hide which way they were drawn, so these are plain LoRA, and PiSSA, once begun.
AS_OTHERS = {"gaussian", "orthogonal", "fast PiSSA"}
DISTINCT = [variant for variant in VARIANTS if variant not in AS_OTHERS]


def over_variants(cases, often):
    """(program, variant) as parameters; those that are not run often are slow."""
    return over(("program", "variant"), cases, often, lambda case: f"{case[0].name}-{case[1]}")


def with_variant(program, variant):
    rules = [dataclasses.replace(rule, **VARIANTS[variant]) for rule in program.rules]
    return dataclasses.replace(program, rules=tuple(rules))


@functools.cache
def adapted(run):
    return lj.adapt(run, strict=True)


def formed(tree):
    """The tree with (W + s·(AB − A₀B₀))·diag(m / ‖·‖) in place of each weight, from the papers."""

    def dense(node):
        if not isinstance(node, lj.LoraWeight):
            return node
        batch, rows, columns = (node.roles.sizes(node.shape, r) for r in ("batch", "in", "out"))
        labels = node.roles.labels(node.ndim)
        order = [
            i for role in ("batch", "in", "out") for i in range(node.ndim) if labels[i] == role
        ]
        w = jnp.transpose(node.base, order).reshape(*batch, np.prod(rows), np.prod(columns))

        def product(a, b):
            a, b = (v.reshape(*batch, v.shape[len(batch)], -1) for v in (a, b))
            return jnp.einsum("...ri,...ro->...io", a, b)

        arrays = dict(node.arrays)
        latent = arrays.get("latent")
        if "v" in arrays:
            latent = jnp.einsum("...u,...urq->...rq", node.v, node.projection)
        if latent is not None:
            factor = node.b.reshape(*batch, node.rank, -1)
            arrays["b"] = jnp.einsum("...rq,...qo->...ro", latent, factor)
        if "lambda_d" in arrays:
            a, b = (arrays[f"shared_{name}"].reshape(node.rank, -1) for name in "ab")
            arrays["a"] = node.lambda_d[..., None] * a
            arrays["b"] = b * node.lambda_b.reshape(*batch, 1, -1)
        delta = product(arrays["a"], arrays["b"])
        if node.start is not None:
            delta = delta - product(*node.start)
        w = w + node.scale[..., None, None].astype(w.dtype) * delta
        if "magnitude" in arrays:
            norm = lax.stop_gradient(jnp.linalg.norm(w, axis=-2, keepdims=True))
            rescaled = w * node.magnitude.reshape(*batch, 1, -1) / norm
            ranks = jnp.broadcast_to(jnp.asarray(node.ranks), batch[:1] if batch else (1,))
            on = (ranks > 0).reshape(-1, *[1] * (w.ndim - 1)) if batch else ranks[0] > 0
            w = jnp.where(on, rescaled, w)
        w = w.reshape(*batch, *rows, *columns)
        return jnp.transpose(w, np.argsort(order))

    return jax.tree.map(dense, tree, is_leaf=is_node)


OF_THEIR_OWN = ("DoRA", "LoRA-XS", "VeRA")  # what each kind of product has to do for them differs
STACK, HEADS, SORTED, TABLE = USUAL


@over_variants(
    [(program, variant) for program in USUAL + WITH_COLUMNS for variant in OF_THEIR_OWN]
    + [(STACK, v) for v in ("DoRA from PiSSA", "rsLoRA", "PiSSA", "LoRA-FA with DoRA")]
    + [(HEADS, v) for v in ("OLoRA", "rsLoRA", "DoRA from PiSSA")]
    + [(SORTED, v) for v in ("PiSSA", "LoRA-FA")]
    + [(TABLE, v) for v in ("OLoRA", "LoRA-FA", "LoRA-FA with DoRA")]
    + [(program, "TinyLoRA") for program in USUAL],
    often=[
        "scanned and rematerialised-DoRA from PiSSA",
        "einsum with heads-OLoRA",
        "experts, tokens sorted-LoRA-FA",
        "embedding looked up and tied-VeRA",
        "convolution-LoRA-XS",
    ],
)
def test_values_and_gradients(program, variant, float64):
    program = with_variant(program, variant)
    params, tree, x = program.inputs(jnp.float64)
    adapter, base = lj.split(tree)

    def values(run, adapter, x):
        def loss(adapter, x):
            y = run(lj.join(adapter, base), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapter, x)

    @jax.jit
    def all_of_it(adapter, x):
        tree = lj.join(adapter, base)
        expected = values(lambda tree, x: program.run(formed(tree), x), adapter, x)
        weights = lj.merge(tree), formed(tree)
        return values(adapted(program.run), adapter, x), expected, program.run(params, x), weights

    ours, expected, plain, weights = jax.device_get(all_of_it(adapter, x))
    assert_close(ours, expected, 1e-9)
    assert np.abs(ours[0][1] - plain).max() > 1e-2, "it must be seen"
    if "scanned" not in program.name:  # one layer of a stack there is not adapted
        assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(ours[1]))
    assert_close(*weights, 1e-12)


@over_variants(
    [(USUAL[i % len(USUAL)], variant) for i, variant in enumerate(VARIANTS)]
    + [(program, "DoRA") for program in WITH_COLUMNS],
    often=["embedding looked up and tied-DoRA from PiSSA"],
)
def test_before_the_first_step(program, variant):
    """Step 0 is the base within 1e-5, and nothing of it is replaced."""
    program = with_variant(program, variant)
    params, x = program.params(jnp.float32), draw(99, program.x)
    fresh = lj.lorafy(params, program.rules)
    near = 1e-4 if variant == "LoRA-XS" else 1e-5  # its R starts at 1e-5, not at 0
    both = jax.jit(lambda t, p, x: (adapted(program.run)(t, x), program.run(p, x)))
    assert_close(*both(fresh, params, x), near)
    stripped = zip(jax.tree.leaves(lj.strip(fresh)), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in stripped)
    assert_identical(lj.join(*lj.split(fresh)), fresh)
    abstract = jax.eval_shape(lambda p: p, params)
    planned = lj.lorafy(abstract, program.rules)
    assert jax.tree.structure(planned) == jax.tree.structure(fresh)
    for plan, leaf in zip(jax.tree.leaves(planned), jax.tree.leaves(fresh), strict=True):
        assert (plan.shape, plan.dtype) == (leaf.shape, leaf.dtype)


BOTH = ("DoRA from PiSSA", "LoRA-FA with DoRA")


@over_variants(
    [(program, BOTH[i % 2]) for i, program in enumerate(USUAL + WITH_COLUMNS)]
    + [(TABLE, "DoRA from PiSSA")],
    often=[
        "scanned and rematerialised-DoRA from PiSSA",
    ],
)
def test_no_product_has_the_shape_of_a_kernel(program, variant):
    program = with_variant(program, variant)
    _, tree, x = program.inputs()
    adapter, base = lj.split(tree)

    def products(run):
        def loss(adapter, base, x):
            return jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))

        hlo = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile().as_text()
        nodes = [n for n in jax.tree.leaves(tree, is_leaf=is_node) if is_node(n)]
        shapes = {n.shape for n in nodes} | {n.shape[n.n_batch :] for n in nodes}
        return [line for shape in shapes for line in dots_of_size(hlo, shape)]

    assert products(adapted(program.run)) == []
    assert products(lambda tree, x: program.run(lj.merge(tree), x)), "the judge must see merging"


@over_variants(
    [((STACK, TABLE)[i % 2], variant) for i, variant in enumerate(DISTINCT)]
    + [(TABLE, "LoRA-FA with DoRA")],
    often=["embedding looked up and tied-LoRA-FA with DoRA"],
)
def test_file_holds_all_of_it(program, variant, tmp_path):
    program = with_variant(program, variant)
    params, tree, _ = program.inputs()
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", params)
    assert_identical(loaded, tree)
    fresh = lorafied(params, program.rules)
    assert_identical(lj.load_adapter(tmp_path / "adapter", fresh), tree)


@pytest.mark.slow
def test_initialisers_that_decompose_run_once(tmp_path, monkeypatch):
    """What is loaded is what was saved: no decomposition is needed, and W is what it was."""
    program = with_variant(PROGRAMS[0], "PiSSA")
    params, tree, x = program.inputs()
    lj.save_adapter(tmp_path / "adapter", tree)

    def refuse(*_, **__):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(jnp.linalg, "svd", refuse)
    loaded = lj.load_adapter(tmp_path / "adapter", params)
    both = jax.jit(lambda t, u, x: (lj.adapt(program.run)(t, x), program.run(formed(u), x)))
    assert_close(*both(loaded, tree, x), 1e-5)
    for node in lj.split(loaded)[1]["up"].values():
        if is_node(node):
            assert node.start[0].shape[0] == node.rank


def test_stacks_with_several_ranks():
    """PiSSA takes each layer's own rank out of it, DoRA leaves unadapted layers alone."""
    params = {"layers": {"kernel": draw(1, (3, 5, 7))}}
    rules = [
        lj.LoraRule(targets=["layers"], layers=[0], rank=3, alpha=4.0, init=init.pissa, dora=True),
        lj.LoraRule(targets=["layers"], layers=[2], rank=1, alpha=3.0, init=init.pissa, dora=True),
    ]
    node = lorafied(params, rules)["layers"]["kernel"]
    taken = node.replace(a=np.zeros(node.a.shape, np.float32), magnitude=None).merged()
    taken, kernel = np.asarray(taken), np.asarray(params["layers"]["kernel"])
    for layer, rank in enumerate([3, 0, 1]):
        values = np.linalg.svd(kernel[layer], compute_uv=False)
        left = np.linalg.svd(taken[layer], compute_uv=False)
        expected = sorted([*values[rank:], *[0.0] * rank], reverse=True)
        np.testing.assert_allclose(left, expected, atol=1e-5)
    tree = with_random_factors({"layers": {"kernel": node}})
    assert_identical(np.asarray(lj.merge(tree)["layers"]["kernel"])[1], kernel[1])
    assert lj.count_params(tree)[0] == (3 + 1) * (5 + 7) + 2 * 7


@pytest.mark.parametrize("of_adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_base", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [*DISTINCT, "bias on B"])
def test_base_and_adapter_may_differ_in_dtype(variant, of_base, of_adapter):
    """Code that forbids silent promotion runs, and its result is that of the merged tree."""
    options = VARIANTS.get(variant, {"bias_on_b": True})
    base = {"k": {"kernel": draw(1, (7, 5), of_base), "bias": draw(2, (5,), of_base)}}
    x = draw(3, (3, 7), of_base)
    rule = lj.LoraRule(targets=["k"], rank=3, alpha=4, dtype=of_adapter, **options)
    params = with_random_factors(lj.lorafy(base, [rule], key=jax.random.key(0)))

    def apply(params, x):
        return x @ params["k"]["kernel"] + params["k"]["bias"]

    adapter, frozen = lj.split(params)
    forward = lj.adapt(apply)
    outputs, back = jax.vjp(lambda adapter: forward(lj.join(adapter, frozen), x), adapter)
    is_exact = "bfloat16" not in (of_base, of_adapter)
    assert_close(outputs, apply(lj.merge(params), x), 1e-5 if is_exact else 5e-2)
    (gradients,) = back(jnp.ones_like(outputs))
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))


@over("program", USUAL + WITH_COLUMNS, often=[STACK.name, HEADS.name, TABLE.name])
def test_bias_on_b(program, float64):
    """xW + s·((xA)B + c): the bias reaches every product of the weight, and no other place."""
    rules = tuple(dataclasses.replace(rule, bias_on_b=True) for rule in program.rules)
    program = dataclasses.replace(program, rules=rules)
    if program.name == "embedding looked up and tied":
        with pytest.raises(lj.MergeError, match="tied head.*bias_on_b=False.*uses='lookup'"):
            lj.adapt(program.run)(*program.inputs(jnp.float64)[1:])
        rules = tuple(dataclasses.replace(rule, uses="lookup") for rule in rules)
        program = dataclasses.replace(program, rules=rules)
    _, tree, x = program.inputs(jnp.float64)
    without = jax.tree.map(
        lambda n: n.replace(bias=None) if is_node(n) else n, tree, is_leaf=is_node
    )
    forward = adapted(program.run)
    both = jax.jit(lambda tree, without, x: (forward(tree, x), forward(without, x)))
    change = np.subtract(*both(tree, without, x))
    assert np.abs(change).max() > 1e-2
    one_product = not any(word in program.name for word in ("conv", "tied"))
    if len(lj.split(tree)[0]) == 1 and one_product:
        node = next(n for n in jax.tree.leaves(tree, is_leaf=is_node) if is_node(n))
        shift = np.broadcast_to(np.asarray(node.scale) * np.asarray(node.bias), change.shape)
        np.testing.assert_allclose(change, shift, atol=1e-12)


def test_bias_on_b_merges_into_the_bias_beside():
    params = {
        "layers": {"kernel": draw(1, (3, 5, 5)), "bias": draw(2, (3, 5))},
        "bare": {"kernel": draw(3, (5, 7))},
    }
    rule = lj.LoraRule(targets=["layers"], rank=2, alpha=3.0, bias_on_b=True)

    def run(params, x):
        layers = params["layers"]
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w["kernel"] + w["bias"]), None), x, layers)[0]
        return x @ params["bare"]["kernel"]

    tree = with_random_factors(lorafied(params, [rule]))
    x = draw(9, (11, 5))
    both = jax.jit(lambda t, x: (lj.adapt(run, strict=True)(t, x), run(lj.merge(t), x)))
    assert_close(*both(tree, x), 1e-5)
    bare = lorafied(params, [dataclasses.replace(rule, targets=["bare"])])
    with pytest.raises(
        ValueError, match="'bare/kernel' cannot be merged.*bias on B.*no bias stands beside it"
    ):
        lj.merge(bare)


def test_dora_with_dropout_drops_the_change_alone():
    """PEFT's: x meets W as it is, and what the adapter changes is computed of the dropped x."""
    params = {"kernel": draw(1, (5, 7))}
    rule = lj.LoraRule(targets=["kernel"], rank=2, alpha=3.0, dora=True, dropout=0.5)
    tree = with_random_factors(lorafied(params, [rule]))
    x = np.ones((4000, 5), np.float32)
    forward = lj.adapt(lambda p, x: x @ p["kernel"])
    y = np.asarray(
        jax.jit(lambda t, x, key: forward(t, x, dropout_key=key))(tree, x, jax.random.key(3))
    )
    base, merged = np.asarray(params["kernel"]), np.asarray(lj.merge(tree)["kernel"])
    np.testing.assert_allclose(y.mean(0), x[0] @ merged, atol=0.1)
    change = (y - x[:1] @ base) @ np.linalg.pinv(merged - base)
    assert set(np.round(change.ravel(), 3)) == {0.0, 2.0}


def test_frozen_a_is_not_differentiated_and_its_input_not_kept():
    """LoRA-FA's compiled memory: of a chain of products, no activation is kept for A."""

    def run(params, x):
        for layer in range(4):
            x = x @ params[f"l{layer}"]["kernel"]
        return x

    params = {f"l{layer}": {"kernel": draw(layer, (64, 64))} for layer in range(4)}
    x = draw(9, (4096, 64))

    def temporaries(**changes):
        rule = lj.LoraRule(targets=r"l\d/kernel", rank=2, alpha=3.0, **changes)
        adapter, base = lj.split(with_random_factors(lj.lorafy(params, [rule])))

        def loss(adapter, base, x):
            return jnp.sum(jnp.square(lj.adapt(run)(lj.join(adapter, base), x)))

        compiled = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile()
        assert set(adapter["l0/kernel"]) == ({"b"} if changes else {"a", "b"})
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(freeze_a=True) <= temporaries() - 2 * x.nbytes


@pytest.mark.slow
def test_what_a_narrow_product_gave_is_not_kept_for_its_magnitude(monkeypatch):
    """It is taken again: the same gradients, with less memory."""
    narrow, wide = draw(1, (4, 66, 22)), draw(2, (4, 22, 66))
    params = {"layers": {"narrow": {"kernel": narrow}, "wide": {"kernel": wide}}}
    rule = lj.LoraRule(targets=["layers"], rank=2, alpha=3.0, dora=True)
    adapter, base = lj.split(with_random_factors(lorafied(params, [rule])))
    x = draw(9, (2048, 66))

    def run(params, x):
        def layer(x, w):
            heads = jnp.sin((x @ w["narrow"]["kernel"]).reshape(-1, 2, 11))
            return jnp.tanh(heads.reshape(-1, 22) @ w["wide"]["kernel"]), None

        return lax.scan(layer, x, params["layers"])[0]

    def gradients(forward):
        def loss(adapter, base, x):
            return jnp.sum(jnp.square(forward(lj.join(adapter, base), x)))

        compiled = jax.jit(jax.grad(loss)).lower(adapter, base, x).compile()
        return compiled(adapter, base, x), compiled.memory_analysis().temp_size_in_bytes

    again, less = gradients(lj.adapt(run, strict=True))
    monkeypatch.setattr("lora_jax.core.product._is_cheap_to_recompute", lambda weight: False)
    kept, more = gradients(lj.adapt(run, strict=True))
    assert_close(again, kept, 1e-5)
    kept_bytes = 4 * 2048 * 22 * 4  # of four layers
    assert less <= more - 0.8 * kept_bytes


def test_magnitudes_need_no_array_of_the_kernels_shape():
    kernel = jax.ShapeDtypeStruct((12, 512, 1024), jnp.float32)
    rule = lj.LoraRule(targets=["kernel"], rank=2, dora=True)
    node = lj.lorafy({"kernel": kernel}, [rule])["kernel"]
    bytes_of = lambda f: jax.jit(f).lower(node).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    whole = 4 * 12 * 512 * 1024
    assert bytes_of(lambda node: node.factored().gain) < whole / 10
    assert bytes_of(lambda node: jnp.linalg.norm(node.merged(), axis=1)) >= whole


def twice(params, x):
    table = params["embed"]["embedding"]
    return x @ (2 * table + table).T


@over("uses", ["lookup", "product", "each"], often=["each"])
def test_a_tied_table_adapted_use_by_use(uses, float64, tmp_path):
    """As if the table were two, one or both of them adapted: PEFT's, where tied layers are."""
    program = NAMED["embedding looked up and tied"]
    rule = dataclasses.replace(program.rules[0], uses=uses)
    params, tree, x = dataclasses.replace(program, rules=(rule,)).inputs(jnp.float64)
    ids = array([[0, 3, 10, 3], [7, 1, 2, 9]])
    node, plain = tree["embed"]["embedding"], params["embed"]["embedding"]
    assert node.ranks == ((4,) if uses == "each" else (2,)) and float(node.scale) == 1.5

    def by_hand(node, x):
        def changed(first, last):
            return plain + 1.5 * node.a[first:last].T @ node.b[first:last]

        looked_up = plain if uses == "product" else changed(0, 2)
        head = plain if uses == "lookup" else changed(*((2, 4) if uses == "each" else (0, 2)))
        return jnp.tanh(looked_up[ids] + x) @ head.T

    adapter, base = lj.split(tree)

    def values(forward, adapter):
        def loss(adapter):
            y = forward(lj.join(adapter, base), x)
            return jnp.sum(y**2), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
        return y, gradient

    expected = lambda tree, x: by_hand(tree["embed"]["embedding"], x)  # noqa: E731
    forwards = (lj.adapt(program.run, strict=True), expected)
    ours, theirs = jax.jit(lambda a: [values(forward, a) for forward in forwards])(adapter)
    assert_close(ours[0], theirs[0], 1e-12)
    assert_close(ours[1], theirs[1], 1e-9)
    lj.save_adapter(tmp_path / "a", tree)
    assert_identical(lj.load_adapter(tmp_path / "a", params), tree)
    with pytest.raises(ValueError, match=f"use.* .uses='{uses}'"):
        lj.merge(tree)
    with pytest.raises(lj.MergeError, match="cannot be merged"):
        lj.adapt(lambda p, x: jnp.sin(p["embed"]["embedding"]))(tree, x)
    with pytest.raises(lj.MergeError, match="do not all see the same adapter"):
        lj.adapt(lambda p, x: x @ (2 * p["embed"]["embedding"] + p["embed"]["embedding"]).T)(
            tree, x
        )


@pytest.mark.parametrize("init", [lj.init.kaiming, lj.init.orthogonal])
def test_each_of_two_adapters_starts_at_the_base(init):
    program = NAMED["embedding looked up and tied"]
    params, x = program.params(jnp.float32), draw(3, program.x)
    rule = dataclasses.replace(program.rules[0], uses="each", init=init)
    tree = lorafied(params, [rule])
    both = jax.jit(lambda t, p, x: (lj.adapt(program.run)(t, x), program.run(p, x)))
    assert_close(*both(tree, params, x), 1e-6)
    a = np.asarray(tree["embed"]["embedding"].a)
    assert np.abs(a[:2] - a[2:]).max() > 1e-3


@pytest.mark.parametrize(
    "more", [{"dora": True}, {"bias_on_b": True}, {"freeze_a": True}, {"init": lj.init.pissa}]
)
def test_an_adapter_for_each_use_is_plain(more):
    with pytest.raises(ValueError, match="uses='each' gives a table one plain LoRA"):
        lj.LoraRule(targets=["embed"], uses="each", **more)


@over("variant", ["dora", "bias_on_b"], often=())
def test_what_is_filled_keeps_the_fill_value(variant, float64):
    """Rows beyond a table, and members beyond a stack, are those of the merged weight."""
    params = {"table": draw(1, (5, 7), jnp.float64), "stack": draw(2, (3, 5, 7), jnp.float64)}
    how = {"rank": 2, "alpha": 3.0, "dtype": jnp.float64, variant: True}
    rules = [
        lj.LoraRule(targets=["table"], in_axes=(0,), out_axes=(1,), **how),
        lj.LoraRule(targets=["stack"], in_axes=(1,), out_axes=(2,), **how),
    ]
    tree = with_random_factors(lorafied(params, rules))
    ids, members, x = (
        array([[1, 7, 3], [9, 0, 5]]),
        array([2, 3]),
        draw(3, (4, 5), jnp.float64),
    )

    def run(params, x):
        table, stack = params["table"], params["stack"]
        taken = jnp.take(table, ids, axis=0, mode="fill", fill_value=7.0)
        got = jnp.moveaxis(table, 0, 1).at[:, ids[0]].get(mode="fill", fill_value=-2.0)
        chosen = stack.at[members].get(mode="fill", fill_value=0.5)
        return taken, got, jnp.einsum("bi,eio->ebo", x, chosen)

    adapter, base = lj.split(tree)

    def values(forward):
        def loss(adapter, x):
            outputs = forward(lj.join(adapter, base), x)
            return sum(jnp.sum(jnp.sin(y)) for y in outputs), outputs

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    def merged(tree, x):
        plain = {name: node.merged() for name, node in tree.items()}
        return run(plain, x)

    both = jax.jit(lambda *args: [values(f)(*args) for f in (lj.adapt(run, strict=True), merged)])
    ours, theirs = both(adapter, x)
    taken, got, product = map(np.array, ours[0][1])
    assert (taken[ids > 4] == 7).all() and (got[:, ids[0] > 4] == -2).all()
    if variant == "dora":
        return assert_close(ours, theirs, 1e-9)
    shifts = {
        n: np.asarray(node.scale)[..., None] * np.asarray(node.bias) for n, node in tree.items()
    }
    taken[ids <= 4] -= shifts["table"]
    got[:, ids[0] <= 4] -= shifts["table"][:, None]
    product[0] -= shifts["stack"][2]
    assert_close([taken, got, product], list(theirs[0][1]), 1e-9)
