"""Each primitive that can meet a weight: values, gradients and HLO against the merged form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.support import Program, array, assert_close, dots_of_size, draw, numpy_init, over

# Some use a kernel only mirrored, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")

IDS = array([[3, 0, 9], [10, 3, 1]])
SIZES = array([4, 0, 9], np.int32)


def rule(targets=("a",), **settings):
    how = {"targets": list(targets), "rank": 2, "alpha": 3.0, "init": numpy_init}
    return lj.LoraRule(**how | settings)


def one(name, shape, use, x, **settings):
    """A program with one kernel."""
    return Program(
        name,
        lambda t: {"a": {"kernel": draw(1, shape, t)}},
        (rule(**settings),),
        lambda p, x: use(p["a"]["kernel"], x),
        x,
    )


def two(name, shape_a, shape_b, use, x, **settings):
    """A program with two kernels."""
    return Program(
        name,
        lambda t: {"a": {"kernel": draw(1, shape_a, t)}, "b": {"kernel": draw(2, shape_b, t)}},
        (rule(["a", "b"], **settings),),
        lambda p, x: use(p["a"]["kernel"], p["b"]["kernel"], x),
        x,
    )


def conv(w, x, layout=("NHWC", "HWIO", "NHWC"), **how):
    return lax.conv_general_dilated(
        x, w, how.pop("strides", (1, 1)), "SAME", dimension_numbers=layout, **how
    )


def lstm(p, x):
    kernel = jnp.concatenate([p["a"]["kernel"], p["plain"]["kernel"], p["b"]["kernel"]], axis=-1)

    def step(h, x):
        i, f, g = jnp.split(x @ kernel + jnp.tile(h, 3), 3, axis=-1)
        h = jax.nn.sigmoid(f) * h + jax.nn.sigmoid(i) * jnp.tanh(g)
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], 7), x.dtype), x)[1]


def mesh_of_four():
    return jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))


def tensor_parallel(w, x):
    def body(x, w):
        return lax.psum(x @ w, "m")

    specs = (P(None, "m"), P("m", None))
    return jax.shard_map(body, mesh=mesh_of_four(), in_specs=specs, out_specs=P())(x, w)


def gathered_weight(w, x):
    def body(x, w):
        return x @ lax.all_gather(w, "m", axis=0, tiled=True)

    specs = (P("m"), P("m", None))
    return jax.shard_map(body, mesh=mesh_of_four(), in_specs=specs, out_specs=P("m"))(x, w)


CASES = [
    one("dot, weight last", (5, 7), lambda w, x: x @ w, (2, 13, 5)),
    one("dot, weight first", (5, 7), lambda w, x: w.T @ x, (5, 13)),
    one("dot, mirror image", (5, 7), lambda w, x: x @ w.T, (2, 13, 7)),
    one("dot, vector", (5, 7), lambda w, x: x @ w, (5,)),
    one("dot, batch free", (3, 5, 7), lambda w, x: jnp.einsum("bi,eio->ebo", x, w), (13, 5)),
    one(
        "dot, batch free, in the middle",
        (5, 3, 7),
        lambda w, x: jnp.einsum("bi,ieo->beo", x, w),
        (13, 5),
        in_axes=[0],
        out_axes=[2],
    ),
    one("dot, batched", (3, 5, 7), lambda w, x: jnp.einsum("bei,eio->beo", x, w), (13, 3, 5)),
    one(
        "dot, out axes before in axes",
        (7, 11, 5),
        lambda w, x: jnp.einsum("bsi,hoi->bsho", x, w),
        (2, 13, 5),
        in_axes=[2],
        out_axes=[0, 1],
    ),
    one(
        "dot, two in axes apart",
        (3, 7, 5),
        lambda w, x: jnp.einsum("bhk,hdk->bd", x, w),
        (13, 3, 5),
        in_axes=[0, 2],
        out_axes=[1],
    ),
    one("a stack, walked", (3, 5, 5), lambda w, x: functools.reduce(jnp.dot, w, x), (13, 5)),
    one(
        "a stack of heads, walked",
        (5, 3, 7),
        lambda w, x: jnp.stack([x @ head for head in jnp.unstack(w, axis=1)]),
        (13, 5),
        in_axes=[0],
        out_axes=[2],
    ),
    one("matmul with a broadcast stack", (5, 7), lambda w, x: x @ w[None], (3, 13, 5)),
    one("ragged dot", (3, 5, 7), lambda w, x: lax.ragged_dot(x, w, SIZES), (13, 5)),
    one(
        "ragged dot, mirror image",
        (3, 5, 7),
        lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES),
        (13, 7),
    ),
    one("conv", (3, 2, 5, 7), conv, (2, 11, 13, 5), in_axes=[0, 1, 2], out_axes=[3]),
    one(
        "conv, strided and dilated",
        (3, 2, 5, 7),
        lambda w, x: conv(w, x, strides=(2, 1), rhs_dilation=(1, 2)),
        (2, 11, 13, 5),
        in_axes=[0, 1, 2],
        out_axes=[3],
    ),
    one(
        "conv, another layout",
        (7, 5, 3, 2),
        lambda w, x: conv(w, x, ("NCHW", "OIHW", "NCHW")),
        (2, 5, 11, 13),
        in_axes=[1, 2, 3],
        out_axes=[0],
    ),
    one(
        "conv, grouped",
        (3, 2, 5, 14),
        lambda w, x: conv(w, x, feature_group_count=2),
        (2, 11, 13, 10),
        in_axes=[0, 1, 2],
        out_axes=[3],
    ),
    one(
        "conv, one axis of space",
        (3, 5, 7),
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (2, 13, 5),
        in_axes=[0, 1],
        out_axes=[2],
    ),
    Program(
        "look-up",
        lambda t: {"a": {"embedding": draw(1, (11, 5), t)}},
        (rule(),),
        lambda p, x: p["a"]["embedding"][IDS] * x,
        (5,),
    ),
    Program(
        "look-up by take, and multiplied back",
        lambda t: {"a": {"embedding": draw(1, (11, 5), t)}},
        (rule(),),
        lambda p, x: (jnp.take(p["a"]["embedding"], IDS, axis=0) * x) @ p["a"]["embedding"].T,
        (5,),
    ),
    Program(
        "look-up of one row under vmap",
        lambda t: {"a": {"embedding": draw(1, (11, 5), t)}},
        (rule(),),
        lambda p, x: jax.vmap(lambda i: p["a"]["embedding"][i] * x)(IDS[0]),
        (5,),
    ),
    Program(
        "look-up in each table of a stack",
        lambda t: {"a": {"embedding": draw(1, (3, 11, 5), t)}},
        (rule(in_axes=[1], out_axes=[2]),),
        lambda p, x: jax.vmap(lambda w, i: w[i])(p["a"]["embedding"], IDS[:, :3].T) * x,
        (5,),
    ),
    Program(
        "look-up of one row in each table of two stacks, stacked last and in between",
        lambda t: {"a": {"embedding": draw(1, (11, 2, 5, 3), t)}},
        (rule(in_axes=[0], out_axes=[2]),),
        lambda p, x: jax.vmap(jax.vmap(lambda w, i: w[i] * x, (1, 0)), (3, 1), 1)(
            p["a"]["embedding"], jnp.array([[4, 0, 3], [10, 4, 4]])
        ),
        (5,),
    ),
    Program(
        "look-up of one row, and of one known row",
        lambda t: {"a": {"embedding": draw(1, (11, 5), t)}},
        (rule(),),
        lambda p, x: jnp.sin(p["a"]["embedding"][IDS[0, 0]] * x) + p["a"]["embedding"][4],
        (5,),
    ),
    one(
        "experts by index under vmap",
        (3, 5, 7),
        lambda w, x: jax.vmap(lambda i, x: x @ w[i])(jnp.array([2, 0, 0, 1]), x),
        (4, 5),
    ),
    one(
        "experts by index under vmap, stack last",
        (5, 7, 3),
        lambda w, x: jax.vmap(lambda i, x: x @ w[..., i])(jnp.array([2, 0, 0, 1]), x),
        (4, 5),
        in_axes=[0],
        out_axes=[1],
    ),
    Program(
        "look-up, filled with a number outside",
        lambda t: {"a": {"embedding": draw(1, (11, 5), t)}},
        (rule(),),
        lambda p, x: p["a"]["embedding"].at[IDS + 5].get(mode="fill", fill_value=0.5) * x,
        (5,),
    ),
    one(
        "experts by index",
        (3, 5, 7),
        lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.array([2, 0, 0, 1])]),
        (4, 5),
    ),
    one("slice of a stack", (3, 5, 7), lambda w, x: x @ w[1], (13, 5)),
    one(
        "dynamic slice of a stack",
        (3, 5, 7),
        lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.int32(2), keepdims=False),
        (13, 5),
    ),
    one("slice along out", (5, 21), lambda w, x: x @ w[:, 3:14], (13, 5)),
    one("slice along in", (15, 7), lambda w, x: x @ w[2:13:2], (13, 6)),
    one("split along out", (5, 21), lambda w, x: sum(x @ v for v in jnp.split(w, 3, 1)), (13, 5)),
    one("split along batch", (3, 5, 7), lambda w, x: x @ jnp.split(w, 3)[1][0], (13, 5)),
    two(
        "concatenate along out",
        (5, 7),
        (5, 11),
        lambda a, b, x: x @ jnp.concatenate([a, b], 1),
        (13, 5),
    ),
    two(
        "concatenate along in", (5, 7), (3, 7), lambda a, b, x: x @ jnp.concatenate([a, b]), (13, 8)
    ),
    two(
        "concatenate along batch",
        (2, 5, 7),
        (1, 5, 7),
        lambda a, b, x: jnp.einsum("bi,eio->beo", x, jnp.concatenate([a, b])),
        (13, 5),
    ),
    two(
        "stack",
        (5, 7),
        (5, 7),
        lambda a, b, x: jnp.einsum("bi,ieo->beo", x, jnp.stack([a, b], 1)),
        (13, 5),
    ),
    two(
        "concatenate one with another transposed",
        (5, 7),
        (11, 5),
        lambda a, b, x: x @ jnp.concatenate([a, b.T], 1),
        (13, 5),
    ),
    two("sum with a transposed weight", (5, 7), (7, 5), lambda a, b, x: x @ (a + b.T), (13, 5)),
    one("a single input", (1, 7), lambda w, x: x @ w, (13, 1)),
    one("a single input and output", (1, 1), lambda w, x: jnp.sin(x @ w) @ w.T, (13, 1)),
    one("a single output, mirror image", (5, 1), lambda w, x: x @ w.T, (13, 1)),
    one(
        "conv of a single input",
        (1, 1, 1, 7),
        conv,
        (2, 11, 13, 1),
        in_axes=[0, 1, 2],
        out_axes=[3],
    ),
    one("reversed", (5, 7), lambda w, x: x @ w[::-1, ::-1], (13, 5)),
    one(
        "padded",
        (3, 5, 7),
        lambda w, x: jnp.einsum("bi,eio->beo", x, jnp.pad(w, ((1, 0), (2, 4), (0, 1)))),
        (13, 11),
    ),
    two("sum of two weights", (5, 7), (5, 7), lambda a, b, x: x @ (a - 0.5 * b), (13, 5)),
    Program(
        "LSTM with joined kernels",
        lambda t: {n: {"kernel": draw(i, (5, 7), t)} for i, n in enumerate(("a", "b", "plain"))},
        (rule(["a", "b"]),),
        lstm,
        (3, 2, 5),
    ),
    one("scaled by a number", (5, 7), lambda w, x: x @ (w * 0.5 / 3.0), (13, 5)),
    one("scaled by an out vector", (5, 7), lambda w, x: x @ (-w * jnp.arange(1.0, 8.0)), (13, 5)),
    one(
        "scaled by an in vector",
        (5, 7),
        lambda w, x: x @ (jnp.arange(1.0, 6.0)[:, None] * w),
        (13, 5),
    ),
    one(
        "scaled along batch and out",
        (3, 5, 7),
        lambda w, x: jnp.einsum("bi,eio->beo", x, w * jnp.arange(1.0, 22.0).reshape(3, 1, 7)),
        (13, 5),
    ),
    one("shifted", (5, 7), lambda w, x: x @ (w + 0.25), (13, 5)),
    one("transposed and back", (3, 5, 7), lambda w, x: x @ w.transpose(2, 0, 1)[:, 1].T, (13, 5)),
    one(
        "reshaped", (5, 21), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(5, 3, 7)), (13, 5)
    ),
    one("barrier", (5, 7), lambda w, x: x @ lax.optimization_barrier(w), (13, 5)),
    one("vmap over a stack", (3, 5, 7), lambda w, x: jax.vmap(lambda w: x @ w)(w), (13, 5)),
    one(
        "vmap over a stack and the data",
        (3, 5, 7),
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x),
        (3, 13, 5),
    ),
    one(
        "scan over a stack",
        (3, 5, 5),
        lambda w, x: lax.scan(lambda x, w: (jnp.sin(x @ w), x), x, w),
        (13, 5),
    ),
    one(
        "scan over chunks of out",
        (5, 21),
        lambda w, x: lax.scan(lambda c, w: (c + 1, x @ w.T), 0, w.T.reshape(3, 7, 5))[1],
        (13, 5),
    ),
    one(
        "scan that carries the weight",
        (5, 5),
        lambda w, x: lax.scan(lambda c, _: ((jnp.sin(c[0] @ c[1]), c[1]), None), (x, w), None, 3)[
            0
        ][0],
        (13, 5),
    ),
    one(
        "cond",
        (5, 7),
        lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: jnp.sin(x @ w), w),
        (13, 5),
    ),
    one(
        "switch",
        (3, 5, 7),
        lambda w, x: lax.switch(1, [lambda: x @ w[0], lambda: x @ w[1], lambda: x @ w[2]]),
        (13, 5),
    ),
    one("remat", (5, 7), lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x), (13, 5)),
    one("custom derivative elsewhere", (5, 7), lambda w, x: jax.nn.relu(x @ w), (13, 5)),
    one("shard_map, partial sums", (12, 7), tensor_parallel, (13, 12)),
    one("shard_map, gathered", (12, 7), gathered_weight, (4, 12)),
]
# Forward mode and while loops go together, reverse mode and while loops do not.
WHILE = one(
    "while",
    (5, 5),
    lambda w, x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1] @ w), s[2]), (0, x, w)
    )[1],
    (13, 5),
)
OFTEN = [
    "dot, weight first",
    "dot, batch free, in the middle",
    "dot, batched",
    "dot, two in axes apart",
    "ragged dot",
    "conv, grouped",
    "look-up by take, and multiplied back",
    "look-up of one row, and of one known row",
    "experts by index under vmap, stack last",
    "look-up, filled with a number outside",
    "dynamic slice of a stack",
    "slice along in",
    "split along out",
    "concatenate one with another transposed",
    "sum with a transposed weight",
    "a single input and output",
    "padded",
    "reversed",
    "scaled along batch and out",
    "shifted",
    "transposed and back",
    "reshaped",
    "vmap over a stack and the data",
    "scan that carries the weight",
    "switch",
    "remat",
    "shard_map, gathered",
]


def halves(case, dtype):
    params, tree, x = case.inputs(dtype)
    return params, *lj.split(tree), x


def total(case, run, adapter, base, x):
    outputs = run(lj.join(adapter, base), x)
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs)), outputs


def values(case, run, adapter, base, x):
    """(a sum of the outputs, the outputs), and its gradients by the adapter and by x."""
    loss = lambda adapter, x: total(case, run, adapter, base, x)  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapter, x)


def merged(case):
    return lambda tree, x: case.run(lj.merge(tree), x)


# Where a kernel's own axis is cut, two sizes can share a product; the judge then needs more care.
CUT = (
    "split",
    "slice along",
    "reshaped",
    "scan over chunks",
    "vector",
    "shard_map",
    "experts by",
    "a single",
    "conv of a s",
)


@over("case", CASES, often=OFTEN)
def test_values_and_gradients(case, float64):
    """And no product in the programs that give them has a kernel's shape, as merging has."""
    params, adapter, base, x = halves(case, jnp.float64)
    with jax.numpy_dtype_promotion("standard"):  # the cases' own literals are not the point
        run = functools.partial(values, case, lj.adapt(case.run, strict=True))

        def run_merged(adapter, base, x, params):
            return values(case, merged(case), adapter, base, x), case.run(params, x)

        ours = jax.jit(run).lower(adapter, base, x).compile()
        theirs = jax.jit(run_merged).lower(adapter, base, x, params).compile()
    found = ours(adapter, base, x)
    expected, plain = theirs(adapter, base, x, params)
    assert_close(found, expected, 1e-9)
    changes = [
        np.abs(np.subtract(a, b)).max()
        for a, b in zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(plain), strict=True)
    ]
    assert max(changes) > 1e-2, "the adapter must be seen in the output"
    if not case.name.startswith(CUT):
        assert products(ours, adapter, base) == []
        assert products(theirs, adapter, base), "the judge must see naive merging"


def products(program, adapter, base):
    """The products in a compiled program that have the shape of an adapted kernel."""
    nodes = jax.tree.leaves(lj.join(adapter, base), is_leaf=lj.is_node)
    weights = [n for n in nodes if isinstance(n, lj.LoraWeight)]
    shapes = {w.shape for w in weights} | {w.shape[w.n_batch :] for w in weights if w.n_batch}
    hlo = program.as_text()
    return [line for shape in shapes for line in dots_of_size(hlo, shape)]


def test_while_in_forward_mode(float64):
    _, adapter, base, x = halves(WHILE, jnp.float64)
    direction = jax.tree.map(np.cos, adapter)

    @jax.jit
    def along(adapter, direction):
        return [
            jax.jvp(lambda ad, run=run: total(WHILE, run, ad, base, x)[0], (adapter,), (direction,))
            for run in (lj.adapt(WHILE.run, strict=True), merged(WHILE))
        ]

    assert_close(*along(adapter, direction), 1e-9)


def test_dropout_of_joined_kernels_runs():
    lstm_case = next(c for c in CASES if c.name.startswith("LSTM"))
    case = dataclasses.replace(lstm_case, rules=(rule(["a", "b"], dropout=0.5),))
    _, tree, x = case.inputs()
    run = jax.jit(lj.adapt(jax.checkpoint(case.run), strict=True))
    one, two = (np.asarray(run(tree, x, dropout_key=jax.random.key(seed))) for seed in (0, 1))
    assert np.abs(one - two).max() > 1e-3
