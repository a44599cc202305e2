"""Functions of adapted trees through `jax.export`: written, read in another process, called."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import lora_jax as lj
from lora_jax.saving.exported import register
from lora_jax.variants import PARTS
from tests.support import array, assert_close, draw, lorafied, over, with_random_factors

PARAMS = {
    "embed": {"embedding": draw(1, (13, 5))},
    "layers": {"kernel": draw(2, (3, 5, 5)), "bias": draw(3, (3, 5))},
    "out": {"kernel": draw(4, (5, 7)), "bias": draw(5, (7,))},
}
IDS = array([[3, 1, 12], [0, 3, 7]])
RULES = {
    "LoRA": [lj.LoraRule(targets=["layers", "out"], rank=2, alpha=3.0, dropout=0.1)],
    "DoRA": [lj.LoraRule(targets=["layers", "out"], rank=2, alpha=3.0, dora=True)],
    "bias on B, A frozen": [
        lj.LoraRule(targets=["out"], rank=2, alpha=3.0, bias_on_b=True, freeze_a=True)
    ],
    "mixed ranks": [
        lj.LoraRule(targets=["layers"], layers=np.arange(1), rank=3, alpha=2.0),
        lj.LoraRule(targets=["layers"], layers=[2], rank=1, alpha=5.0),
    ],
    "LoRA-XS": [lj.LoraRule(targets=["layers", "out"], rank=2, alpha=3.0, xs=True)],
    "VeRA": [lj.LoraRule(targets=["layers", "out"], rank=3, vera=True, dropout=0.1)],
    "out of W": [lj.LoraRule(targets=["layers"], rank=2, alpha=3.0, init=lj.init.pissa)],
    "rows, layers and whole leaves": [
        lj.TrainRule(targets=["embedding"], rows=[3, 7]),
        lj.TrainRule(targets="layers/bias", layers=[1]),
        lj.TrainRule(targets=["out"]),
        lj.LoraRule(targets=["layers"], rank=2),
    ],
    "one use of a table": [lj.LoraRule(targets=["embed"], rank=2, alpha=3.0, uses="lookup")],
}


def run(params, ids):
    x = params["embed"]["embedding"][ids]
    for layer in range(3):
        x = jnp.tanh(x @ params["layers"]["kernel"][layer] + params["layers"]["bias"][layer])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


PLAIN = jax.jit(run)


def tree_of(name):
    tree = with_random_factors(lorafied(PARAMS, RULES[name]))
    if not name.startswith("rows"):
        return tree
    return jax.tree.map(lambda x: array(np.asarray(x) + np.float32(0.01)), tree)


def written(fn, *args):
    return export.export(jax.jit(fn))(*args).serialize()


@over("name", RULES, often=["mixed ranks"])
def test_what_is_read_gives_what_adapt_gives(name):
    tree = tree_of(name)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tree, IDS))
    text = written(lj.adapt(run), *abstract)
    expected = np.asarray(jax.jit(lj.adapt(run))(tree, IDS))
    assert np.abs(expected - np.asarray(PLAIN(PARAMS, IDS))).max() > 1e-2
    assert_close(export.deserialize(text).call(tree, IDS), expected, 1e-6)
    other = lj.lorafy(PARAMS, [lj.LoraRule(targets=["embed"], rank=2)])
    with pytest.raises(ValueError, match="tree"):
        export.deserialize(text).call(other, IDS)


@over("name", RULES, often=["bias on B, A frozen"])
def test_the_halves_are_read_and_so_are_gradients(name):
    adapter, base = lj.split(tree_of(name))

    def loss(adapter, base, ids):
        return jnp.mean(lj.adapt(run)(lj.join(adapter, base), ids) ** 2)

    expected = jax.jit(jax.grad(loss))(adapter, base, IDS)
    read = export.deserialize(written(jax.grad(loss), adapter, base, IDS))
    assert_close(read.call(adapter, base, IDS), expected, 1e-5)


def test_an_adapted_tree_is_read_where_it_comes_out():
    """Static data of what is returned is that of what was given, part by part."""
    params = jax.eval_shape(lambda: PARAMS)
    for name, rules in RULES.items():
        tree = lj.lorafy(params, rules)
        read = export.deserialize(written(lambda t: jax.tree.map(jnp.sin, t), tree))
        assert read.out_tree == jax.tree.structure(tree), name
    tree = tree_of(name)
    assert jax.tree.structure(read.call(tree)) == jax.tree.structure(tree)
    coded = lj.quantized.quantize({"kernel": draw(1, (32, 5))}, "int8")
    read = export.deserialize(written(lambda t: t, coded))
    assert read.out_tree == jax.tree.structure(coded), "a base in codes is a base in codes"


@pytest.mark.slow
def test_another_process_reads_it(tmp_path):
    """One that has done nothing but import the package, and gets its tree from a file."""
    name = "DoRA"
    tree = tree_of(name)
    (tmp_path / "program").write_bytes(written(lj.adapt(run), tree, IDS))
    lj.save_adapter(tmp_path / "adapter", tree)
    np.savez(tmp_path / "base.npz", **{"/".join(k): v for k, v in flat(PARAMS)})
    code = """
import pathlib, sys, numpy as np, jax, jax.numpy as jnp, lora_jax as lj
from jax import export
folder, params = pathlib.Path(sys.argv[1]), {}
for path, array in np.load(folder / "base.npz").items():
    module, leaf = path.split("/")
    params.setdefault(module, {})[leaf] = jnp.asarray(array)
tree = lj.load_adapter(folder / "adapter", params)
program = export.deserialize(bytearray((folder / "program").read_bytes()))
np.save(folder / "out.npy", program.call(tree, jnp.asarray([[3, 1, 12], [0, 3, 7]])))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "out.npy"), lj.adapt(run)(tree, IDS), 1e-5)


def flat(params):
    return [((m, n), leaf) for m, leaves in params.items() for n, leaf in leaves.items()]


@pytest.mark.parametrize("name", ["core", "magnitude"])
def test_a_part_of_ones_own_is_refused_by_name(name):
    def with_core(weight, node, d):
        return weight.replace(a=weight.a * jnp.expand_dims(d, range(d.ndim, weight.a.ndim)))

    core = lj.Part(name, ("batch", "rank"), lambda node: jnp.ones(node.shape_of(name)), with_core)
    tree = with_random_factors(
        lorafied(PARAMS, [lj.LoraRule(targets=["out"], rank=2, extras=[core])])
        if name not in PARTS
        else tree_with_other_part(core)
    )
    with pytest.raises(ValueError, match=f"the part '{name}'.*jax.tree.flatten"):
        written(lj.adapt(run), tree, IDS)

    # The remedy that the message names.
    leaves, structure = jax.tree.flatten(tree)
    of_leaves = lambda leaves, ids: lj.adapt(run)(structure.unflatten(leaves), ids)  # noqa: E731
    read = export.deserialize(written(of_leaves, leaves, IDS))
    assert_close(read.call(leaves, IDS), jax.jit(of_leaves)(leaves, IDS), 1e-6)


def tree_with_other_part(part):
    """A tree whose part has the name of one of ours, and does something else."""
    tree = lj.lorafy(PARAMS, [lj.LoraRule(targets=["out"], rank=2)])
    node = tree["out"]["kernel"].replace(extras=(part,), magnitude=jnp.ones(2))
    return tree | {"out": tree["out"] | {"kernel": node}}


def test_registering_again_is_refused():
    """So the import alone has registered them."""
    with pytest.raises(ValueError, match="LoraWeight"):
        register()
