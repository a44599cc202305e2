"""Rematerialisation of long rows: inputs in the host's memory, MLPs by chunks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapt import eqns
from lora_jax.core import product
from lora_jax.models import Decoder, init_cache
from lora_jax.models.layers import trunk
from lora_jax.models.layers.kernels import flash, flash_call
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.quantized import quantize
from tests.models import tiny
from tests.models.test_flash import run_plain
from tests.support import (
    array,
    assert_close,
    assert_identical,
    draw,
    equations,
    over,
    with_random_factors,
)
from train.plan.flops.jaxpr import count_flops

CASE = "llama with biases"
IDS = array(np.arange(2 * 24).reshape(2, 24) * 7 % 61)


@pytest.fixture(scope="module")
def adapted() -> Any:
    _, params = tiny.decoder(CASE)
    rule = lj.LoraRule(targets=["q_proj", "gate_proj", "down_proj"], rank=3, alpha=5)
    adapted = lj.lorafy(params, [rule])
    trained, base = lj.split(adapted)
    trained = {
        path: {name: draw(len(path + name), x.shape) for name, x in parts.items()}
        for path, parts in trained.items()
    }
    return trained, base


def gradient(adapted: Any, remat: bool | str) -> Any:
    """The loss and the gradient of A and B; a function compiled anew, whatever the chunks."""
    return jax.jit(loss_and_gradient(adapted, remat))(adapted[0])


def loss_and_gradient(adapted: Any, remat: bool | str) -> Any:
    model = Decoder(tiny.config(CASE), remat=remat)
    forward = lj.adapt(lambda params, ids: model.apply({"params": params}, ids))
    base = adapted[1]

    def loss(trained: Any) -> jax.Array:
        return jnp.mean(forward(lj.join(trained, base), IDS) ** 2)

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def kept(adapted: Any) -> Any:
    return gradient(adapted, False)


@over(
    ("remat", "chunk"),
    [(remat, chunk) for remat in (True, "offload") for chunk in (8, 7, 4096)],
    often=[],
    called=lambda case: f"{case[0]}, {case[1]}",
)
def test_chunks_and_the_host_change_no_value(
    adapted: Any, kept: Any, remat: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "CHUNK", chunk)
    assert_close(gradient(adapted, remat), kept, 1e-6)


@pytest.mark.parametrize(
    ("remat", "chunk", "least", "times"),
    [
        (True, 4096, 8, 1),
        (True, 8, 8, 1),
        pytest.param("offload", 4096, 8, 2, id="offload-4096: the device keeps least"),
        pytest.param("offload", 8, 8, 2, id="offload-8"),
        pytest.param("nothing_saveable", 4096, 8, 2, id="a policy that keeps nothing"),
        pytest.param(True, 4096, 9, 2, id="A is not narrow"),
    ],
)
def test_products_with_a_are_not_computed_again(
    adapted: Any, remat: Any, chunk: int, least: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "CHUNK", chunk)
    monkeypatch.setattr(product, "_MIN_ELEMENTS_PER_RANK", least)  # of 24 features, and a rank of 3
    jaxpr = jax.make_jaxpr(loss_and_gradient(adapted, remat))(adapted[0])
    products = [
        eqn
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
        and eqn.invars[1].aval.shape == (3, 24)
        and eqn.params["dimension_numbers"][0][1] == (1,)
    ]
    # A of q_proj and of gate_proj; and, once in the backward pass, B of down_proj.
    assert len(products) == 2 * times + 1


def split_steps(
    adapted: Any, remat: bool | str, config: Any = None, dtype: Any = jnp.float32
) -> Any:
    """As `loss_and_gradient`, compiled, under `strict`, where nothing is merged."""
    model = Decoder(config or tiny.config(CASE), dtype, dtype, remat)
    forward = lj.adapt(lambda params, ids: model.apply({"params": params}, ids), strict=True)
    trained, base = adapted
    loss = lambda trained: jnp.mean(forward(lj.join(trained, base), IDS) ** 2)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))


@over(
    "remat",
    [f"{policy}:{n}" for policy in ("products", "projections", "attention") for n in (1, 2)],
    often=["products:1"],
)
def test_a_policy_for_some_layers_changes_no_value(adapted: Any, remat: str, float64: None) -> None:
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), adapted)
    steps = [split_steps(wide, policy, dtype=jnp.float64) for policy in (remat, "projections")]
    assert_close(*(step(wide[0]) for step in steps), 1e-12)


@pytest.mark.parametrize("codes", ["int8", "nf4"])
def test_quantized_stacks_are_indexed_in_codes(codes: str) -> None:
    config = dataclasses.replace(tiny.config(CASE), hidden_size=64, intermediate_size=128)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda leaf: draw(leaf.size, leaf.shape), shapes)
    rule = lj.LoraRule(targets=["gate_proj", "up_proj"], rank=3, alpha=5)
    adapted = lj.split(with_random_factors(lj.lorafy(quantize(params, codes), [rule])))
    steps = [split_steps(adapted, policy, config) for policy in ("products:1", "products")]
    assert_close(*(step(adapted[0]) for step in steps), 1e-5)
    stacks = {
        eqn.primitive.name
        for eqn in equations(steps[0].trace(adapted[0]).jaxpr)
        for result in eqn.outvars
        if result.aval.shape == (3, 64, 128)
    }
    assert not stacks, "a stack that is dequantized as a whole, or sliced"


def test_some_layers_keep_more_and_no_stack_is_sliced(adapted: Any) -> None:
    """Of three layers, the backward pass computes gate and up of one again; A's are scanned."""
    products = {
        remat: count_flops(split_steps(adapted, remat).trace(adapted[0]).jaxpr).flops
        for remat in ("projections", "products:2", "products")
    }
    most, some, least = products.values()
    assert most > some > least and (some - least) * 2 == most - some
    jaxpr = split_steps(adapted, "products:2").trace(adapted[0]).jaxpr
    kernels = {(24, 37), (37, 24), (24, 60), (60, 24), (24, 20)}
    slices = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "slice"]
    shapes = {eqn.outvars[0].aval.shape[1:] for eqn in slices}
    assert shapes.isdisjoint(kernels) and (3, 37) in shapes
    # No scan sums gradients of A, [3, 3, 24], or of B in a carry.
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scan":
            _, carries, _ = eqns.read_scan(eqn).split(eqn.invars)
            assert {v.aval.shape for v in carries}.isdisjoint({(3, 3, 24), (3, 3, 37)})


def test_a_cache_is_filled_by_one_scan(adapted: Any) -> None:
    model, params = tiny.decoder(CASE)
    split = model.clone(remat="products:1")
    cache = init_cache(model.config, 2, 24)
    results = [jax.jit(m.apply)({"params": params}, IDS, cache=cache) for m in (model, split)]
    assert_identical(*results)


@pytest.mark.parametrize("remat", ["products:3", "products:0", "products:x", "full:1", "products:"])
def test_a_number_of_layers_is_less_than_all(adapted: Any, remat: str) -> None:
    with pytest.raises(ValueError, match=f"no remat policy '{remat}' for 3 layers.*from 1 to 2"):
        gradient(adapted, remat)


KERNELS = {"splash": Splash(block=128, interpret=True), "flash": Flash()}


def step_of(adapted: Any, remat: bool | str, kernel: Any) -> Any:
    """The loss and the gradient of A and B, on a row of 128 tokens."""
    model = Decoder(tiny.config(CASE), remat=remat, attention=kernel)
    forward = lj.adapt(lambda params, ids: model.apply({"params": params}, ids))
    trained, base = adapted
    ids = jnp.arange(128)[None] * 7 % 61
    loss = lambda trained: jnp.mean(forward(lj.join(trained, base), ids) ** 2)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))


@over("name", KERNELS, often=["flash"])
def test_what_a_kernel_returns_is_kept(adapted: Any, name: str, monkeypatch: Any) -> None:
    """Its forward pass runs once a layer, not twice: the difference is its work, exactly."""
    monkeypatch.setattr(flash, "missing_compiler", lambda: None)
    flops = {
        remat: count_flops(step_of(adapted, remat, KERNELS[name]).trace(adapted[0]).jaxpr).flops
        for remat in (False, "attention", True)
    }
    layers, heads, size = 3, tiny.SIZES["num_attention_heads"], tiny.SIZES["head_dim"]
    assert flops[False] < flops["attention"] < flops[True]
    assert flops[True] - flops["attention"] == layers * 4 * heads * size * 128**2


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_keeping_it_changes_no_value(adapted: Any, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flash, "missing_compiler", lambda: None)
    monkeypatch.setattr(flash_call, "_run_triton", run_plain)
    steps = [step_of(adapted, remat, KERNELS[name])(adapted[0]) for remat in ("attention", False)]
    assert_close(*steps, 1e-6)
