"""Flax's own layers, Linen and NNX, adapted under strict=True with axis roles from `trace`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.foreign.case import rule
from tests.foreign.judge import judge
from tests.support import array, draw, numpy_init, over, variables_of

ALL_LINEAR = rule("all-linear", init=numpy_init)
TABLE = rule(["embedding"], init=numpy_init)

X = draw(9, (2, 13, 6))
IMAGE = draw(9, (2, 7, 5, 6))
IDS = array([[3, 0, 9], [10, 3, 1]])


class Attend(nn.Module):
    """A table that is looked up, and multiplied back."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 5)
        return embed.attend(jnp.tanh(embed(ids)))


class ScannedLSTM(nn.Module):
    """An LSTM cell under nn.scan."""

    @nn.compact
    def __call__(self, x):
        cell = nn.scan(
            nn.LSTMCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1
        )(7)
        return cell(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x)[1]


ATTENTION = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
GATES = {f"{kind}{gate}/kernel" for kind in "ih" for gate in "ifgo"}


LINEN = {  # (module, input, rules, what they adapt)
    "Dense": (nn.Dense(7), X, ALL_LINEAR, {"kernel"}),
    "DenseGeneral": (nn.DenseGeneral((3, 5), axis=(-2, -1)), X, ALL_LINEAR, {"kernel"}),
    "Einsum": (nn.Einsum((6, 3, 5), "bsd,dhk->bshk"), X, ALL_LINEAR, {"kernel"}),
    "attention": (nn.MultiHeadDotProductAttention(3, qkv_features=15), X, ALL_LINEAR, ATTENTION),
    "attention with norms": (
        nn.MultiHeadDotProductAttention(3, qkv_features=15, normalize_qk=True, use_bias=False),
        X,
        ALL_LINEAR,
        ATTENTION,
    ),
    "Conv": (nn.Conv(10, (3, 2)), IMAGE, ALL_LINEAR, {"kernel"}),
    "Conv, strided": (
        nn.Conv(10, (3, 3), strides=2, padding="VALID"),
        IMAGE,
        ALL_LINEAR,
        {"kernel"},
    ),
    "Conv, grouped": (nn.Conv(10, (3, 2), feature_group_count=2), IMAGE, ALL_LINEAR, {"kernel"}),
    "Conv, depthwise": (nn.Conv(12, (3, 2), feature_group_count=6), IMAGE, ALL_LINEAR, {"kernel"}),
    "Conv, causal": (
        nn.Conv(10, 3, padding="CAUSAL", kernel_dilation=2),
        X,
        ALL_LINEAR,
        {"kernel"},
    ),
    "ConvTranspose": (nn.ConvTranspose(10, (3, 2), strides=(2, 1)), IMAGE, ALL_LINEAR, {"kernel"}),
    "Embed": (nn.Embed(11, 5), IDS, TABLE, {"embedding"}),
    "Embed, attend": (Attend(), IDS, TABLE, {"Embed_0/embedding"}),
    "RNN of OptimizedLSTMCell": (
        nn.RNN(nn.OptimizedLSTMCell(7)),
        X,
        ALL_LINEAR,
        {f"cell/{p}" for p in GATES},
    ),
    "RNN of LSTMCell": (nn.RNN(nn.LSTMCell(7)), X, ALL_LINEAR, {f"cell/{p}" for p in GATES}),
    "scanned LSTM": (ScannedLSTM(), X, ALL_LINEAR, {f"ScanLSTMCell_0/{p}" for p in GATES}),
    "RNN of GRUCell": (
        nn.RNN(nn.GRUCell(7), reverse=True, keep_order=True),
        X,
        ALL_LINEAR,
        {f"cell/{kind}{gate}/kernel" for kind in "ih" for gate in "rzn"},
    ),
    "RNN of ConvLSTMCell": (
        nn.RNN(nn.ConvLSTMCell(5, (3, 3))),
        draw(9, (2, 3, 7, 5, 6)),
        ALL_LINEAR,
        {"cell/ih/kernel", "cell/hh/kernel"},
    ),
}


@over("name", LINEN, often=["DenseGeneral", "Conv, grouped", "Embed, attend"])
def test_linen(name):
    module, x, rules, expected = LINEN[name]
    params = variables_of(module, x)["params"]
    paths = judge(lambda p, x: module.apply({"params": p}, x), params, x, rules=rules)
    assert paths == expected


def scan_by_hand(cell, x):
    """An NNX cell over time."""
    carry = cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
    outputs = []
    for t in range(x.shape[1]):
        carry, y = cell(carry, x[:, t])
        outputs.append(y)
    return jnp.stack(outputs)


def attend(embed, ids):
    return embed.attend(jnp.tanh(embed(ids)))


def with_carry(rnn, x):
    """An RNN that draws nothing: NNX allows no draw under jax.grad from a state outside of it."""
    return rnn(x, initial_carry=rnn.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0)))


def call(module, x):
    return module(x)


def rngs():
    return nnx.Rngs(1)


NNX = {  # (make, run, input, rules, what they adapt)
    "Linear": (lambda: nnx.Linear(6, 7, rngs=rngs()), call, X, ALL_LINEAR, {"kernel"}),
    "LinearGeneral": (
        lambda: nnx.LinearGeneral((13, 6), (3, 5), axis=(-2, -1), rngs=rngs()),
        call,
        X,
        ALL_LINEAR,
        {"kernel"},
    ),
    "Einsum": (
        lambda: nnx.Einsum("bsd,dhk->bshk", (6, 3, 5), (3, 5), rngs=rngs()),
        call,
        X,
        ALL_LINEAR,
        {"kernel"},
    ),
    "Conv": (lambda: nnx.Conv(6, 10, (3, 2), rngs=rngs()), call, IMAGE, ALL_LINEAR, {"kernel"}),
    "Conv, grouped": (
        lambda: nnx.Conv(6, 10, (3, 2), feature_group_count=2, rngs=rngs()),
        call,
        IMAGE,
        ALL_LINEAR,
        {"kernel"},
    ),
    "Embed": (lambda: nnx.Embed(11, 5, rngs=rngs()), call, IDS, TABLE, {"embedding"}),
    "Embed, attend": (lambda: nnx.Embed(11, 5, rngs=rngs()), attend, IDS, TABLE, {"embedding"}),
    "MultiHeadAttention": (
        lambda: nnx.MultiHeadAttention(3, 6, qkv_features=15, decode=False, rngs=rngs()),
        call,
        X,
        ALL_LINEAR,
        ATTENTION,
    ),
    "LSTMCell": (
        lambda: nnx.LSTMCell(6, 7, rngs=rngs()),
        scan_by_hand,
        array(np.asarray(X)[:, :2]),
        ALL_LINEAR,
        {path.replace("if/", "if_/") for path in GATES},
    ),
    "RNN of OptimizedLSTMCell": (
        lambda: nnx.RNN(nnx.OptimizedLSTMCell(6, 7, rngs=rngs()), rngs=rngs()),
        with_carry,
        X,
        ALL_LINEAR,
        {"cell/dense_i/kernel", "cell/dense_h/kernel"},
    ),
}


@over("name", NNX, often=["Conv, grouped"])
def test_nnx(name):
    make, run, x, rules, expected = NNX[name]
    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)

    def fn(params, rest, x):
        return run(nnx.merge(graphdef, params, rest), x)

    assert judge(fn, params, rest, x, rules=rules) == expected
