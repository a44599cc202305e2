"""The real SmolLM2-135M-Instruct in 8 and 4 bits: its errors, and its GGUF file's own codes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quantized
from lora_jax.core.paths import flatten_with_paths
from lora_jax.hf.packaged import SMOLLM2
from lora_jax.models import from_pretrained, kinds
from tests.support import array, thorough

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path():
    return SMOLLM2.package.local() / SMOLLM2.entry


@pytest.fixture(scope="module")
def loaded(path):
    return from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "mean", "worst", "divergence"),
    [
        ("nf4", 0.097, 0.105, 0.8),
        pytest.param("nf4-double", 0.097, 0.105, 0.8, marks=thorough),
        pytest.param("int4", 0.12, 0.15, 1.5, marks=thorough),
        ("int8", 0.007, 0.008, 0.01),
    ],
)
def test_errors(loaded, name, mean, worst, divergence):
    """‖Ŵ − W‖/‖W‖ of each layer's kernels, and the KL divergence of the predictions, in nats."""
    model, params = loaded
    base = quantized.quantize(params, name, kinds=kinds(model.config))
    exact = dict(flatten_with_paths(params)[0])
    errors = [
        quantized.error_of(jax.tree.map(lambda array: array[layer], leaf), exact[path][layer])  # noqa: B023
        for path, leaf in flatten_with_paths(base, is_leaf=quantized.is_coded)[0]
        if quantized.is_coded(leaf)
        for layer in range(leaf.shape[0])
    ]
    ids = array(np.random.default_rng(0).integers(0, 49152, (2, 48)))
    expected, found = (
        jax.nn.log_softmax(jax.jit(run)({"params": tree}, ids))
        for run, tree in ((model.apply, params), (lj.adapt(model.apply, strict=True), base))
    )
    kl = float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), -1)))
    print(f"{name}: mean {np.mean(errors):.4f}, worst {max(errors):.4f}, KL {kl:.4f} nats")
    assert len(errors) == 7 * 30
    assert 0.8 * mean < np.mean(errors) <= mean and max(errors) <= worst
    assert kl <= divergence


def test_blocks_of_its_file_are_its_kernels(path, loaded):
    """Q4_1, in 5 bits a weight: bitwise what is loaded as fp32."""
    _, params = loaded
    down = params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in (0, 29):
        tensor = tensors[f"blk.{layer}.ffn_down.weight"]
        shape = [int(n) for n in reversed(tensor.shape)]
        coded = quantized.from_gguf(tensor.data, tensor.tensor_type.name, shape)
        turned = jax.tree.map(lambda array: jnp.asarray(array.T), coded)
        np.testing.assert_array_equal(turned.as_array(), down[layer])
        assert turned.nbytes * 8 == 5 * down[layer].size
