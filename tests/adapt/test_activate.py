"""Adapters that some tokens alone see: masks, products, gradients, meshes and refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import bank, models, peft
from lora_jax.adapt.uses import uses
from lora_jax.bank import Bank, BankError
from lora_jax.bank.together.tenants import StackKind, Tenant
from lora_jax.models.layers import trunk
from lora_jax.training import make_mesh
from lora_jax.training.layout import Layout
from tests.models import tiny
from tests.support import (
    assert_close,
    assert_identical,
    dots_of_size,
    lorafied,
    with_random_factors,
)

BATCH, SEQ, IN, OUT, LAYERS = 4, 7, 11, 13, 3
INVOCATION = (5, 6)


def reference_mask(ids, invocation, segments=None):
    """The tokens from the last occurrence on, token by token."""
    mask = np.zeros(np.shape(ids), bool)
    for row, tokens in enumerate(np.asarray(ids)):
        parts = np.zeros(len(tokens), int) if segments is None else np.asarray(segments)[row]
        for part in dict.fromkeys(parts.tolist()):
            (places,) = np.nonzero(parts == part)
            first, behind = places[0], places[-1] + 1
            n = len(invocation)
            starts = [
                i
                for i in range(first, behind - n + 1)
                if tokens[i : i + n].tolist() == list(invocation)
            ]
            if starts:
                mask[row, starts[-1] : behind] = True
    return mask


@pytest.mark.parametrize("invocation", [(1,), (1, 2), (1, 1), (2, 1, 2)], ids=str)
def test_masks(invocation):
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 3, (60, 12))
    segments = np.sort(rng.integers(0, 4, (60, 12)), axis=1)
    want = reference_mask(ids, invocation)
    np.testing.assert_array_equal(lj.invoked(ids, invocation), want)
    assert 0 < want.mean() < 1
    packed = reference_mask(ids, invocation, segments)
    np.testing.assert_array_equal(lj.invoked(ids, invocation, segments), packed)
    assert (packed != want).any()
    for wrong in ((ids[0], invocation), (ids, ())):
        with pytest.raises(ValueError, match="at least one token"):
            lj.invoked(*wrong)


def stack(params, x):
    """A scanned and rematerialised stack of two products a layer, over [batch, seq, …]."""

    @jax.checkpoint
    def layer(x, kernels):
        up, down = kernels
        return x + jnp.tanh(x @ up) @ down, None

    return lax.scan(layer, x, (params["up"]["kernel"], params["down"]["kernel"]))[0]


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.standard_normal(shape) / np.sqrt(shape[-2]))  # noqa: E731
    params = {"up": {"kernel": draw(LAYERS, IN, OUT)}, "down": {"kernel": draw(LAYERS, OUT, IN)}}
    rule = lj.LoraRule(targets=["up", "down"], rank=2, alpha=3)
    mask = rng.random((BATCH, SEQ)) < 0.5
    return params, with_random_factors(lorafied(params, [rule])), draw(BATCH, SEQ, IN), mask


def chosen(params, tree, x, mask):
    """Computes the reference: both products of each layer, from which the mask picks per token."""
    merged = lj.merge(tree)
    for layer in range(LAYERS):

        def product(x, name, layer=layer):
            ways = [each[name]["kernel"][layer] for each in (merged, params)]
            return jnp.where(mask[..., None], x @ ways[0], x @ ways[1])

        x = x + product(jnp.tanh(product(x, "up")), "down")
    return x


def test_tokens_with_and_without(float64):
    """Values and gradients are those of a choice by hand; W itself has none."""
    wide = lambda v: np.asarray(v, np.float64 if v.dtype == np.float32 else v.dtype)  # noqa: E731
    params, tree, x, mask = jax.tree.map(wide, inputs())
    adapter, base = lj.split(tree)
    forward = lj.adapt(stack, strict=True)

    def ours(adapter, x):
        return forward(lj.activate(lj.join(adapter, base), mask), x)

    def by_hand(adapter, x):
        return chosen(params, lj.join(adapter, base), x, mask)

    def judged(run):
        loss = lambda *args: jnp.sum(jnp.sin(run(*args)))  # noqa: E731
        return jax.jit(lambda *args: (run(*args), jax.grad(loss, (0, 1))(*args)))

    got, want = judged(ours)(adapter, x), judged(by_hand)(adapter, x)
    assert_close(got, want, 1e-9)
    assert np.abs(want[0] - stack(params, x)).max() > 1e-2
    flat = jax.jit(lambda t, x: forward(t, x.reshape(-1, IN)))(lj.activate(tree, mask), x)
    assert_close(flat, np.asarray(got[0]).reshape(-1, IN), 1e-9)


def test_tokens_without_are_the_base_bit_by_bit():
    params, tree, x, mask = inputs()
    forward = jax.jit(lj.adapt(stack, strict=True))
    base = jax.jit(stack)(params, x)
    assert_identical(forward(lj.activate(tree, jnp.zeros_like(mask)), x), base)
    every = forward(lj.activate(tree, jnp.ones_like(mask)), x)
    assert_identical(every, forward(tree, x))
    assert np.abs(every - base).max() > 1e-2


@pytest.mark.slow
def test_no_frozen_gradient():
    params, tree, x, mask = inputs()
    adapter, base = lj.split(tree)

    def kernels(run):
        loss = lambda adapter, x: jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))  # noqa: E731
        hlo = jax.jit(jax.grad(loss)).lower(adapter, x).compile().as_text()
        return dots_of_size(hlo, (IN, OUT))

    forward = lj.adapt(stack, strict=True)
    assert kernels(lambda tree, x: forward(lj.activate(tree, mask), x)) == []
    assert kernels(lambda tree, x: chosen(params, tree, x, mask)), "the judge must see merging"


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(axes):
    params, tree, x, mask = inputs()
    forward = lj.adapt(stack, strict=True)
    want = jax.jit(forward)(lj.activate(tree, mask), x)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
        tree, x, mask = jax.tree.map(put, tree), put(x, "data"), put(mask, "data")
        got = jax.jit(lambda tree, x, mask: forward(lj.activate(tree, mask), x))(tree, x, mask)
        assert got.sharding.spec[0] == "data"
    assert_close(got, want, 1e-5)


def invoked_tree(**fields):
    params, _, x, _ = inputs()
    rule = lj.LoraRule(targets=["up", "down"], rank=2, invocation=INVOCATION, **fields)
    return with_random_factors(lorafied(params, [rule])), x


def test_a_call_without_a_mask_is_refused():
    tree, x = invoked_tree()
    with pytest.raises(lj.TokensError, match=r"lora_jax\.activate\(tree, mask\)"):
        lj.adapt(stack)(tree, x)
    with pytest.raises(lj.TokensError, match=r"mask \[2, 7\], but is multiplied by rows \[4, 7\]"):
        lj.adapt(stack)(lj.activate(tree, np.ones((2, SEQ))), x)
    with pytest.raises(ValueError, match=r"must have the shape \[batch, seq\]"):
        lj.activate(tree, np.ones(SEQ))
    with pytest.raises(ValueError, match="no adapted weight"):
        lj.activate(lj.strip(tree), np.ones((BATCH, SEQ)))


def test_a_recomputed_model_keeps_long_rows_whole(monkeypatch):
    monkeypatch.setattr(trunk, "CHUNK", SEQ // 2)
    model, _, tree = language_model()
    ids = np.array([[9, 5, 6, 3, 5, 6]])

    def shape(model):
        return jax.eval_shape(lj.adapt(model.apply, strict=True), {"params": tree}, ids).shape

    recomputed = model.clone(remat=True)
    with pytest.raises(lj.TokensError, match="rows .1, 3..* remat='products'"):
        shape(recomputed)
    layout = Layout(make_mesh(jax.devices()[:1]), (), keeps_rows=True)
    assert shape(layout.constrained(recomputed)) == shape(model.clone(remat="products"))


@pytest.mark.parametrize(
    ("case", "how"), [("qwen3 moe", {}), ("llama3", {"attention": "blockwise"})]
)
def test_models_put_tokens_back_in_their_order(case, how):
    """Experts take tokens sorted, and attention takes them in blocks: products after that run."""
    model = models.Decoder(tiny.config(case), **how)
    ids = np.zeros((2, 130), np.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
    rule = lj.LoraRule(targets="all-linear", rank=2, invocation=INVOCATION, exclude=["experts"])
    tree = lj.lorafy(params, [rule])
    logits = jax.eval_shape(lj.adapt(model.apply, strict=True), {"params": tree}, ids)
    assert logits.shape[:2] == ids.shape


def test_never_merged(tmp_path):
    tree, _ = invoked_tree()
    with pytest.raises(
        ValueError, match=r"activated LoRA, which acts only from its invocation \[5, 6"
    ):
        lj.merge(tree)
    with pytest.raises(lj.MergeError, match="a merged weight acts on all"):
        lj.adapt(lambda p: p["up"]["kernel"].T)(tree)
    with pytest.raises(lj.TokensError, match="'sort' at .* does not show which tokens"):
        lj.adapt(lambda p: jnp.sort(p["up"]["kernel"]))(tree)
    with pytest.raises(ValueError, match="combine: trees.0. is an activated LoRA"):
        bank.combine([tree], [1.0])
    with pytest.raises(BankError, match="'mine' is an activated LoRA"):
        slots = Bank(lj.strip(tree), [lj.LoraRule(targets=["up", "down"], rank=2)], slots=2)
        slots.add("mine", tree)
    with pytest.raises(ValueError, match="cannot train side by side"):
        StackKind.from_tenant(Tenant(params=tree, schedule=lambda step: 1e-3, steps=1))


@pytest.mark.parametrize(
    "use",
    [
        lambda p, x: p["up"]["kernel"][0][jnp.array([1, 2])],
        lambda p, x: lax.ragged_dot(x[0], p["up"]["kernel"], jnp.array([3, 2, 2])),
        lambda p, x: p["up"]["kernel"][0] @ p["down"]["kernel"][0],
    ],
    ids=["a look-up", "experts", "two weights"],
)
def test_uses_that_do_not_tell_their_tokens(use):
    _, tree, x, mask = inputs()
    with pytest.raises((lj.TokensError, lj.MergeError), match=r"some tokens only|all tokens"):
        lj.adapt(use)(lj.activate(tree, mask), x)


def test_rules():
    for fields, message in [
        ({"invocation": []}, "at least one token id"),
        ({"invocation": [-1]}, "must be at least one token id"),
        ({"invocation": [1], "dora": True}, "Remove dora"),
        ({"invocation": [1], "train_bias": True}, "Remove train_bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            lj.LoraRule(targets=["up"], **fields)
    with pytest.raises(TypeError, match="Write invocation="):
        lj.LoraRule(targets=["up"], alora_invocation_tokens=[1])
    table = {"words": {"embedding": np.ones((5, 3))}}
    with pytest.raises(ValueError, match="is an embedding table"):
        lj.lorafy(table, [lj.LoraRule(targets=["words"], rank=2, invocation=[1])])


def test_files(tmp_path):
    tree, _ = invoked_tree(dropout=0.1)
    lj.save_adapter(tmp_path / "adapter", lj.activate(tree, np.ones((1, 2))))
    loaded = lj.load_adapter(tmp_path / "adapter", lj.strip(tree))
    assert_identical(loaded, tree)
    assert loaded["up"]["kernel"].invocation == INVOCATION


@pytest.mark.parametrize(("given", "written"), [(None, "CAUSAL_LM"), ("SEQ_CLS", "SEQ_CLS")])
def test_a_folder_of_peft_says_what_peft_activates(tmp_path, given, written):
    """PEFT runs an activated LoRA of another task, or of none, without its adapter."""
    model, _, tree = language_model()
    peft.save(tmp_path / "peft", model, tree, task_type=given)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == list(INVOCATION)
    assert config["task_type"] == written


@functools.cache
def language_model():
    model, params = tiny.decoder("llama3")
    rule = lj.LoraRule(targets="all-linear", rank=2, alpha=3, invocation=INVOCATION)
    return model, params, with_random_factors(lorafied(params, [rule]))


@pytest.mark.slow
def test_a_model_finds_its_invocation():
    """Packed in one row, each segment has what it has alone; the tokens before are the base's."""
    model, params, tree = language_model()
    forward = jax.jit(lj.adapt(model.apply, strict=True))
    first, second = [9, 5, 6, 3, 5, 6, 8], [4, 4, 5, 6]
    ids = np.array([first + second])
    segments = np.array([[1] * len(first) + [2] * len(second)])
    packed = forward({"params": tree}, ids, segment_ids=segments)[0]
    base = jax.jit(model.apply)({"params": params}, ids, segment_ids=segments)[0]
    alone = [forward({"params": tree}, np.array([each]))[0] for each in (first, second)]
    assert_close(packed, np.concatenate(alone), 1e-5)
    changed = np.abs(packed - base).max(axis=-1) > 1e-3
    assert changed.tolist() == [*[False] * 4, *[True] * 3, *[False] * 2, *[True] * 2]
    assert_identical(packed[:4], base[:4])
    assert {use.how for use in uses(model.apply, {"params": tree}, ids)} == {"factored"}


def test_a_cache_is_refused():
    model, _, tree = language_model()
    cache, ids = models.init_cache(model.config, 1, 8), np.array([[9, 5, 6, 3]])
    with pytest.raises(lj.TokensError, match="without a cache"):
        jax.eval_shape(lj.adapt(model.apply, strict=True), {"params": tree}, ids, cache=cache)
