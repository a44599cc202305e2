"""Rematerialisation of long rows: inputs in the host's memory, MLPs by chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.models import Decoder
from lora_jax.models.layers import trunk
from tests.models import tiny
from tests.support import assert_close, draw, over

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
    model = Decoder(tiny.config(CASE), remat=remat)
    forward = lj.adapt(lambda params, ids: model.apply({"params": params}, ids))
    trained, base = adapted

    def loss(trained: Any) -> jax.Array:
        return jnp.mean(forward(lj.join(trained, base), IDS) ** 2)

    return jax.jit(jax.value_and_grad(loss))(trained)


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
