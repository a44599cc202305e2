"""Kernels whose paths name a head or an embedding: a trace decides whether they are adapted."""

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt import observed
from lora_jax.core.weight import leaves_of
from tests.support import array, draw, numpy_init

X = draw(9, (13, 5))
IDS = array([[3, 0, 9], [10, 3, 1]])
RULES = [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)]


def tree_of(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """A nested tree; ``a__b`` stands for the path a/b."""
    tree: dict[str, Any] = {}
    for index, (path, shape) in enumerate(shapes.items()):
        *parents, name = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = draw(index, shape)
    return tree


def adapted_paths(fn, params, *args) -> set[str]:
    leaves, _ = leaves_of(lj.lorafy(params, RULES, trace=(fn, params, *args)))
    return {path for path, leaf in leaves if lj.is_node(leaf)}


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def projector(p, x):
    """A vision tower with a head that projects to the width of a language model."""
    return mlp(p["text"], x @ p["img"]["head"]["kernel"])


def projector_used_twice(p, x):
    """No output needs the head's second product."""
    kernel = p["img"]["head"]["kernel"]
    _ = jnp.tanh(x[::2]) @ kernel
    return mlp(p["text"], x @ kernel)


def tower(p, x):
    return mlp(p["text"], x)[:, :7] @ p["head"]["kernel"]


def one_hot_lookup(p, ids):
    return mlp(p["text"], jax.nn.one_hot(ids, 11) @ p["embed"]["w"])


def residual_time_embedding(p, x):
    time = jnp.tanh(x @ p["time_embedding"]["linear_1"]) @ p["time_embedding"]["linear_2"]
    return mlp(p["text"], x + time)


def two_layer_head(p, x):
    hidden = jnp.tanh(mlp(p["text"], x) @ p["score"]["dense"])
    return hidden @ p["score"]["out"]


def head_whose_first_layer_embeds(p, x):
    hidden = jnp.tanh(mlp(p["text"], x) @ p["classifier"]["embed"])
    return hidden @ p["classifier"]["out"]


def heads_of_values_and_tokens(p, x):
    hidden = mlp(p["text"], x)
    return hidden @ p["lm_head"]["kernel"], jnp.squeeze(hidden @ p["score"]["kernel"], -1)


def value_that_conditions(p, x):
    """The value is an output, and the next layer's input too."""
    value = 2.0 * (x @ p["score"]["kernel"]) + 1.0
    return mlp(p["text"], x + value), value


def tied(p, ids):
    return mlp(p["text"], p["embed"]["w"][ids]) @ p["embed"]["w"].T


def scanned(p, x):
    x, _ = lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, p["text"]["up"])
    return x @ p["head"]["kernel"]


def branched(p, x):
    hidden = lax.cond(x.sum() > 0, lambda x: x @ p["head"]["a"], lambda x: x @ p["head"]["b"], x)
    return mlp(p["text"], hidden)


def loss_of(fn):
    def loss(p, x):
        log_probabilities = jax.nn.log_softmax(fn(p, x))
        return -jnp.mean(log_probabilities[:, 0])

    return loss


TEXT = {"text__up": (5, 7), "text__down": (7, 5)}
# Function, its tree, its input, the paths that stay out.
CASES = {
    "a projector": (projector, tree_of(img__head__kernel=(5, 5), **TEXT), X, set()),
    "a projector with a product that no output needs": (
        projector_used_twice,
        tree_of(img__head__kernel=(5, 5), **TEXT),
        X,
        set(),
    ),
    "the head of a tower": (
        lambda p, x: mlp(p["text"], x) @ p["head"]["kernel"],
        tree_of(head__kernel=(5, 3), **TEXT),
        X,
        {"head/kernel"},
    ),
    "a one-hot look-up": (one_hot_lookup, tree_of(embed__w=(11, 5), **TEXT), IDS, {"embed/w"}),
    "a time embedding": (
        residual_time_embedding,
        tree_of(time_embedding__linear_1=(5, 3), time_embedding__linear_2=(3, 5), **TEXT),
        X,
        set(),
    ),
    "a head of two layers": (
        two_layer_head,
        tree_of(score__dense=(5, 3), score__out=(3, 2), **TEXT),
        X,
        {"score/dense", "score/out"},
    ),
    "a head whose first layer embeds": (
        head_whose_first_layer_embeds,
        tree_of(classifier__embed=(5, 3), classifier__out=(3, 2), **TEXT),
        X,
        {"classifier/embed", "classifier/out"},
    ),
    "heads of values and tokens": (
        heads_of_values_and_tokens,
        tree_of(lm_head__kernel=(5, 11), score__kernel=(5, 1), **TEXT),
        X,
        {"lm_head/kernel", "score/kernel"},
    ),
    "a value that conditions": (
        value_that_conditions,
        tree_of(score__kernel=(5, 1), **TEXT),
        X,
        {"score/kernel"},
    ),
    "a tied table": (tied, tree_of(embed__w=(11, 5), **TEXT), IDS, {"embed/w"}),
    "a head after a scan": (
        scanned,
        tree_of(head__kernel=(5, 3), text__up=(4, 5, 5)),
        X,
        {"head/kernel"},
    ),
    "branches": (branched, tree_of(head__a=(5, 5), head__b=(5, 5), **TEXT), X, set()),
}
CASES["a loss"] = (loss_of(CASES["the head of a tower"][0]), *CASES["the head of a tower"][1:])
CASES["under jit and remat"] = (
    jax.jit(jax.checkpoint(projector)),
    *CASES["a projector"][1:],
)


@pytest.mark.parametrize("name", CASES)
def test_the_trace_decides_where_names_mislead(name):
    fn, params, x, expected = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", lj.LeftOutWarning)  # a head that is one is no surprise
        adapted = adapted_paths(fn, params, x)
    paths = {path for path, _ in leaves_of(params)[0]}
    assert paths - adapted == expected
    reasons = lj.left_out(params, RULES, trace=(fn, params, x))
    assert reasons.keys() == expected


def test_reasons():
    params = tree_of(
        table=(11, 5), positions=(3, 5), embed__w=(11, 5), head__kernel=(5, 3), squared=(5, 5)
    ) | {"bias": draw(7, (2, 5)), "norm": {"scale": draw(8, (2, 5))}}

    def fn(p, ids):
        x = p["table"][ids] + p["positions"] + jax.nn.one_hot(ids, 11) @ p["embed"]["w"]
        x = (x @ p["squared"] ** 2) * p["norm"]["scale"][1] + p["bias"][0]
        return x @ p["head"]["kernel"]

    params["mixer"] = {"w": draw(6, (5, 5))}
    with_mixer = lambda p, ids: fn(p, ids) + (p["table"][ids] @ p["mixer"]["w"])[..., :3]  # noqa: E731
    with pytest.warns(lj.LeftOutWarning, match="would merge every use: squared"):
        tree = lj.lorafy(params, RULES, trace=(with_mixer, params, IDS))
    assert {path for path, leaf in leaves_of(tree)[0] if lj.is_node(leaf)} == {"mixer/w"}
    reasons = lj.left_out(params, RULES, trace=(with_mixer, params, IDS))
    kinds = {path: reason.split(":")[0] for path, reason in reasons.items()}
    assert kinds == {
        "table": "looked up",
        "positions": "added",
        "embed/w": "one-hot",
        "head/kernel": "head",
        "squared": "every use would merge",
    }
    assert "test_heads.py" in reasons["squared"]


def test_a_kernel_that_would_merge_is_adapted_by_name():
    params = {"w": draw(1, (5, 7)), "mask": draw(2, (5, 7)), "down": draw(3, (7, 5))}
    fn = lambda p, x: (x @ (p["w"] * p["mask"])) @ p["down"]  # noqa: E731
    with pytest.warns(lj.LeftOutWarning, match="mask, w"):
        assert adapted_paths(fn, params, X) == {"down"}
    named = [lj.LoraRule(targets=["w"], rank=2, init=numpy_init)]
    tree = lj.lorafy(params, named, trace=(fn, params, X))
    assert lj.is_node(tree["w"]) and not lj.is_node(tree["mask"])


def test_warnings_without_a_trace():
    shapes = {"kernel": draw(1, (5, 7))}
    params = {"up": shapes, "action_head": {"head": shapes}, "lm_head": shapes}
    with pytest.warns(lj.LeftOutWarning) as caught:
        lj.lorafy(params, RULES)
    (warning,) = caught
    expected = "left out as heads: action_head/head/kernel; name it in targets to adapt it"
    assert str(warning.message) == expected
    assert warning.filename == __file__
    excluded = [lj.LoraRule(targets="all-linear", exclude=["action_head"], init=numpy_init)]
    named = [lj.LoraRule(targets=["all-linear", "action_head"], init=numpy_init)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lj.lorafy(params, excluded)
        lj.lorafy(params, named)
        lj.lorafy({"up": shapes, "lm_head": shapes, "embed": {"embedding": draw(2, (9, 5))}}, RULES)


def test_arrays_whose_names_say_nothing_are_listed_by_pattern():
    layers = {
        str(i): {"gating_einsum": draw(i, (2, 5, 7)), "linear": draw(i, (7, 5))} for i in range(12)
    }
    others = {f"weight_{'abcdefghijkl'[i]}": draw(i, (5, 5)) for i in range(12)}
    params = {"layers": layers, "dense": {"kernel": draw(1, (5, 7)), "bias": draw(2, (3, 7))}}
    params["layer_scalar"] = draw(3, (12, 1))  # a number a layer
    with pytest.warns(lj.LeftOutWarning) as caught:
        lj.lorafy(params | others, RULES)
    (warning,) = caught
    lines = str(warning.message).splitlines()
    assert "pass trace=(fn, params, x), or name them in targets" in lines[0]
    assert "  layers/*/gating_einsum (12 arrays)" in lines
    assert len(lines) <= 10 and lines[-1].strip() == "and 6 more"
    assert "bias" not in str(warning.message) and "scalar" not in str(warning.message)


def test_saved_adapters_keep_their_weights(tmp_path):
    """An adapter that was saved for fewer kernels is restored for these alone."""
    fn, params, x, _ = CASES["a projector"]
    fewer = [lj.LoraRule(targets="all-linear", rank=2, exclude=["head"], init=numpy_init)]
    saved = lj.lorafy(params, fewer, trace=(fn, params, x))
    lj.save_adapter(tmp_path / "adapter", saved)
    loaded = lj.load_adapter(tmp_path / "adapter", params)
    assert lj.split(loaded)[0].keys() == lj.split(saved)[0].keys() == {"text/up", "text/down"}


def test_explain_lists_what_is_left_out(capsys):
    params = tree_of(embed__w=(11, 5), head__kernel=(5, 3), **TEXT)
    fn = lambda p, ids: one_hot_lookup(p, ids) @ p["head"]["kernel"]  # noqa: E731
    tree = lj.lorafy(params, RULES, trace=(fn, params, IDS))
    lj.explain(fn, tree, IDS)
    rows = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [row.split()[0] for row in rows] == ["embed/w", "head/kernel"]
    assert "one-hot" in rows[0] and "head: no other weight's product" in rows[1]


def test_a_long_trace_says_what_it_does(monkeypatch, capsys):
    fn, params, x, _ = CASES["a projector"]

    def slow(p, x):
        time.sleep(0.05)
        return fn(p, x)

    adapted_paths(slow, params, x)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(observed, "SECONDS_BEFORE_PROGRESS", 0.001)
    adapted_paths(slow, params, x)
    assert capsys.readouterr().err.startswith("lora_jax still traces your function")
