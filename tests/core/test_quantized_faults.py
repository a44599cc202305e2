"""Kernels that a format cannot hold are named: NaN is an error, lost blocks are a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quantized
from lora_jax.models import from_pretrained
from lora_jax.quantized import QuantizeWarning, encode
from tests.models import tiny
from tests.support import draw

KERNEL = np.array(draw(1, (256, 6)))


def changed(**blocks):
    """The kernel with a value in place of one weight, or a factor of one block."""
    kernel = KERNEL.copy()
    if "weight" in blocks:
        kernel[70, 2] = blocks["weight"]
    kernel[64:128, 2] *= blocks.get("factor", 1)
    return kernel


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["nf4", "nf4-double", "int8"])
def test_what_is_not_finite_is_refused(value, format):
    params = {"fine": {"kernel": KERNEL}, "layers": {"kernel": np.stack([KERNEL] * 2)}}
    params["layers"]["kernel"][1, 3, 4] = value
    with pytest.raises(
        ValueError, match="^'layers/kernel': 1 of its 48 blocks contain a NaN or an"
    ):
        quantized.quantize(params, format)
    with pytest.raises(ValueError, match="^the array: 1 of its 24 blocks contain a NaN"):
        encode(params["layers"]["kernel"][1], format)
    decoded = quantized.dequantize(quantized.quantize({"fine": params["fine"]}, format))
    assert np.isfinite(decoded["fine"]["kernel"]).all()  # the control


LOST = {
    "a scale without a reciprocal": ("nf4", {"weight": 3e38}, "1 of its 24 blocks"),
    "scales far apart": ("nf4-double", {"factor": 300}, "3 of its 24 blocks"),
    "beyond fp16": ("q8_0", {"weight": 1e8}, "1 of its 48 blocks"),
    "below fp16": ("q4_0", {"factor": 1e-9}, "2 of its 48 blocks"),
}


@pytest.mark.parametrize("case", LOST)
def test_blocks_that_are_lost_are_counted(case):
    format, change, counted = LOST[case]
    kernel = changed(**change)
    with pytest.warns(
        QuantizeWarning, match=f"^'up/kernel': {counted} would lose their weights in '{format}'"
    ):
        base = quantized.quantize({"up": {"kernel": kernel}}, format)
    rows = slice(64, 128) if counted[0] != "3" else [*range(64), *range(128, 256)]
    with np.errstate(all="ignore"):
        found = np.asarray(quantized.dequantize(base)["up"]["kernel"])[rows, 2].astype(np.float64)
        exact = kernel[rows, 2].astype(np.float64)
        assert not np.linalg.norm(found - exact) < 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("format", ["nf4", "nf4-double", "int4", "int8", "q8_0", "q4_0"])
def test_blocks_of_other_sizes_are_held(format):
    """The control: no warning where blocks are twenty times larger, or zero, and columns small."""
    kernel = changed(factor=20)
    kernel[:64] *= 0
    kernel[:, 5] *= 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = quantized.quantize({"up": {"kernel": kernel}}, format)
        jax.jit(lambda x: encode(x, format))(changed(weight=jnp.nan))  # a tracer holds no values
    found = quantized.dequantize(base)["up"]["kernel"]
    assert np.linalg.norm(found - kernel) < 0.15 * np.linalg.norm(kernel)


def test_blocks_are_of_the_divisor_that_is_closest_to_the_formats_block():
    """GGUF's blocks have 32 weights; at most twice as many, and at least a quarter, where not."""
    for rows, block in [(992, 32), (65, 13), (128, 32), (44, 44), (469, None)]:
        coding = quantized.coding_of((rows, 3), "q4_0")
        assert (coding and coding.block) == block, rows


@pytest.mark.slow
def test_files_name_the_kernel_and_the_layer(tmp_path):
    model, params = tiny.decoder("smollm2")
    folder = tmp_path / "model"

    def read(change):
        tree = jax.tree.map(np.array, params)
        change(tree["model"]["layers"]["mlp"]["up_proj"]["kernel"])
        tiny.write_folder(folder, "smollm2", tree)
        return from_pretrained(folder, quantize="nf4")

    with pytest.raises(ValueError, match="model/layers/mlp/up_proj/kernel, layer 1: 1 of its"):
        read(lambda kernel: kernel.__setitem__((1, 2, 3), np.nan))
    with pytest.warns(QuantizeWarning, match="^model/layers/mlp/up_proj/kernel: 1 of its"):
        read(lambda kernel: kernel.__setitem__((1, 2, 3), 3e38))
