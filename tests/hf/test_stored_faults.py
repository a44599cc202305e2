"""Checkpoints in codes that are damaged, contradict themselves, or are kept by nobody."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.models import ConfigError, WeightsError, from_pretrained, save_pretrained
from lora_jax.models.pretrained import open_source
from tests.hf import shipped
from tests.hf.test_stored import fields_of, tensors_of

UP = "model.layers.0.mlp.up_proj"
FP8 = "fp8 blocks, fp32"


def held(layout: str, n_layers: int = 1) -> tuple[dict[str, Any], shipped.Tensors]:
    """A checkpoint: the fields of its config.json, and its tensors."""
    fields = fields_of(layout, num_hidden_layers=n_layers)
    made, rng = {}, np.random.default_rng(7)
    for name, array in tensors_of(fields).items():
        if name.endswith("_proj.weight"):
            parts = shipped.LAYOUTS[layout].tensors(rng, array.shape, name.removesuffix(".weight"))
            made |= parts[0]
        else:
            made[name] = array
    return fields | {"quantization_config": shipped.LAYOUTS[layout].config}, made


def replaced(name: str, change: Any) -> Any:
    """A mutation of one tensor; of None, its loss."""

    def mutate(config: Any, tensors: shipped.Tensors) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new

    return mutate


def said(**facts: Any) -> Any:
    """A mutation of what config.json says of the codes."""
    return lambda config, tensors: config["quantization_config"].update(facts)


def of_weights(**facts: Any) -> Any:
    """The same, of a group of compressed-tensors."""

    def mutate(config: Any, tensors: shipped.Tensors) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(facts)

    return mutate


def lost(config: Any, tensors: shipped.Tensors) -> None:
    del config["quantization_config"]


def as_floats(config: Any, tensors: shipped.Tensors) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = np.ones(tensors[name].shape, np.float32)
        del tensors[f"{name}_scale_inv"]


SCALE = f"{UP}.weight_scale_inv"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "no scale": (FP8, replaced(SCALE, lambda x: None), f"{UP}.weight is quantized, .*{SCALE}"),
    "rows of scales lost": (FP8, replaced(SCALE, lambda x: x[:2]), rf"{SCALE} has .*2, .*3, 2"),
    "columns of scales lost": (FP8, replaced(SCALE, lambda x: x[:, :1]), rf"{SCALE} has .*3, 1\]"),
    "scales of integers": (FP8, replaced(SCALE, np.int32), f"{SCALE} has the dtype I32"),
    "another block": (FP8, said(weight_block_size=[64, 64]), r"config.json implies \[5, 3\]"),
    "no square": (FP8, said(weight_block_size=[64, 128]), r"blocks of \[64, 128\]"),
    "no block": (FP8, said(weight_block_size=None), r"implies \[1, 1\]"),
    "nothing said": (FP8, lost, f"{UP}.weight is F8_E4M3, but config.json names no"),
    "floats after all": (FP8, as_floats, "names fp8, but no tensor is quantized"),
    "another method": (FP8, said(quant_method="aqlm"), "quant_method 'aqlm' is not supported"),
    "hqq": (FP8, said(quant_method="hqq"), "'hqq' is not supported. Supported values are fp8, "),
    "another fmt": (FP8, said(fmt="e3m4"), "fmt 'e3m4'"),
    "another method's tensors": (FP8, said(quant_method="mxfp4"), "no tensor is quantized"),
    "bnb's fp4": ("nf4", said(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type 'fp4'"),
    "bnb in 8 bits": ("nf4", said(load_in_4bit=False, load_in_8bit=True), "8-bit bitsandbytes"),
    "bnb's other table": (
        "nf4",
        replaced(f"{UP}.weight.quant_map", lambda x: x + np.float32(1e-6)),
        "quant_map does not contain the values",
    ),
    "bnb's state": (
        "nf4",
        replaced(f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda x: None),
        f"{UP}.weight is quantized.*quant_state",
    ),
    "bnb's state cut": (
        "nf4",
        replaced(f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda x: x[:-9]),
        f"{UP}.weight.quant_state.* lacks shape and blocksize",
    ),
    "bnb's state of other scales": (
        "nf4 nested",
        replaced(
            f"{UP}.weight.quant_state.bitsandbytes__nf4",
            lambda x: np.frombuffer(x.tobytes().replace(b"nested_offset", b"offset"), np.uint8),
        ),
        f"{UP}.weight.quant_state.* lacks nested_blocksize and nested_offset",
    ),
    "fewer nested absmax": (
        "nf4 nested",
        replaced(f"{UP}.weight.nested_absmax", lambda x: x[:-1]),
        "nested_absmax has the shape",
    ),
    "bnb's codes cut": (
        "nf4 nested, in bf16",
        replaced(f"{UP}.weight", lambda x: x[:-1]),
        rf"{UP}.weight is BF16 \[6143, 1\], but the shape .* needs one row of 12288 bytes",
    ),
    "bnb's state of codes in bf16": (
        "nf4 nested, in bf16",
        replaced(f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda x: None),
        f"{UP}.weight is quantized.*quant_state",
    ),
    "fewer absmax": ("nf4", replaced(f"{UP}.weight.absmax", lambda x: x[:-1]), "absmax has the"),
    "order of activations": ("w4a16", of_weights(actorder="group"), "actorder 'group'"),
    "g_idx": (
        "w4a16",
        lambda config, tensors: tensors.update({f"{UP}.weight_g_idx": np.zeros(128, np.int32)}),
        "weight_g_idx: .*in the order of activations",
    ),
    "zeros are promised": ("w4a16", of_weights(symmetric=False), "no file holds its .*zero_point"),
    "three bits": ("w4a16", of_weights(num_bits=3), "num_bits 3"),
    "integers of 8 bits": ("w4a16", of_weights(num_bits=8), "8-bit integer"),
    "another group": ("w4a16", of_weights(group_size=64), r"implies \[192, 2\]"),
    "2:4": ("w4a16", said(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "marlin": ("w4a16", said(format="marlin-24"), "format 'marlin-24'"),
    "act-order": (
        "gptq",
        replaced(f"{UP}.g_idx", lambda x: x[::-1].copy()),
        "g_idx: .* in the order of activations",
    ),
    "gptq of 3 bits": ("gptq", said(bits=3), "bits 3"),
    "gemv": ("awq", said(version="gemv"), "version 'gemv'"),
    "no zeros": ("awq", replaced(f"{UP}.qzeros", lambda x: None), f"{UP}.qweight is.*qzeros"),
    "no second scale": (
        "compressed nvfp4",
        replaced(f"{UP}.weight_global_scale", lambda x: None),
        "weight_global_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_weights_are_read(fault: str, tmp_path: Path) -> None:
    layout, mutate, message = FAULTS[fault]
    config, tensors = json.loads(json.dumps(held(layout)[0])), held(layout)[1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shipped.write(tmp_path / "model.safetensors", tensors)
    assert open_source(tmp_path).coded_names, "as it is, it can be opened"
    mutate(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shipped.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises((ConfigError, WeightsError), match=message):
        open_source(tmp_path)


def test_layers_in_different_forms(tmp_path: Path) -> None:
    """A stack is in the codes of all its layers or in none, and nothing becomes floats unasked."""
    config, tensors = held(FP8, 2)
    tensors[f"{UP}.weight"] = np.ones((264, 136), np.float32)
    del tensors[SCALE]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shipped.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"up_proj.* quantized differently.*none\) to read"):
        from_pretrained(tmp_path)
    _, params = from_pretrained(tmp_path, quantize="none")
    np.testing.assert_array_equal(params["model"]["layers"]["mlp"]["up_proj"]["kernel"][0], 1)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    config, tensors = held(FP8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    shipped.write(path, tensors)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        open_source(tmp_path)


def test_a_tree_in_codes_is_not_saved_as_floats(tmp_path: Path) -> None:
    config, tensors = held(FP8)
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shipped.write(folder / "model.safetensors", tensors)
    model, params = from_pretrained(folder)
    with pytest.raises(WeightsError, match=r"up_proj/kernel is quantized .*dequantize\(params\)"):
        save_pretrained(tmp_path / "saved", model, params)
