"""Adapters out of models that were fine-tuned in full, with NumPy's decompositions as the judge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.bank import ExtractWarning, extract
from tests.support import assert_close, assert_identical, draw


@functools.cache
def trees(dtype=jnp.float32):
    """A tree before and after full fine-tuning; the change of each layer has a rank of its own."""

    def random(key, shape):
        return np.asarray(draw(key, shape, dtype))

    before = {
        "layers": {
            "q": {"kernel": random(1, (3, 5, 7)), "bias": random(2, (3, 7))},
            "experts": {"kernel": random(3, (3, 2, 5, 11))},
        },
        "out": {"kernel": random(4, (2, 3, 5))},
        "embed": {"embedding": random(5, (13, 5))},
        "norm": random(6, (5,)),
        "still": {"kernel": random(7, (5, 3))},
    }
    after = jax.tree.map(lambda x: x + x.dtype.type(0.3) * random(x.size, x.shape), before)
    ranks = [random(8, (5, r)) @ random(9, (r, 7)) for r in (1, 3, 2)]
    after["layers"]["q"]["kernel"] = before["layers"]["q"]["kernel"] + np.stack(ranks)
    before, after = (jax.tree.map(jnp.asarray, tree) for tree in (before, after))
    after["still"] = before["still"]
    return before, after


RULES = [
    lj.LoraRule(targets=["q", "experts", "still"], dropout=0.1),
    lj.LoraRule(targets=["out"], in_axes=[0, 1], out_axes=[2]),
]
KERNELS = {  # path: (keys, batch axes, in axes flattened)
    "layers/q/kernel": (("layers", "q"), 1, 5),
    "layers/experts/kernel": (("layers", "experts"), 2, 5),
    "out/kernel": (("out",), 0, 6),
}


def of(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree["kernel"]


def singular(before, after, path):
    """The change as a stack of matrices, and its singular values."""
    keys, n, rows = KERNELS[path]
    change = np.asarray(of(after, keys), np.float64) - np.asarray(of(before, keys), np.float64)
    change = change.reshape(*change.shape[:n], rows, -1)
    return change, np.linalg.svd(change, compute_uv=False)


@pytest.mark.slow
def test_rank(float64):
    before, after = trees(jnp.float64)
    rules = [*RULES[:1], lj.LoraRule(targets=["out"], in_axes=[0, 1], out_axes=[2])]
    rules = [lj.LoraRule(**vars(rule) | {"dtype": jnp.float64}) for rule in rules]
    with pytest.warns(
        ExtractWarning, match=r"3 changed leaves.*embed/embedding, layers/q/bias, norm\."
    ):
        tree, found = extract(before, after, rules, rank=2)
    assert list(found.lost) == ["embed/embedding", "layers/q/bias", "norm"]
    for path, (keys, _, _) in KERNELS.items():
        node = of(tree, keys)
        assert node.ranks == found.ranks[path] == (2,)
        change, values = singular(before, after, path)
        lost = np.asarray(node.merged() - of(after, keys)).reshape(change.shape)
        tails = np.sqrt((values[..., 2:] ** 2).sum(-1))
        assert_close(np.linalg.norm(lost, axis=(-2, -1)), tails, 1e-9)
        share = np.sqrt((values[..., 2:] ** 2).sum() / (values**2).sum())
        assert_close(found.errors[path], share, 1e-9)
    assert of(tree, ("layers", "q")).dropout == 0.1
    assert tree["still"]["kernel"] is before["still"]["kernel"], "no change, no adapter"
    assert of(tree, ("out",)).base is before["out"]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 2])
def test_energy_chooses_the_rank_of_each_layer(most):
    before, after = trees()
    tree, found = extract(before, after, RULES, rank=most, energy=0.9, keep_rest=True)
    for path, (keys, n, _) in KERNELS.items():
        energies = singular(before, after, path)[1] ** 2
        energies = energies.reshape(energies.shape[:1] * min(n, 1) + (-1, energies.shape[-1]))
        kept = np.cumsum(energies.sum(-2), axis=-1)
        kept = np.atleast_2d(kept / kept[..., -1:])
        expected = np.minimum((kept < 0.9).sum(-1) + 1, most or 99)
        ranks = of(tree, keys).ranks
        assert np.array_equal(np.broadcast_to(ranks, expected.shape), expected)
        if not most:
            assert found.errors[path] ** 2 <= 0.1
    assert len(set(of(tree, ("layers", "q")).ranks)) > 1 or most
    merged = lj.merge(tree)
    assert set(found.in_full) == {"embed/embedding", "layers/q/bias", "norm"} and not found.lost
    assert_identical(merged["norm"], after["norm"])
    assert "layers/q/kernel" in str(found) and "embed/embedding" in str(found)


@pytest.mark.slow
def test_the_whole_rank_is_the_whole_change(tmp_path):
    before, after = trees()
    rules = [*RULES, lj.TrainRule(targets=["norm"]), lj.TrainRule(targets=["embed"], rows=[2])]
    with pytest.warns(ExtractWarning, match="layers/q/bias"):
        tree, found = extract(before, after, rules, rank=99)
    assert max(found.errors[path] for path in KERNELS) == 0
    assert [of(tree, keys).ranks for keys, _, _ in KERNELS.values()] == [(5,), (5,), (5,)]
    assert 0.5 < found.errors["embed/embedding"] < 1, "the other rows"
    merged = lj.merge(tree)
    for path in ("layers/experts", "layers/q", "out"):
        assert_close(of(merged, path.split("/")), of(after, path.split("/")), 1e-5)
    assert_identical(merged["embed"]["embedding"][2], after["embed"]["embedding"][2])
    low, _ = extract(before, after, RULES, energy=1 - 1e-6, keep_rest=True)
    assert of(low, ("layers", "q")).ranks == (1, 3, 2)
    assert_close(lj.merge(low), after, 1e-5)
    part, base = ({"q": tree["layers"]["q"]} for tree in (low, before))
    lj.save_adapter(tmp_path / "extracted", part)
    assert_identical(lj.load_adapter(tmp_path / "extracted", base), part)


@pytest.mark.slow
def test_layers_that_a_rule_leaves_out_count_as_lost():
    before, after = trees()
    rules = [lj.LoraRule(targets=["q"], layers=[1])]
    with pytest.warns(ExtractWarning):
        tree, found = extract(before, after, rules, rank=5)
    assert of(tree, ("layers", "q")).ranks == (0, 5, 0)
    energies = (singular(before, after, "layers/q/kernel")[1] ** 2).sum(-1)
    expected = np.sqrt((energies[0] + energies[2]) / energies.sum())
    assert_close(found.errors["layers/q/kernel"], expected, 1e-5)


def test_the_rank_is_the_least_that_keeps_the_energy():
    """A change that is the same along five directions needs three for half of it, all for 0.9."""
    before = {"q": {"kernel": draw(1, (3, 5, 7))}}
    after = {"q": {"kernel": before["q"]["kernel"] + jnp.eye(5, 7)}}
    for energy, rank in [(0.5, 3), (0.9, 5)]:
        tree, _ = extract(before, after, energy=energy)
        assert tree["q"]["kernel"].ranks == (rank,)


@pytest.mark.slow
def test_codes_are_mended():
    kernel = {"layers": {"up": {"kernel": draw(1, (2, 64, 128))}}}
    base = lj.quantized.quantize(kernel, "int4")
    tree, found = extract(base, kernel, rank=32)
    before = np.asarray(
        base["layers"]["up"]["kernel"].as_array() - kernel["layers"]["up"]["kernel"]
    )
    after = np.asarray(lj.merge(tree)["layers"]["up"]["kernel"] - kernel["layers"]["up"]["kernel"])
    assert_close(
        np.linalg.norm(after) / np.linalg.norm(before), found.errors["layers/up/kernel"], 1e-3
    )
    assert found.errors["layers/up/kernel"] < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give rank=.*or energy="),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, r"must be in \(0, 1\]"),
        ({"rank": 2, "rules": [lj.LoraRule(targets=["q"], rank=4)]}, "rank of.*Pass it to extract"),
        ({"rank": 2, "rules": [lj.LoraRule(targets=["q"], dora=True)]}, "dora of.*Remove it"),
        ({"rank": 2, "rules": [lj.LoraRule(targets=["still"])]}, "none of the leaves.*differs"),
        ({"rank": 2, "before": "adapted"}, "before is adapted"),
        ({"rank": 2, "before": "smaller"}, r"'norm' has the shape \(3,\) in before, but \(5,\)"),
        ({"rank": 2, "before": "more"}, "only one of the two trees has 'more'"),
    ],
)
def test_mistakes(options, message):
    before, after = trees()
    others = {
        "adapted": lambda: lj.lorafy(before, RULES),
        "smaller": lambda: before | {"norm": jnp.zeros(3)},
        "more": lambda: before | {"more": jnp.zeros(3)},
    }
    if name := options.pop("before", None):
        before = others[name]()
    with pytest.raises(ValueError, match=message):
        extract(before, after, **options)
