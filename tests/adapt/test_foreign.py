"""Layers and whole models of packages that others wrote: Equinox, Haiku, and models from PyPI.

They are in the extra 'foreign'; an import that fails is a failure. Checked on Python 3.11 with JAX
0.10. What is not here, and why:

- gemma (Google DeepMind's, Linen): release 4 needs Python 3.12, and the packages for reading data
  that it imports are many.
- jimmy-vision imports `flax.nnx.nnx`, which flax 0.12 does not have.
- nnx-lm requires flax 0.10.4, and dantinox a JAX before 0.10.
- flaxmodels' GPT-2 cannot be made with random weights.
"""

import jax
import jax.numpy as jnp
import pytest

from tests.adapt.foreign import ALL_LINEAR, judge, rule
from tests.support import draw

pytestmark = [pytest.mark.slow, pytest.mark.foreign]

X = draw(9, (13, 6))
IMAGE = draw(9, (2, 7, 5, 6))
IDS = jnp.array([3, 0, 9, 3])


def equinox_layers():
    import equinox as eqx

    def over_time(cell, x):
        def step(state, x):
            state = cell(x, state)
            return state, state[0]

        return jax.lax.scan(step, (jnp.zeros(7), jnp.zeros(7)), x)[1]

    key = jax.random.key(1)
    attention = eqx.nn.MultiheadAttention(3, 6, key=key)
    projections = {f"{name}_proj/weight" for name in ("query", "key", "value", "output")}
    table = eqx.nn.Embedding(11, 5, key=key)
    images = jnp.moveaxis(IMAGE, -1, 1)
    return {
        "Linear": (eqx.nn.Linear(6, 7, key=key), jax.vmap, X, ALL_LINEAR, {"weight"}),
        "Conv2d": (eqx.nn.Conv2d(6, 10, 3, key=key), jax.vmap, images, ALL_LINEAR, {"weight"}),
        "Conv2d, grouped": (
            eqx.nn.Conv2d(6, 10, (3, 2), groups=2, padding=1, key=key),
            jax.vmap,
            images,
            ALL_LINEAR,
            {"weight"},
        ),
        "MultiheadAttention": (
            attention,
            lambda layer: lambda x: layer(x, x, x),
            X,
            ALL_LINEAR,
            projections,
        ),
        "LSTMCell": (
            eqx.nn.LSTMCell(6, 7, key=key),
            lambda cell: lambda x: over_time(cell, x),
            X,
            ALL_LINEAR,
            {"weight_ih", "weight_hh"},
        ),
        "Embedding": (table, jax.vmap, IDS, rule(["weight"]), {"weight"}),
        "MLP": (
            eqx.nn.MLP(6, 7, 11, 2, key=key),
            jax.vmap,
            X,
            ALL_LINEAR,
            {f"layers/{i}/weight" for i in range(3)},
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["Linear", "Conv2d", "Conv2d, grouped", "MultiheadAttention", "LSTMCell", "Embedding", "MLP"],
)
def test_equinox(name):
    import equinox as eqx

    layer, run, x, rules, expected = equinox_layers()[name]
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def fn(params, x):
        return run(eqx.combine(params, static))(x)

    assert judge(fn, params, x, rules=rules) == expected


def haiku_layers():
    import haiku as hk

    def attention(x):
        return hk.MultiHeadAttention(3, 5, w_init=hk.initializers.VarianceScaling(), model_size=7)(
            x, x, x
        )

    def lstm(x):
        core = hk.LSTM(7)
        return hk.dynamic_unroll(core, x, core.initial_state(None))[0]

    heads = {f"multi_head_attention/{name}/w" for name in ("query", "key", "value", "linear")}
    return {
        "Linear": (lambda x: hk.Linear(7)(x), X, ALL_LINEAR, {"linear/w"}),
        "Conv2D": (lambda x: hk.Conv2D(10, (3, 2))(x), IMAGE, ALL_LINEAR, {"conv2_d/w"}),
        "Conv2D, grouped": (
            lambda x: hk.Conv2D(10, 3, feature_group_count=2, data_format="NHWC")(x),
            IMAGE,
            ALL_LINEAR,
            {"conv2_d/w"},
        ),
        "MultiHeadAttention": (attention, X, ALL_LINEAR, heads),
        "LSTM": (lstm, X, ALL_LINEAR, {"lstm/linear/w"}),
        "Embed": (
            lambda ids: hk.Embed(11, 5)(ids),
            IDS,
            rule(["embeddings"]),
            {"embed/embeddings"},
        ),
        "Embed, one-hot": (
            lambda ids: hk.Embed(11, 5, lookup_style="ONE_HOT")(ids),
            IDS,
            rule(["embeddings"]),
            {"embed/embeddings"},
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "Linear",
        "Conv2D",
        "Conv2D, grouped",
        "MultiHeadAttention",
        "LSTM",
        "Embed",
        "Embed, one-hot",
    ],
)
def test_haiku(name):
    import haiku as hk

    run, x, rules, expected = haiku_layers()[name]
    module = hk.without_apply_rng(hk.transform(run))
    params = module.init(jax.random.key(1), x)
    paths = judge(module.apply, params, x, rules=rules)
    assert {path.replace("/~/", "/") for path in paths} == expected


def test_a_language_model_in_linen():
    """NanoMoE (nano-moe-jax): embeddings, attention, experts with a top-k router, a head."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=37, n_layers=2, n_heads=2, d_model=14, d_ff=22, n_experts=3, block_size=13
    )
    model = NanoMoE(config)
    ids = jax.random.randint(jax.random.key(0), (2, 11), 0, 37)
    with jax.numpy_dtype_promotion("standard"):
        params = model.init(jax.random.key(1), ids)["params"]
    every = rule(r".*(kernel|embedding)")  # the look-up table and the head too
    paths = judge(lambda p, ids: model.apply({"params": p}, ids), params, ids, rules=every)
    assert {"Embed_0/embedding", "Dense_0/kernel"} <= paths
    for block in range(2):
        experts = {
            f"block_{block}/MoELayer_0/expert_{e}/Dense_{d}/kernel"
            for e in range(3)
            for d in (0, 1)
        }
        assert experts <= paths


@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
def test_a_vision_transformer_in_nnx():
    """jaxnn's: a convolution into patches, two blocks of attention and MLP, a head."""
    from flax import nnx
    from jax.experimental import checkify
    from jaxnn.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=3,
        num_classes=5,
        rngs=nnx.Rngs(1),
    )
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):  # the model checks its input by checkify
        run = checkify.checkify(
            lambda params, rest, x: nnx.merge(graphdef, params, rest)(x, deterministic=True)
        )
        return run(params, rest, x)[1]

    paths = judge(fn, params, rest, draw(9, (2, 8, 8, 3)), rules=rule(r".*kernel"))
    assert {path for path in paths if "blocks" not in path} == {
        "head/kernel",
        "patch_embed/proj/kernel",
    }
    assert len([path for path in paths if "blocks" in path]) == 2 * 4
