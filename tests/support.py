"""Shared by several tests: small programs with adapted weights, and checks of their results."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj
from tests.adapted_trees import lorafied, with_random_factors

Params = Any

# Where the environment has THOROUGH=1, proofs that repeat themselves do so more often, and those
# that show what another shows run too.
THOROUGH = os.environ.get("THOROUGH") == "1"
thorough = pytest.mark.skipif(not THOROUGH, reason="it shows what another does: set THOROUGH=1")
# For tests of what the compiler itself makes: as for users, not by the emitters of conftest.py.
EMITTERS = "xla_cpu_use_fusion_emitters"
AS_FOR_USERS = {EMITTERS: True} if EMITTERS in os.environ.get("XLA_FLAGS", "") else {}


def but_rarely(cases: Iterable[str], *rare: str) -> list[Any]:
    """Returns the cases for ``parametrize``; those that show what others do need THOROUGH=1."""
    cases = list(cases)
    if unknown := set(rare) - set(cases):
        raise ValueError(f"these are no cases: {sorted(unknown)}")
    return [pytest.param(case, marks=[thorough] * (case in rare)) for case in cases]


def over(
    arguments: str | tuple[str, ...],
    cases: Iterable[Any],
    often: Iterable[str],
    called: Callable[[Any], str] = lambda case: getattr(case, "name", str(case)),
    rare: Iterable[str] = (),
) -> pytest.MarkDecorator:
    """Parametrises a test over `cases`, all but a few of them marked slow.

    Args:
        arguments: As of ``pytest.mark.parametrize``; of a tuple, each case is a tuple too.
        cases: All of them.
        often: The names of those that the fast suite runs as well; together they should show
            each way that the code under test can go.
        called: Returns the name of a case.
        rare: The names of slow cases that show what others do: they need THOROUGH=1.
    """
    cases, often, rare = list(cases), set(often), set(rare)
    if unknown := (often | rare) - {called(case) for case in cases}:
        raise ValueError(f"often and rare name no case: {sorted(unknown)}")
    if both := often & rare:
        raise ValueError(f"these cases are in often and in rare: {sorted(both)}")
    slow = {False: [pytest.mark.slow], True: [pytest.mark.slow, thorough]}
    return pytest.mark.parametrize(
        arguments,
        [
            pytest.param(
                *([case] if isinstance(arguments, str) else case),
                id=called(case),
                marks=() if called(case) in often else slow[called(case) in rare],
            )
            for case in cases
        ],
    )


def array(values: Any, dtype: Any = None) -> jax.Array:
    """Returns numbers as an array of JAX, without a program.

    ``jnp.array`` and ``jnp.asarray`` compile one for each shape and dtype of NumPy's.
    """
    return jax.device_put(np.asarray(values, dtype))


def draw(key: int, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns normal values, scaled by the root of the last axis but one.

    NumPy draws them: JAX would compile a program for each shape.
    """
    scale = np.sqrt(shape[-2] if len(shape) > 1 else 1)
    values = np.random.default_rng(key).standard_normal(shape) / scale
    return array(values, dtype)


def numpy_init(key: Any, shape: lj.init.FactorShape, dtype: Any) -> lj.init.Factors:
    """An initialiser like the default one: JAX would compile a program for each shape."""
    return draw(17, shape.a, dtype), array(np.zeros(shape.b), dtype)


def variables_of(module: nn.Module, *args: Any) -> Params:
    """A Linen module's variables, drawn by NumPy: each of its initialisers would be a program."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(draw(i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """max|Δ| ≤ tolerance·max(1, max|expected|), leaf by leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        error, bound = np.abs(a - b).max(), tolerance * max(1.0, np.abs(b).max())
        assert error <= bound, f"max|Δ| = {error:.3g} > {bound:.3g}"


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal bit by bit, leaf by leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
                yield from equations(value)


def dots_of_size(hlo: str, shape: Sequence[int]) -> list[str]:
    """The products in optimised HLO whose result has as many elements as `shape`.

    Where all axes have distinct prime sizes, that is the shape in any order of its axes, merged
    or not: nothing else has as many.
    """
    found = []
    for line in hlo.splitlines():
        match = re.search(r"= \w+\[([\d,]*)\]\S* (dot|convolution|custom-call)\(", line)
        if match and math.prod(int(n) for n in match[1].split(",") if n) == math.prod(shape):
            found.append(line.strip())
    return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of (params, x) with weights to adapt. Sizes are distinct primes."""

    name: str
    params: Callable[[Any], Params]  # of a dtype
    rules: tuple[lj.LoraRule, ...]
    run: Callable[[Params, jax.Array], jax.Array]
    x: tuple[int, ...]  # the shape of the input

    def inputs(self, dtype: Any = jnp.float32) -> tuple[Params, Params, jax.Array]:
        """(plain tree, adapted tree with random factors, input)."""
        params = self.params(dtype)
        rules = [dataclasses.replace(rule, dtype=dtype) for rule in self.rules]
        adapted = with_random_factors(lorafied(params, rules))
        return params, adapted, draw(99, self.x, dtype)


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


def _scanned(params: Params, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        return x + _mlp(weights, x), None

    return lax.scan(layer, x, params["layers"])[0]


def _einsum_heads(params: Params, x: jax.Array) -> jax.Array:
    q = jnp.einsum("bsd,dhk->bshk", x, params["query"]["kernel"])
    return jnp.einsum("bshk,hkd->bsd", jax.nn.relu(q), params["out"]["kernel"])


def _tied(params: Params, x: jax.Array) -> jax.Array:
    table = params["embed"]["embedding"]
    hidden = jnp.tanh(x @ table)  # rows in: [.., vocab] @ [vocab, d]
    return hidden @ table.T


def _weight_first(params: Params, x: jax.Array) -> jax.Array:
    return (params["w"].T @ jnp.moveaxis(x.reshape(-1, x.shape[-1]), 0, 1)).T


def _fused(params: Params, x: jax.Array) -> jax.Array:
    kernel = params["qkv"]["kernel"].reshape(5, 3, 7)
    q, k, v = (kernel[:, i] for i in range(3))
    return (x @ q) * (x @ k) + x @ v


def _projections(params: Params, x: jax.Array) -> jax.Array:
    q = (x @ params["q"]["kernel"]).sum(-1, keepdims=True)
    k = jnp.einsum("od,bsd->bso", params["k"]["kernel"].T, x)
    return jnp.concatenate([q * k, x @ params["v"]["kernel"]], axis=-1)


@jax.jit
def _dense(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _nested_jit(params: Params, x: jax.Array) -> jax.Array:
    return jax.jit(lambda p, x: _dense(p["a"]["kernel"], jnp.sin(_dense(p["b"]["kernel"], x))))(
        params, x
    )


def _branches(params: Params, x: jax.Array) -> jax.Array:
    a, b = params["a"]["kernel"], params["b"]["kernel"]
    y = lax.cond(x.sum() > 0, lambda: x @ b @ a, lambda: jnp.sin(x @ b) @ a)

    def step(state: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        i, y, w = state
        return i + 1, jnp.tanh(y @ w[:, :11]), w

    return lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ b @ a), y) + y


def _stack_by_hand(params: Params, x: jax.Array) -> jax.Array:
    kernel = params["layers"]["kernel"]
    x = x + jnp.tanh(x @ kernel[0])
    return x + jnp.tanh(x @ lax.dynamic_index_in_dim(kernel, 1, keepdims=False))


def _experts(params: Params, x: jax.Array) -> jax.Array:
    every = jnp.einsum("bsd,edf->bsef", x, params["experts"]["kernel"])
    one = jnp.einsum("bsef,efd->bsed", jax.nn.relu(every), params["back"]["kernel"])
    return one.sum(2)


PROGRAMS = [
    Program(
        "mlp",
        lambda t: {
            "up": {"kernel": draw(1, (5, 11), t), "bias": draw(2, (11,), t)},
            "down": {"kernel": draw(3, (11, 7), t)},
        },
        (lj.LoraRule(targets=["up", "down"], rank=2, alpha=3.0),),
        _mlp,
        (3, 13, 5),
    ),
    Program(
        "scanned and rematerialised",
        lambda t: {
            "layers": {
                "up": {"kernel": draw(1, (3, 5, 11), t), "bias": draw(2, (3, 11), t)},
                "down": {"kernel": draw(3, (3, 11, 5), t)},
            }
        },
        (
            lj.LoraRule(targets=["up"], rank=2, alpha=3.0),
            lj.LoraRule(targets=["down"], layers=[1, 2], rank=2, alpha=3.0),
        ),
        _scanned,
        (2, 13, 5),
    ),
    Program(
        "einsum with heads",
        lambda t: {
            "query": {"kernel": draw(1, (5, 3, 7), t)},
            "out": {"kernel": draw(2, (3, 7, 11), t)},
        },
        (
            lj.LoraRule(targets=["query"], rank=2, alpha=3.0, in_axes=[0], out_axes=[1, 2]),
            lj.LoraRule(targets=["out"], rank=2, alpha=5.0, in_axes=[0, 1], out_axes=[2]),
        ),
        _einsum_heads,
        (2, 13, 5),
    ),
    Program(
        "tied table, looked up by one-hot and multiplied back",
        lambda t: {"embed": {"embedding": draw(1, (11, 5), t)}},
        (lj.LoraRule(targets=["embed"], rank=2, alpha=3.0),),
        _tied,
        (2, 13, 11),
    ),
    Program(
        "weight as the left operand",
        lambda t: {"w": draw(1, (5, 11), t)},
        (lj.LoraRule(targets=["w"], rank=2, alpha=3.0),),
        _weight_first,
        (2, 13, 5),
    ),
    Program(
        "fused kernel taken apart",
        lambda t: {"qkv": {"kernel": draw(1, (5, 21), t)}},
        (lj.LoraRule(targets=["qkv"], rank=2, alpha=3.0),),
        _fused,
        (2, 13, 5),
    ),
    Program(
        "several kernels over one x",
        lambda t: {
            name: {"kernel": draw(n, (5, n), t)} for name, n in (("q", 9), ("k", 11), ("v", 17))
        },
        (
            lj.LoraRule(targets=["q", "k"], rank=2, alpha=3.0),
            lj.LoraRule(targets=["v"], rank=3, alpha=5.0),
        ),
        _projections,
        (2, 13, 5),
    ),
    Program(
        "nested jit",
        lambda t: {"a": {"kernel": draw(1, (11, 7), t)}, "b": {"kernel": draw(2, (5, 11), t)}},
        (lj.LoraRule(targets=["a", "b"], rank=2, alpha=3.0),),
        _nested_jit,
        (2, 13, 5),
    ),
    Program(
        "branches and loops",
        lambda t: {"a": {"kernel": draw(1, (11, 5), t)}, "b": {"kernel": draw(2, (5, 11), t)}},
        (lj.LoraRule(targets=["a", "b"], rank=2, alpha=3.0),),
        _branches,
        (2, 13, 5),
    ),
    Program(
        "stack walked by hand",
        lambda t: {"layers": {"kernel": draw(1, (3, 5, 5), t)}},
        (lj.LoraRule(targets=["layers"], rank=2, alpha=3.0),),
        _stack_by_hand,
        (2, 13, 5),
    ),
    Program(
        "experts, all of them on every token",
        lambda t: {
            "experts": {"kernel": draw(1, (3, 5, 11), t)},
            "back": {"kernel": draw(2, (3, 11, 5), t)},
        },
        (lj.LoraRule(targets=["experts", "back"], rank=2, alpha=3.0),),
        _experts,
        (2, 13, 5),
    ),
]


def _looked_up(params: Params, x: jax.Array) -> jax.Array:
    table = params["embed"]["embedding"]
    ids = jnp.asarray([[0, 3, 10, 3], [7, 1, 2, 9]])
    return jnp.tanh(jnp.take(table, ids, axis=0) + x) @ table.T


def _sorted_experts(params: Params, x: jax.Array) -> jax.Array:
    sizes = jnp.asarray([5, 0, 8], jnp.int32)
    hidden = lax.ragged_dot(x, params["experts"]["kernel"], sizes)
    return lax.ragged_dot(jnp.tanh(hidden), params["back"]["kernel"], sizes)


def _convolved(params: Params, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


MORE_PROGRAMS = [  # on which variants are held to the laws, beside some of the others
    Program(
        "embedding looked up and tied",
        lambda t: {"embed": {"embedding": draw(1, (11, 5), t)}},
        (lj.LoraRule(targets=["embed"], rank=2, alpha=3.0),),
        _looked_up,
        (2, 4, 5),
    ),
    Program(
        "experts, tokens sorted",
        lambda t: {
            "experts": {"kernel": draw(1, (3, 5, 11), t)},
            "back": {"kernel": draw(2, (3, 11, 5), t)},
        },
        (lj.LoraRule(targets=["experts", "back"], rank=2, alpha=3.0),),
        _sorted_experts,
        (13, 5),
    ),
    Program(
        "convolution",
        lambda t: {"conv": {"kernel": draw(1, (3, 5, 11), t)}},
        (lj.LoraRule(targets=["conv"], rank=2, alpha=3.0, in_axes=[0, 1], out_axes=[2]),),
        _convolved,
        (2, 7, 5),
    ),
]


class LinenBlock(nn.Module):
    """One block of a Linen model: a Dense layer over heads, and one back."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        hidden = nn.DenseGeneral((3, 7), name="wide")(nn.LayerNorm()(x))
        return x + nn.DenseGeneral(5, axis=(-2, -1), name="back")(jnp.tanh(hidden)), None


class LinenModel(nn.Module):
    """A scanned and rematerialised Linen model. [batch, 5] -> [batch, 11]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(11, name="head")(x)


LINEN_RULES = (
    lj.LoraRule(targets=["wide"], rank=2, alpha=3.0, in_axes=[-3], out_axes=[-2, -1]),
    lj.LoraRule(targets=["back"], rank=2, alpha=3.0, in_axes=[-3, -2], out_axes=[-1]),
    lj.LoraRule(targets=["head"], rank=2, alpha=5.0),
)


class NnxModel(nnx.Module):
    """An NNX model. [batch, 5] -> [batch, 7]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(5, 11, rngs=rngs)
        self.norm = nnx.LayerNorm(11, rngs=rngs)
        self.down = nnx.Linear(11, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.norm(self.up(x))))
