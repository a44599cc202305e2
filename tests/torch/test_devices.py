"""Torch modules on several devices, and the plan of their shardings."""

import jax
import numpy as np
import pytest

from lora_jax.hf.fields import read_json_fields
from lora_jax.training import make_mesh
from lora_jax.training.layout import Layout
from tests.torch.small import adapted, loss_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchConfig, from_torch  # noqa: E402


def test_devices_train_as_one_does(llama):
    """Each has its part of the weights."""
    results = []
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[:4], fsdp=2, tensor=2)):
        fields = read_json_fields(llama[0] / "config.json", "a model", ValueError)
        layout = Layout.of(mesh, TorchConfig.from_hf(fields))
        fn, params = from_torch(llama[0], sharding=layout.of_parameter)
        step, adapter = loss_of(layout.constrained(fn), layout.placed(adapted(params)))
        with jax.set_mesh(mesh):
            for _ in range(3):
                loss, gradients = step(adapter)
                adapter = jax.tree.map(lambda x, g: x - 0.5 * g, adapter, gradients)
        results.append((loss, jax.device_get(adapter)))
    (one, alone), (many, together) = results
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), alone, together)
    assert abs(float(one) - float(many)) <= 1e-5
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 16, 24)


def test_a_plan_of_shardings_is_printed(llama):
    lines = []
    from_torch(llama[0], print_plan=lines.append)
    (narrowing,) = [line for line in lines if line.startswith("tensor, ")]
    assert "o_proj/kernel" in narrowing and "q_proj" not in narrowing
