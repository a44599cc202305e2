"""Small random programs that use weights in random ways, and the laws that each must keep.

A program maps x [3, d] to [3, d'] in a few steps. A step multiplies by a matrix that is made of
weights (stored with their axes in any order, sliced, joined, scaled, transposed, ...), or puts
further steps into a loop, a branch or a transform. Weights are shared between steps.
"""

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lj
from lora_jax.adapt.interpreter import Interpreter, Use
from lora_jax.adapt.transform import RULES, run
from tests.support import assert_close, assert_identical, draw, numpy_init, with_random_factors

N = 3  # rows of x
Params = dict[str, dict[str, jax.Array]]
Run = Callable[[Params, jax.Array], jax.Array]
Matrix = Callable[[Params], jax.Array]
VARIANT: dict[str, bool] = {}  # of all rules


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight with an axis for each letter, in the order that it is stored in."""

    name: str
    letters: str
    sizes: tuple[int, ...]
    in_letters: str
    out_letters: str

    def get(self, params: Params, letters: str) -> jax.Array:
        """The weight with its axes in another order."""
        stored = params[self.name]["kernel"]
        order = [self.letters.index(letter) for letter in letters]
        return stored if letters == self.letters else jnp.transpose(stored, order)

    def rule(self) -> lj.LoraRule:
        """The rule that says its roles."""
        axes = (
            [self.letters.index(x) for x in part] for part in (self.in_letters, self.out_letters)
        )
        in_axes, out_axes = axes
        sizes = (math.prod(self.sizes[axis] for axis in part) for part in (in_axes, out_axes))
        drawn = {} if VARIANT else {"init": numpy_init}
        return lj.LoraRule(
            targets=[self.name],
            rank=min(2, *sizes) if "xs" in VARIANT else 2,  # it has no more singular vectors
            alpha=3.0,
            dtype=jnp.float64,
            in_axes=in_axes,
            out_axes=out_axes,
            **drawn,
            **VARIANT,
        )


@dataclasses.dataclass
class Program:
    """A function of (params, x); shown as what it does, line by line."""

    weights: list[Weight]
    d: int
    run: Run
    text: str
    by_looking: bool  # whether the roles are read by `trace`, where it can tell
    has_ragged: bool  # JAX has no vmap of ragged_dot over a later axis

    def __repr__(self) -> str:
        stored = ", ".join(
            f"{w.name}: {dict(zip(w.letters, w.sizes, strict=True))}" for w in self.weights
        )
        return f"x [{N}, {self.d}]; {stored}\n{self.text}"

    def inputs(self) -> tuple[Params, Params, jax.Array]:
        """(plain tree, adapted tree with B = 0, x), in float64."""
        params = {
            w.name: {"kernel": draw(i, w.sizes, jnp.float64)} for i, w in enumerate(self.weights)
        }
        x = draw(99, (N, self.d), jnp.float64)
        fresh = lj.lorafy(params, [w.rule() for w in self.weights])
        if self.by_looking:
            rules = [lj.LoraRule(targets=".*", rank=2, alpha=3.0, dtype=jnp.float64, **VARIANT)]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", lj.RoleWarning)  # roles taken from names
                    fresh = lj.lorafy(params, rules, trace=(self.run, params, x))
            except (ValueError, lj.RoleWarning):
                # Used in no product, or the stack cannot be told from in axes.
                self.by_looking = False
        return params, fresh, x


class _Builder:
    """Draws steps and the weights that they use."""

    def __init__(self, pick: Callable[[Any], Any]) -> None:
        self.pick = pick
        self.weights: list[Weight] = []
        self.has_ragged = False

    def chance(self, percent: int) -> bool:
        return self.pick(st.integers(0, 99)) >= 100 - percent  # shrinks to False

    def size(self, low: int = 2, high: int = 6) -> int:
        return self.pick(st.integers(low, high))

    def one_of(self, options: dict[str, Any]) -> Any:
        return options[self.pick(st.sampled_from(list(options)))]

    def weight(self, into: dict[str, int], out: dict[str, int], **stack: int) -> Weight:
        """A new weight with its axes in any order, or one like it that another step uses too."""
        sizes = {**stack, **into, **out}
        inside, outside = "".join(into), "".join(out)
        same = [
            w
            for w in self.weights
            if dict(zip(w.letters, w.sizes, strict=True)) == sizes
            and (w.in_letters, w.out_letters) == (inside, outside)
        ]
        if same and self.chance(50):
            return self.pick(st.sampled_from(same))
        letters = "".join(self.pick(st.permutations(sorted(sizes))))
        name = f"w{len(self.weights)}"
        weight = Weight(name, letters, tuple(sizes[x] for x in letters), inside, outside)
        self.weights.append(weight)
        return weight

    # Matrices: [i, o], made of weights.

    def matrix(self, i: int, o: int, depth: int = 2) -> tuple[Matrix, str]:
        if depth == 0 or self.chance(35):
            return self.one_of(
                {"whole": self.whole, "of stack": self.of_stack, "fused": self.fused}
            )(i, o)
        return self.one_of(
            {
                "scaled": self.scaled,
                "transposed": self.transposed,
                "cut": self.cut,
                "joined": self.joined,
                "summed": self.summed,
                "multiplied": self.multiplied,
                "chosen": self.chosen,
                "passed on": self.passed_on,
            }
        )(i, o, depth - 1)

    def whole(self, i: int, o: int) -> tuple[Matrix, str]:
        w = self.weight({"i": i}, {"o": o})
        return lambda p: w.get(p, "io"), w.name

    def of_stack(self, i: int, o: int) -> tuple[Matrix, str]:
        w = self.weight({"i": i}, {"o": o}, e=3)
        k = self.pick(st.integers(0, 2))
        ways = {
            "[k]": lambda p: w.get(p, "eio")[k],
            "dynamic [k]": lambda p: lax.dynamic_index_in_dim(
                w.get(p, "eio"), jnp.int32(k), keepdims=False
            ),
            "[:, k]": lambda p: w.get(p, "ieo")[:, k],
            "split": lambda p: jnp.split(w.get(p, "ioe"), 3, axis=2)[k][..., 0],
            "stacked anew": lambda p: jnp.stack([w.get(p, "eio")[k], w.get(p, "eio")[0]], axis=1)[
                :, 0
            ],
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], f"{w.name} {way}"

    def fused(self, i: int, o: int) -> tuple[Matrix, str]:
        if o % 2 == 0 and self.chance(50):
            w = self.weight({"i": i}, {"h": 2, "k": o // 2})
            return lambda p: w.get(p, "ihk").reshape(i, o), f"{w.name} flattened"
        w = self.weight({"i": i}, {"o": 2 * o})
        j = self.pick(st.integers(0, 1))
        return lambda p: w.get(p, "io").reshape(i, 2, o)[:, j], f"{w.name} taken apart"

    def scaled(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        m, text = self.matrix(i, o, depth)
        row, column = jnp.arange(1.0, i + 1) / i, jnp.arange(1.0, o + 1) / o
        ways: dict[str, Matrix] = {
            "by a number": lambda p: 0.5 * m(p),
            "by a column": lambda p: m(p) * column.astype(m(p).dtype),
            "by a row": lambda p: m(p) / row[:, None].astype(m(p).dtype),
            "negative": lambda p: -m(p),
            "shifted": lambda p: m(p) + 0.25,
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], f"({text}) scaled {way}"

    def transposed(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        m, text = self.matrix(o, i, depth)
        return lambda p: m(p).T, f"({text}).T"

    def cut(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        way = self.pick(st.sampled_from(["out", "in", "strided", "dynamic", "padded", "reversed"]))
        if way in ("out", "dynamic"):
            m, text = self.matrix(i, o + 2, depth)
            if way == "out":
                return lambda p: m(p)[:, 1 : o + 1], f"({text})[:, 1:-1]"
            start = jnp.int32(1)
            cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=o, axis=1)
            return lambda p: cut(m(p), start), f"({text}) dynamic cut"
        if way == "padded" and o > 2:
            m, text = self.matrix(i, o - 1, depth)
            return lambda p: jnp.pad(m(p), ((0, 0), (1, 0))), f"({text}) padded"
        if way == "reversed":
            m, text = self.matrix(i, o, depth)
            return lambda p: m(p)[::-1], f"({text})[::-1]"
        if way == "strided":
            m, text = self.matrix(2 * i, o, depth)
            return lambda p: m(p)[::2], f"({text})[::2]"
        m, text = self.matrix(i + 1, o, depth)
        return lambda p: m(p)[1:], f"({text})[1:]"

    def joined(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        axis = self.pick(st.integers(0, 1))
        n = (i, o)[axis]
        if n < 4:  # an axis of one element has no role to speak of
            return self.matrix(i, o, depth)
        first = self.pick(st.integers(2, n - 2))
        shapes = [(first, o), (i - first, o)] if axis == 0 else [(i, first), (i, o - first)]
        (a, text_a), (b, text_b) = self.matrix(*shapes[0], depth), self.other(shapes[1], depth)
        return (
            lambda p: jnp.concatenate([a(p), b(p)], axis),
            f"join({text_a}, {text_b}, axis={axis})",
        )

    def summed(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        (a, text_a), (b, text_b) = self.matrix(i, o, depth), self.other((i, o), depth)
        if self.chance(50):
            return lambda p: a(p) - b(p), f"({text_a} - {text_b})"
        return lambda p: b(p) + a(p), f"({text_b} + {text_a})"

    def multiplied(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        between = self.size()
        (a, text_a), (b, text_b) = self.matrix(i, between, depth), self.matrix(between, o, depth)
        return lambda p: a(p) @ b(p), f"({text_a} @ {text_b})"

    def chosen(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        (a, text_a), (b, text_b) = self.matrix(i, o, depth), self.matrix(i, o, depth)
        which = self.chance(50)

        def by_row(p: Params) -> jax.Array:
            rows = jnp.array([which, True])
            return jax.vmap(lambda w: lax.cond(w, lambda: a(p), lambda: b(p)))(rows)[0]

        ways: dict[str, Matrix] = {
            "by cond": lambda p: lax.cond(which, lambda: a(p), lambda: b(p)),
            "by cond of operands": lambda p: lax.cond(which, jnp.negative, jnp.copy, a(p)) + b(p),
            "by where": lambda p: jnp.where(which, a(p), b(p)),
            "by row": by_row,
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], f"({text_a} or {text_b}, {way})"

    def other(self, shape: tuple[int, int], depth: int) -> tuple[Matrix, str]:
        """A second matrix: also of weights, or plain."""
        if self.chance(70):
            return self.matrix(*shape, depth)
        return lambda p: draw(5, shape, jnp.float64), "plain"

    def passed_on(self, i: int, o: int, depth: int) -> tuple[Matrix, str]:
        m, text = self.matrix(i, o, depth)
        ways: dict[str, Callable[[jax.Array], jax.Array]] = {
            "barrier": lax.optimization_barrier,
            "named": lambda w: checkpoint_name(w, "w"),
            "jit": jax.jit(lambda w: w * 2.0),
            "squeezed": lambda w: jnp.squeeze(w[:, None], 1),
            "stopped": lax.stop_gradient,
            "copied": jnp.copy,
        }
        way = self.pick(st.sampled_from(list(ways)))
        return lambda p: ways[way](m(p)), f"({text}) {way}"

    # Steps: x [N, d] to [N, d'].

    def steps(self, d: int, depth: int, most: int = 3) -> tuple[Run, int, list[str]]:
        runs, lines = [], []
        for _ in range(self.pick(st.integers(1, most))):
            run, d, text = self.step(d, depth)
            runs.append(run)
            lines += text

        def every(params: Params, x: jax.Array) -> jax.Array:
            return functools.reduce(lambda x, run: run(params, x), runs, x)

        return every, d, lines

    def square(self, d: int, depth: int) -> tuple[Run, list[str]]:
        """Steps that end where they began."""
        inner, end, lines = self.steps(d, depth, most=2)
        m, text = self.matrix(end, d, 1)
        return lambda p, x: jnp.tanh(inner(p, x) @ m(p)), [*lines, f"tanh(x @ {text})"]

    def step(self, d: int, depth: int) -> tuple[Run, int, list[str]]:
        options: dict[str, Any] = {
            "product": self.product,
            "heads": self.heads,
            "from heads": self.from_heads,
            "stack": self.stack,
            "experts": self.experts,
            "ragged": self.ragged,
            "conv": self.conv,
            "look-up": self.look_up,
            "dead": self.dead,
        }
        if depth and self.chance(50):
            return self.nested(d, depth - 1)
        if depth < 2:
            del options["ragged"]  # it may be under vmap
        run, d, text = self.one_of(options)(d)
        act = self.pick(st.sampled_from([lambda y: y, jnp.sin, jax.nn.relu, jax.nn.gelu]))
        return lambda p, x: act(run(p, x)), d, [f"{getattr(act, '__name__', 'x')} of {text}"]

    def product(self, d: int) -> tuple[Run, int, str]:
        o = self.size()
        m, text = self.matrix(d, o)
        ways: dict[str, Run] = {
            "x @ w": lambda p, x: x @ m(p),
            "(w.T @ x.T).T": lambda p, x: (m(p).T @ x.T).T,
            "einsum": lambda p, x: jnp.einsum(
                "no,on->no", jnp.einsum("ni,io->no", x, m(p)), jnp.ones((o, N), x.dtype)
            ),
            "row by row": lambda p, x: jax.vmap(lambda row: row @ m(p))(x),
            "column by column": lambda p, x: jax.vmap(lambda w: x @ w, 1, 1)(m(p)),
            "column after column": lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, m(p).T)[1].T,
            "w[None]": lambda p, x: (x[None] @ m(p)[None])[0],
            "(x[..., None] * w).sum(1)": lambda p, x: (x[..., None] * m(p)).sum(1),
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], o, f"{way} with w = {text}"

    def heads(self, d: int) -> tuple[Run, int, str]:
        h, k = self.size(1, 3), self.size(1, 3)
        w = self.weight({"i": d}, {"h": h, "k": k})
        out = self.pick(st.permutations("nhk"))
        spec = f"ni,{w.letters}->{''.join(out)}"

        def run(p: Params, x: jax.Array) -> jax.Array:
            y = jnp.einsum(spec, x, w.get(p, w.letters))
            return jnp.moveaxis(y, out.index("n"), 0).reshape(N, h * k)

        return run, h * k, f"einsum({spec}) with {w.name}"

    def from_heads(self, d: int) -> tuple[Run, int, str]:
        h = next((n for n in (2, 3, 5) if d % n == 0), 1)
        o = self.size()
        w = self.weight({"h": h, "k": d // h}, {"o": o})
        spec = f"nhk,{w.letters}->no"
        return (
            lambda p, x: jnp.einsum(spec, x.reshape(N, h, d // h), w.get(p, w.letters)),
            o,
            f"einsum({spec}) with {w.name}",
        )

    def stack(self, d: int) -> tuple[Run, int, str]:
        w = self.weight({"i": d}, {"o": d}, e=3)

        def over(x: jax.Array, layer: jax.Array) -> jax.Array:
            return jnp.tanh(x @ layer)

        def by_index(p: Params, x: jax.Array) -> jax.Array:
            stack = w.get(p, "eio")
            return lax.fori_loop(0, 3, lambda k, x: over(x, stack[k]), x)

        ways: dict[str, Run] = {
            "scanned": lambda p, x: lax.scan(lambda x, w: (over(x, w), None), x, w.get(p, "eio"))[
                0
            ],
            "scanned, rematerialised": lambda p, x: lax.scan(
                jax.checkpoint(lambda x, w: (over(x, w), None)), x, w.get(p, "eio"), reverse=True
            )[0],
            "walked by hand": lambda p, x: functools.reduce(over, w.get(p, "eio"), x),
            "by index": by_index,
            "side by side": lambda p, x: jax.vmap(over, (None, 0))(x, w.get(p, "eio")).sum(0),
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], d, f"the stack {w.name} {way}"

    def experts(self, d: int) -> tuple[Run, int, str]:
        o = self.size()
        w = self.weight({"i": d}, {"o": o}, e=3)
        of_row = jnp.array([2, 0, 2])
        ways: dict[str, Run] = {
            "all, apart": lambda p, x: jnp.einsum(
                f"ni,{w.letters}->neo", x, w.get(p, w.letters)
            ).max(1),
            "a row each": lambda p, x: jnp.einsum("ei,eio->eo", x, w.get(p, "eio")),
            "by index": lambda p, x: jnp.einsum("ni,nio->no", x, w.get(p, "eio")[of_row]),
        }
        way = self.pick(st.sampled_from(list(ways)))
        return ways[way], o, f"the experts {w.name}, {way}"

    def ragged(self, d: int) -> tuple[Run, int, str]:
        o = self.size()
        self.has_ragged = True
        w = self.weight({"i": d}, {"o": o}, e=3)
        sizes = jnp.array([1, 0, 2], jnp.int32)
        return lambda p, x: lax.ragged_dot(x, w.get(p, "eio"), sizes), o, f"ragged {w.name}"

    def conv(self, d: int) -> tuple[Run, int, str]:
        o, groups = self.size(), 2 if d % 2 == 0 and self.chance(50) else 1
        w = self.weight({"k": 2, "i": d // groups}, {"o": o * groups})
        layout = w.letters.replace("k", "W").replace("i", "I").replace("o", "O")

        def run(p: Params, x: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(
                x[None],
                w.get(p, w.letters),
                (1,),
                "SAME",
                dimension_numbers=("NWC", layout, "NWC"),
                feature_group_count=groups,
            )[0]

        return run, o * groups, f"conv {layout} of {groups} groups with {w.name}"

    def look_up(self, d: int) -> tuple[Run, int, str]:
        w = self.weight({"v": 5}, {"o": d})
        ids = jnp.array([4, 0, 4])
        if self.chance(50):
            return lambda p, x: x + jnp.take(w.get(p, "vo"), ids, axis=0), d, f"x + {w.name}[ids]"
        return lambda p, x: x * w.get(p, "vo")[ids], d, f"x * {w.name}[ids]"

    def dead(self, d: int) -> tuple[Run, int, str]:
        m, text = self.matrix(d, d, 1)

        def run(p: Params, x: jax.Array) -> jax.Array:
            _ = jnp.sin(m(p)) @ m(p)  # nothing reads it: no reason to merge
            return 2.0 * x

        return run, d, f"2 x, and dead code with {text}"

    def nested(self, d: int, depth: int) -> tuple[Run, int, list[str]]:
        loops: dict[str, Callable[[Run], Run]] = {
            "scan": lambda f: lambda p, x: lax.scan(lambda x, _: (f(p, x), None), x, None, 2)[0],
            "scan with weights as carry": lambda f: (
                lambda p, x: lax.scan(lambda c, _: ((c[0], f(*c)), None), (p, x), None, 2)[0][1]
            ),
            "fori": lambda f: lambda p, x: lax.fori_loop(0, 2, lambda _, x: f(p, x), x),
        }
        others: dict[str, Callable[[Run], Run]] = {
            "jit": jax.jit,
            "jit that closes over": lambda f: lambda p, x: jax.jit(lambda x: f(p, x))(x),
            "jit twice": lambda f: _twice(jax.jit(f)),
            "remat": jax.checkpoint,
            "remat that saves dots": lambda f: jax.checkpoint(
                f, policy=jax.checkpoint_policies.dots_saveable
            ),
            "cond": lambda f: (
                lambda p, x: lax.cond(x[0, 0] > 0, lambda: f(p, x), lambda: jnp.sin(f(p, x)))
            ),
            "cond with operands": lambda f: (
                lambda p, x: lax.cond(x[0, 0] > 0, f, lambda p, x: jnp.zeros_like(f(p, x)), p, x)
            ),
            "switch": lambda f: (
                lambda p, x: lax.switch(
                    jnp.int32(x[0, 0] > 0), [lambda: -f(p, x), lambda: f(p, x), lambda: f(p, -x)]
                )
            ),
            "vmap": lambda f: lambda p, x: jax.vmap(lambda row: f(p, jnp.stack([row] * N))[0])(x),
            "scan over rows": lambda f: (
                lambda p, x: lax.scan(
                    lambda c, row: (c, f(p, row + c * x)[0]), jnp.ones((), x.dtype), x
                )[1]
            ),
        }
        if self.chance(35):
            inner, lines = self.square(d, depth)
            end, wraps = d, loops
        else:
            (inner, end, lines), wraps = self.steps(d, depth, most=2), others
        name = self.pick(st.sampled_from(list(wraps)))
        return wraps[name](inner), end, [f"{name}:", *(f"  {line}" for line in lines)]


def _twice(run: Run) -> Run:
    return lambda params, x: run(params, x) + run(params, jnp.cos(x))


@st.composite
def programs(pick: Any) -> Program:
    """Random programs; each has a weight that its output depends on."""
    builder = _Builder(pick)
    d = builder.size()
    steps, end, lines = builder.steps(d, depth=2)
    m, text = builder.matrix(end, builder.size())
    looked = builder.chance(40)

    def run(params: Params, x: jax.Array) -> jax.Array:
        return steps(params, x) @ m(params)

    text = "\n".join([*lines, f"x @ {text}"])
    return Program(builder.weights, d, run, text, looked, builder.has_ragged)


def check(program: Program, way: str) -> None:
    """Laws 1, 2, 3 and, of law 6, one `way` (see WAYS), in float64 and strictly."""
    if program.has_ragged and way.startswith("vmap"):
        way = "jvp"
    params, fresh, x = program.inputs()
    forward = lj.adapt(program.run, strict=True)
    zero, plain = jax.jit(lambda *of: (forward(*of[1:]), program.run(of[0], of[2])))(
        params, fresh, x
    )
    # (Bitwise but for what XLA fuses; tests/laws/test_laws.py holds programs to every bit.)
    near = 1e-2 if "xs" in VARIANT else 1e-13  # LoRA-XS begins beside W
    assert_close(zero, plain, near)
    tree = with_random_factors(fresh)
    adapter, base = lj.split(tree)
    assert_identical(lj.join(adapter, base), tree)
    stripped = zip(jax.tree.leaves(lj.strip(tree)), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in stripped)

    def values(run: Run) -> Any:
        function = lambda adapter, x: run(lj.join(adapter, base), x)  # noqa: E731
        loss = lambda adapter, x: jnp.sum(jnp.sin(function(adapter, x)))  # noqa: E731
        gradients = jax.value_and_grad(loss, argnums=(0, 1))
        return lambda *args: (gradients(*args), WAYS[way](function, *args))

    both = (values(forward), values(lambda tree, x: program.run(lj.merge(tree), x)))
    ours, theirs = jax.jit(lambda *args: [run(*args) for run in both])(adapter, x)
    assert_close(ours, theirs, 1e-9)


def _twofold(tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.stack([v, jnp.cos(v)]), tree)


WAYS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, ad, x: jax.jvp(f, (ad, x), jax.tree.map(jnp.cos, (ad, x))),
    "vmap of the data": lambda f, ad, x: jax.vmap(f, (None, 0))(ad, _twofold(x)),
    "vmap of the adapter": lambda f, ad, x: jax.vmap(f, (0, None))(_twofold(ad), x),
    "vmap of both": lambda f, ad, x: jax.vmap(f)(_twofold(ad), _twofold(x)),
    "remat and grad of the data": lambda f, ad, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(f)(ad, x) ** 2)
    )(x),
}


def met(program: Program) -> Counter[tuple[str, ...]]:
    """How often each primitive meets a weight, by nesting: ("scan", "jit", "dot_general")."""
    found: Counter[tuple[str, ...]] = Counter()
    stack: list[str] = []

    def counted(name: str, rule: Any) -> Any:
        def apply(interpreter: Interpreter, use: Use) -> Any:
            stack.append(name)
            found[tuple(stack)] += 1
            outputs = rule(interpreter, use)
            stack.pop()
            return outputs

        return apply

    rules = {name: counted(name, rule) for name, rule in RULES.items()}
    interpreter = Interpreter(rules, strict=True, record=lambda _: None)
    _, tree, x = program.inputs()
    jax.eval_shape(lambda tree, x: run(program.run, interpreter, (tree, x), {}, None), tree, x)
    return found


def histogram(programs: list[Program]) -> str:
    """What the programs cover: primitives that meet a weight, and what they are nested in."""
    uses = sum((met(program) for program in programs), Counter())
    primitives: Counter[str] = Counter()
    nestings: Counter[str] = Counter()
    for (*around, primitive), n in uses.items():
        primitives[primitive] += n
        nestings[" > ".join(around) or "(top)"] += n
    n_weights = sum(len(program.weights) for program in programs)
    looked = sum(program.by_looking for program in programs)
    title = f"{len(programs)} programs, {n_weights} weights, roles by looking in {looked}"
    lines = [title, "", "primitive that meets a weight"]
    lines += _bars(primitives)
    lines += ["", "nested in"]
    lines += _bars(nestings)
    return "\n".join(lines)


def _bars(counts: Counter[str]) -> list[str]:
    width = max(map(len, counts), default=0)
    most = max(counts.values(), default=1)
    return [
        f"  {name.ljust(width)} {n:6,d}  {'█' * math.ceil(30 * n / most)}"
        for name, n in counts.most_common()
    ]
