"""The implementations of experts, against a plain loop over the experts."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.decoder.experts import (
    IN_CODES,
    apply_blocks,
    apply_formed,
    apply_ragged,
    implementation,
)
from lora_jax.models.decoder.moe import SparseMLP
from lora_jax.models.families import module_of
from lora_jax.quantized import quantize
from lora_jax.sharding import place
from lora_jax.training.layout import Layout, layout_of_one_device
from tests.models import tiny
from tests.support import assert_close, draw, lorafied, over, with_random_factors
from train.plan.flops.jaxpr import count_flops
from train.processes.mesh import make_mesh

WIDTH, INNER, N_EXPERTS = 5, 7, 6
NAMES = ("gate", "up", "down")
rng = np.random.default_rng(0)
# As drawn, with experts that nobody chose, one for all, one row; a multiple of 8, and others.
CHOICES = {
    "21 rows": rng.integers(0, N_EXPERTS, 21),
    "16 rows, three experts": 2 * rng.integers(0, 3, 16),
    "one expert for all": np.full(13, 4),
    "one row": np.array([2]),
}


def loop(gated: Any, rows: Any, chosen: Any, *kernels: Any, biases: Any = ()) -> jax.Array:
    """Every expert on every row, of which each keeps its own's."""
    total = jnp.zeros_like(rows)
    for e in range(N_EXPERTS):
        of_gate, of_up, of_down = (bias[e] for bias in biases or np.zeros((3, N_EXPERTS, 1)))
        gate, up, down = (kernel[e] for kernel in kernels)
        out = gated(rows @ gate + of_gate, rows @ up + of_up) @ down + of_down
        total += jnp.where((chosen == e)[:, None], out, jnp.zeros_like(out))
    return total


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def kernels(dtype: Any) -> dict[str, dict[str, jax.Array]]:
    shapes = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    return {
        name: {"kernel": draw(i, (N_EXPERTS, *shape), dtype)}
        for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }


def called(case: tuple[Any, ...]) -> str:
    return f"{case[0].__name__}, {case[1]}"


# With 21 rows, test_each_expert_has_its_factors computes both.
@over(
    ("how", "choice", "biased"),
    itertools.product((apply_blocks, apply_ragged), list(CHOICES)[1:], (False, True)),
    often=[
        "apply_blocks, one expert for all, True",
        "apply_ragged, 16 rows, three experts, True",
    ],
    called=lambda case: f"{called(case)}, {case[2]}",
)
def test_values_and_gradients(how: Any, choice: str, biased: bool, float64: None) -> None:
    chosen = jnp.asarray(CHOICES[choice], jnp.int32)
    rows, weights = (draw(key, (chosen.size, WIDTH), jnp.float64) for key in (8, 9))
    biases = [draw(i, (N_EXPERTS, n), jnp.float64) for i, n in enumerate((INNER, INNER, WIDTH))]
    biases = biases if biased else []

    def loss(fn: Any, rows: Any, params: Any, biases: Any) -> Any:
        of = [params[name]["kernel"] for name in NAMES]
        out = fn(gated, rows, chosen, *of, **({"biases": biases} if biases else {}))
        return jnp.sum(jnp.sin(out) * weights), out

    run = jax.grad(loss, argnums=(1, 2, 3), has_aux=True)
    both = jax.jit(lambda *args: [run(fn, *args) for fn in (loop, how)])
    want, got = both(rows, kernels(rows.dtype), biases)
    assert_close(got, want, 1e-9)
    assert np.abs(want[1]).max() > 0.05


# Of a low rank, ragged products are plain ones of all experts' factors, and of a high one ragged.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 2},
    "DoRA": {"rank": 2, "dora": True},
    "VeRA": {"rank": 5, "vera": True},
    "a high rank": {"rank": 44},
}


@over(
    ("how", "variant"),
    [
        (apply_blocks, "plain"),
        (apply_ragged, "plain"),
        (apply_ragged, "DoRA"),
        (apply_ragged, "VeRA"),
        (apply_ragged, "a high rank"),
    ],
    often=[],
    called=called,
)
def test_each_expert_has_its_factors(how: Any, variant: str, float64: None) -> None:
    """Factored as merged, values and gradients, and no product of a kernel's shape in between."""
    chosen = jnp.asarray(CHOICES["21 rows"], jnp.int32)
    rows, weights = (draw(key, (chosen.size, WIDTH), jnp.float64) for key in (8, 9))
    rule = lj.LoraRule(targets=[*NAMES], alpha=3, dtype=jnp.float64, **VARIANTS[variant])
    adapter, base = lj.split(with_random_factors(lorafied(kernels(jnp.float64), [rule])))

    def apply(fn: Any, params: Any, rows: Any) -> jax.Array:
        return fn(gated, rows, chosen, *(params[name]["kernel"] for name in NAMES))

    factored = lj.adapt(functools.partial(apply, how), strict=True)

    def merged(tree: Any, rows: Any) -> jax.Array:
        return apply(loop, lj.merge(tree), rows)

    def loss(adapter: Any, rows: Any, fn: Any) -> jax.Array:
        return jnp.sum(jnp.sin(fn(lj.join(adapter, base), rows)) * weights)

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    got, want = jax.jit(lambda *args: [gradients(*args, fn) for fn in (factored, merged)])(
        adapter, rows
    )
    assert_close(got, want, 1e-9)


def test_a_row_is_dropped_on_its_own(float64: None) -> None:
    """W = 0 and AB = 1: what comes out of an expert is what dropout leaves of its rows."""
    chosen = np.arange(4000, dtype=np.int32) % N_EXPERTS
    width = 4
    eye = np.tile(np.eye(width), (N_EXPERTS, 1, 1))
    rule = lj.LoraRule(targets=["gate"], rank=width, alpha=width, dropout=0.25)
    tree = lj.lorafy({"gate": {"kernel": np.zeros_like(eye)}}, [rule])
    adapter, base = lj.split(tree)
    adapter = {"gate/kernel": {name: eye for name in ("a", "b")}}

    def apply(params: Any, rows: jax.Array) -> jax.Array:
        ones = np.ones_like(eye) / width  # up is 1 on rows of ones; down passes on
        return apply_ragged(jnp.multiply, rows, chosen, params["gate"]["kernel"], ones, eye)

    rows = np.ones((chosen.size, width))
    run = jax.jit(lj.adapt(apply, strict=True))
    out = np.asarray(run(lj.join(adapter, base), rows, dropout_key=jax.random.key(0)))
    kept = out > 0.5
    np.testing.assert_allclose(out, np.where(kept, 1 / 0.75, 0.0), atol=1e-6)
    for e in range(N_EXPERTS):
        assert abs(kept[chosen == e].mean() - 0.75) < 0.03
    assert kept.all(1).mean() < 0.4, "elements, not rows"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("text", ["fsdp=2,tensor=2", "expert=2,sequence=2"])
def test_meshes(text: str, case: str, float64: None) -> None:
    """On every mesh ragged products are one device's blocks, values and the adapter's gradients."""
    config = models.read_config({**tiny.fields(case), "intermediate_size": 38})
    layout = Layout.of(make_mesh(text, 4), config)
    x = np.random.default_rng(0).standard_normal((4, 6, config.hidden_size))
    module = SparseMLP(config, jnp.float64, jnp.float64)
    name = config.family.mlp_name
    params = {name: jax.eval_shape(module.init, jax.random.key(1), x)["params"]}
    params = jax.tree.map(lambda p: draw(p.size, p.shape, p.dtype), params)
    router = "router" if "router" in params[name] else "gate"
    rules = [lj.LoraRule(targets=["experts", router], rank=3, alpha=7)]
    tree = with_random_factors(lorafied(params, rules))

    def gradients(module: SparseMLP, tree: Any, x: jax.Array) -> Any:
        forward = lj.adapt(
            lambda params, x: module.apply({"params": params[name]}, x)[0], strict=True
        )

        def loss(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(forward(lj.join(adapter, base), x)))

        run = jax.jit(jax.value_and_grad(loss, (0, 2)), compiler_options=tiny.FAST_COMPILE)
        return run(*lj.split(tree), x)

    want = gradients(module.clone(products="blocks"), tree, x)
    there = place(tree, layout.table, layout.mesh)
    with jax.set_mesh(layout.mesh):
        got = gradients(layout.constrained(module).clone(products="ragged"), there, x)
    assert_close(got, want, 2e-6)  # the router is in single precision
    assert min(np.abs(g["b"]).max() for g in want[1][0].values()) > 1e-2


class OnTPU(Layout):
    """A TPU's layout, by its word."""

    @property
    def platform(self) -> str:
        return "tpu"


def test_the_choice() -> None:
    """Ragged products where a placement says that there is a kernel for them."""
    there = OnTPU(layout_of_one_device().mesh, ())
    assert implementation("auto") is implementation("auto", layout_of_one_device()) is apply_blocks
    assert implementation("auto", there) is apply_ragged
    assert implementation("auto", dataclasses.replace(there, sorts_apart=False)) is apply_blocks
    assert (
        implementation("ragged") is apply_ragged and implementation("blocks", there) is apply_blocks
    )
    assert implementation(loop) is loop
    assert (
        implementation(IN_CODES) is implementation(IN_CODES, layout_of_one_device()) is apply_blocks
    )
    assert implementation(IN_CODES, there) is apply_formed
    assert (
        there.compiler_options
        == models.compiler_options("tpu")
        != layout_of_one_device().compiler_options
    )
    with pytest.raises(ValueError, match="'gmm'. Use one of auto, blocks, ragged"):
        implementation("gmm")


def test_the_choice_reaches_the_model(tmp_path: Any) -> None:
    model, params = tiny.decoder("mixtral")
    assert model.experts == "auto"
    models.save_pretrained(tmp_path / "model", model, params)
    model, params = models.from_pretrained(tmp_path / "model", experts="ragged")

    def program(model: Any) -> str:
        return str(jax.make_jaxpr(model.apply)({"params": params}, tiny.tokens(0, 2, 8)))

    assert program(model).count("ragged_dot_general") == 3
    assert "ragged_dot_general" not in program(model.clone(experts="auto"))
    alone = layout_of_one_device().constrained(model.clone(experts="auto"))
    assert "ragged_dot_general" not in program(alone), "a CPU"
    alone = OnTPU(layout_of_one_device().mesh, ()).constrained(
        model.clone(experts="auto"), dropout=True
    )
    assert program(alone).count("ragged_dot_general") == 3


@pytest.mark.slow
def test_experts_in_codes_are_formed_where_that_is_less_work(monkeypatch: Any) -> None:
    """A layer's for many rows on a TPU, if they fit; one expert's for few rows, and elsewhere."""
    model, params = tiny.decoder("mixtral")
    config, coded = model.config, jax.eval_shape(quantize, params)
    module = module_of(config, jnp.float32, jnp.float32, params=coded)
    there = OnTPU(layout_of_one_device().mesh, ()).constrained(module)

    def is_ragged(model: Any, seq: int) -> bool:
        forward = lj.adapt(lambda params, ids: model.apply({"params": params}, ids))
        return "ragged_dot" in str(jax.make_jaxpr(forward)(coded, tiny.tokens(0, 1, seq)))

    assert is_ragged(there, 64) and not is_ragged(layout_of_one_device().constrained(module), 64)
    assert not is_ragged(there, 1), "a token of decoding"
    size = config.num_experts * config.hidden_size * config.moe_intermediate_size * 4
    for most in (size, size - 1):
        monkeypatch.setattr("lora_jax.models.decoder.experts._MAX_FORMED_BYTES", most)
        assert is_ragged(there, 64) == (most == size)
    monkeypatch.undo()
    assert is_ragged(there, 64)
    monkeypatch.setattr("lora_jax.models.decoder.experts._LARGE_BLOCK_ROWS", 8)
    assert not is_ragged(there, 64), "blocks of 8 rows are large"


def test_a_model_without_experts_refuses(tmp_path: Any) -> None:
    model, params = tiny.decoder("llama2")
    models.save_pretrained(tmp_path / "model", model, params)
    message = "this llama model has no experts"
    with pytest.raises(models.ConfigError, match=message):
        models.from_pretrained(tmp_path / "model", experts="ragged")
    with pytest.raises(models.ConfigError, match=message):
        model.clone(experts="ragged").apply({"params": params}, tiny.tokens(0, 1, 3))


@pytest.mark.slow
def test_a_policy_that_keeps_products_keeps_ragged_ones() -> None:
    model, params = tiny.decoder("mixtral", experts="ragged")

    def flops(remat: bool | str) -> int:
        def loss(params: Any) -> jax.Array:
            ids = jnp.zeros((2, 20), jnp.int32)
            return jnp.sum(model.clone(remat=remat).apply({"params": params}, ids))

        return count_flops(jax.jit(jax.grad(loss)).trace(params).jaxpr).flops

    assert flops("dots_saveable") == flops(False) < flops(True)


def test_only_a_tpu_is_given_the_compiler_option() -> None:
    def compiled(**options: Any) -> Any:
        run = jax.jit(lambda x: x + 1, compiler_options=models.compiler_options(**options))
        return run.lower(1.0).compile()

    assert models.compiler_options() == layout_of_one_device().compiler_options == {}
    compiled()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_enable_ragged_dot_kernel"):
        compiled(platform="tpu")
