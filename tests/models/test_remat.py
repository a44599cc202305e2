"""Rematerialisation of long rows: inputs in the host's memory, MLPs by chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.core import product
from lora_jax.models import Decoder
from lora_jax.models.layers import trunk
from tests.models import tiny
from tests.support import assert_close, draw, equations, over

CASE = "llama with biases"
IDS = jnp.arange(2 * 24).reshape(2, 24) * 7 % 61


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
        ("offload", 4096, 8, 1),
        pytest.param("nothing_saveable", 4096, 8, 2, id="a policy that keeps nothing"),
        pytest.param(True, 4096, 9, 2, id="A is not narrow"),
    ],
)
def test_products_with_a_are_not_computed_again(
    adapted: Any, remat: Any, chunk: int, least: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "CHUNK", chunk)
    monkeypatch.setattr(product, "_NARROW", least)  # of 24 features, and a rank of 3
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
