"""Parameters that train besides the factors: rows of tables, layers of stacks, biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.support import array, assert_close, assert_identical, dots_of_size, draw, lorafied

ROWS = (3, 10, 7)
IDS = array([[0, 3, 10, 3], [7, 1, 2, 9]])


def tied(params, x):
    """A look-up and a tied head."""
    table = params["embed"]["embedding"]
    return jnp.tanh(jnp.take(table, IDS, axis=0) @ params["up"]["kernel"] + x) @ table.T


def inputs(dtype=jnp.float32, changed=True):
    params = {
        "embed": {"embedding": draw(1, (11, 5), dtype)},
        "up": {"kernel": draw(2, (5, 5), dtype)},
    }
    rules = [
        lj.TrainRule(targets=["embed"], rows=ROWS),
        lj.LoraRule(targets=["up"], rank=2, alpha=3.0, dtype=dtype),
    ]
    tree = lorafied(params, rules)
    adapter, base = lj.split(tree)
    if changed:
        adapter = jax.tree.map(
            lambda v: jnp.asarray(
                np.asarray(v) + np.cos(np.arange(v.size)).reshape(v.shape), dtype
            ),
            adapter,
        )
    return params, lj.join(adapter, base), draw(9, (2, 4, 5), dtype)


def test_rows_are_seen_where_the_table_is(float64):
    params, tree, x = inputs(jnp.float64)
    table = np.array(params["embed"]["embedding"])
    table[list(ROWS)] = tree["embed"]["embedding"].value
    assert_close(lj.merge(tree)["embed"]["embedding"], table, 1e-12)
    adapter, base = lj.split(tree)

    def values(run, adapter):
        loss = lambda adapter: jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))  # noqa: E731
        return jax.value_and_grad(loss)(adapter)

    @jax.jit
    def all_of_it(adapter):
        theirs = values(lambda tree, x: tied(lj.merge(tree), x), adapter)
        change = lj.adapt(tied)(lj.join(adapter, base), x) - tied(params, x)
        return values(lj.adapt(tied, strict=True), adapter), theirs, change

    ours, theirs, change = jax.device_get(all_of_it(adapter))
    assert_close(ours, theirs, 1e-9)
    assert set(ours[1]) == {"embed/embedding", "up/kernel"}
    assert ours[1]["embed/embedding"]["value"].shape == (3, 5)
    assert np.abs(ours[1]["embed/embedding"]["value"]).min() > 1e-6
    assert np.abs(change).max() > 1e-2


def test_before_training_nothing_differs():
    params, tree, x = inputs(changed=False)
    run = jax.jit(lj.adapt(tied, strict=True))
    assert_identical(run(tree, x), run(lj.join({}, lj.split(tree)[1]), x))
    assert_identical(lj.merge(tree)["embed"], params["embed"])
    assert lj.strip(tree)["embed"]["embedding"] is params["embed"]["embedding"]
    assert lj.count_params(tree) == (3 * 5 + 2 * 10, 55 + 25 + 3 * 5 + 2 * 10)


def test_the_table_is_neither_copied_nor_differentiated():
    params = {"embed": {"embedding": draw(1, (4099, 31))}, "up": {"kernel": draw(2, (31, 31))}}
    x = draw(9, (2, 4, 31))

    def compiled(rule, run):
        adapter, base = lj.split(lj.lorafy(params, [rule]))
        loss = lambda ad, base, x: jnp.sum(jnp.sin(run(lj.join(ad, base), x)))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(adapter, base, x).compile()

    rows = lj.TrainRule(targets=["embed"], rows=ROWS)
    ours = compiled(rows, lj.adapt(tied, strict=True))
    control = compiled(rows, lambda tree, x: tied(lj.merge(tree), x))
    assert dots_of_size(ours.as_text(), (4099, 31)) == []
    assert dots_of_size(control.as_text(), (4099, 31))
    bytes_of = lambda c: c.memory_analysis().temp_size_in_bytes  # noqa: E731
    assert bytes_of(ours) < bytes_of(control) - 4099 * 31 * 4


def test_rows_and_layers_are_filed(tmp_path):
    params, tree, x = inputs()
    lj.save_adapter(tmp_path / "a", tree)
    assert_identical(lj.load_adapter(tmp_path / "a", params), tree)
    fresh = inputs(changed=False)[1]
    assert_identical(lj.load_adapter(tmp_path / "a", fresh), tree)
    other = jax.tree.map(lambda v: v + 1, params)
    with pytest.raises(lj.AdapterError, match="another base"):
        lj.load_adapter(tmp_path / "a", other)


STACK = {
    "layers": {
        "up": {"kernel": draw(1, (3, 5, 5)), "bias": draw(2, (3, 5))},
        "norm": {"scale": draw(3, (3, 5))},
    },
    "head": {"kernel": draw(4, (5, 7)), "bias": draw(5, (7,))},
}


def stacked(params, x):
    def layer(x, w):
        return x + jnp.tanh((x * w["norm"]["scale"]) @ w["up"]["kernel"] + w["up"]["bias"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("layers", [None, [2], [0, 2]])
def test_biases_of_adapted_layers_and_no_others(layers):
    rule = lj.LoraRule(targets=["up"], layers=layers, rank=2, alpha=3.0, train_bias=True)
    tree = lj.lorafy(STACK, [rule])
    adapter, base = lj.split(tree)
    assert set(adapter) == {"layers/up/kernel", "layers/up/bias"}
    n = 3 if layers is None else len(layers)
    assert lj.count_params(tree)[0] == n * (2 * 10 + 5)
    assert adapter["layers/up/bias"]["value"].shape == (n, 5)
    bias = adapter["layers/up/bias"]
    bias["value"] = array(np.asarray(bias["value"]) + np.float32(0.5))
    merged = lj.merge(lj.join(adapter, base))
    change = np.subtract(merged["layers"]["up"]["bias"], STACK["layers"]["up"]["bias"])
    expected = np.zeros((3, 5))
    expected[[0, 1, 2] if layers is None else layers] = 0.5
    np.testing.assert_allclose(change, expected, atol=1e-6)
    x = draw(9, (11, 5))
    run = lj.adapt(stacked, strict=True)
    both = jax.jit(lambda tree, merged, x: (run(tree, x), stacked(merged, x)))
    assert_close(*both(lj.join(adapter, base), merged, x), 1e-5)


def test_layers_of_norms_and_every_bias():
    rules = [
        lj.TrainRule(targets=["norm"], layers=[1]),
        lj.TrainRule(targets=["bias"]),
        lj.LoraRule(targets=["kernel"], rank=2, alpha=3.0),
    ]
    tree = lj.lorafy(STACK, rules)
    adapter, _ = lj.split(tree)
    assert {path: tuple(p) for path, p in adapter.items() if "kernel" not in path} == {
        "layers/norm/scale": ("value",),
        "layers/up/bias": ("value",),
        "head/bias": ("value",),
    }
    assert adapter["layers/norm/scale"]["value"].shape == (1, 5)
    numbered = {f"layers_{i}": {"norm": {"scale": draw(i, (5,))}} for i in range(3)}
    chosen = lj.split(lj.lorafy(numbered, [lj.TrainRule(targets=["norm"], layers=[0, 2])]))[0]
    assert set(chosen) == {"layers_0/norm/scale", "layers_2/norm/scale"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"targets": ["embed"], "rows": [11]}, r"row 11 of 'embed/embedding', which has only 11"),
        ({"targets": ["embed"], "rows": [3, 3]}, "must be different indices"),
        ({"targets": ["embed"], "rows": [-1]}, "counted from 0"),
        ({"targets": ["embed"], "rows": [1], "layers": [1]}, "Give one of them"),
        ({"targets": ["embed"], "layers": [12]}, "layer 12 of"),
    ],
)
def test_wrong_rows(rule, message):
    with pytest.raises(ValueError, match=message):
        lj.lorafy(inputs()[0], [lj.TrainRule(**rule)])


def test_rows_of_what_is_no_table():
    with pytest.raises(ValueError, match=r"'head/bias' has the shape \(7,\)"):
        lj.lorafy(STACK, [lj.TrainRule(targets=["head"], rows=[1], exclude=["kernel"])])


def test_low_rank_embedding_and_rows_do_not_mix():
    rules = [lj.TrainRule(targets=["embed"], rows=[1]), lj.LoraRule(targets=["embed"], rank=2)]
    with pytest.raises(ValueError, match="An earlier rule selects 'embed/embedding'"):
        lj.lorafy(inputs()[0], rules)
