"""Checkpoints in codes as their own libraries decode them: compressed-tensors and bitsandbytes."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors import safe_open

from lora_jax.models import from_pretrained, save_pretrained
from lora_jax.models.pretrained import open_source
from tests.hf import shipped
from tests.hf.test_save_codes import contents
from tests.hf.test_stored import fields_of, tensors_of
from tests.models import tiny
from tests.parity import PARITY

pytestmark = PARITY
FIXTURES = Path(__file__).parent / "fixtures"  # see README.md there
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
COMPRESSED = [name for name in shipped.LAYOUTS if name.startswith(("compressed", "w4a16"))]
NF4 = [name for name in shipped.LAYOUTS if name.startswith("nf4")]


def tensors_in(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's files, of torch."""
    held = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}
    return held


def by_compressed_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight in codes, by the scheme that its module has, computed in fp32."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import base
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_targets

    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(fields)
    schemes = {t: scheme for scheme in config.config_groups.values() for t in scheme.targets}
    tensors = tensors_in(folder)
    wide = partial(base.unpack_fp4_from_uint8, dtype=torch.float32)
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        scheme = schemes[match_targets(module, torch.nn.Linear(1, 1), schemes)[0]]
        own = {n.removeprefix(f"{module}."): x for n, x in tensors.items() if n.startswith(module)}
        if own["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            own["weight_scale"] = own["weight_scale"].float()
        format = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        with mock.patch.object(base, "unpack_fp4_from_uint8", wide):
            yield f"{module}.weight", format.decompress(own, scheme)["weight"].float().numpy()


def by_bitsandbytes(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight in codes, in fp32."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = tensors_in(folder)
    for name in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        own = {n.removeprefix(f"{name}."): x for n, x in tensors.items() if n.startswith(name)}
        codes = own.pop(name)
        state = QuantState.from_dict(own, device="cpu")
        state.dtype = torch.float32
        yield name, dequantize_4bit(codes, state).numpy()


def check(folder: Path, theirs: Iterator[tuple[str, np.ndarray]]) -> None:
    source, found = open_source(folder), set()
    for name, want in theirs:
        got = source.read(name)
        np.testing.assert_array_equal(got, want)
        assert np.abs(want).max() > 0.01
        found.add(name)
    assert found == source.coded_names


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_llm_compressor(folder: str) -> None:
    check(FIXTURES / folder, by_compressed_tensors(FIXTURES / folder))


@pytest.mark.parametrize("layout", COMPRESSED)
def test_layouts_of_compressed_tensors(layout: str, tmp_path: Path) -> None:
    fields = fields_of(layout)
    shipped.ship(tmp_path, fields, tensors_of(fields), layout)
    check(tmp_path, by_compressed_tensors(tmp_path))


@pytest.mark.parametrize("layout", NF4)
def test_layouts_of_bitsandbytes(layout: str, tmp_path: Path) -> None:
    fields = fields_of(layout)
    shipped.ship(tmp_path, fields, tensors_of(fields), layout)
    check(tmp_path, by_bitsandbytes(tmp_path))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_folders_of_bitsandbytes(storage: str, tmp_path: Path) -> None:
    """Written here by transformers: codes lie in numbers of the dtype that FSDP asks for."""
    import torch
    import transformers

    fields = fields_of("nf4", num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields)
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "floats")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=storage != "uint8",
        bnb_4bit_quant_storage=storage,
    )
    folder = tmp_path / "codes"
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=how, device_map="cpu", dtype=torch.bfloat16
    ).save_pretrained(folder)
    check(folder, by_bitsandbytes(folder))
    model, params = from_pretrained(folder)
    save_pretrained(tmp_path / "out", model, params, codes_from=folder)
    up = "model.layers.0.mlp.up_proj.weight"
    assert contents(tmp_path / "out")[up] == contents(folder)[up]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert again.get_submodule(up.removesuffix(".weight")).weight.quant_type == "nf4"


@pytest.mark.parametrize("folder", ["fp8-blocks-and-channels", "w4a16-in-groups"])
def test_logits_of_a_folder_with_several_groups(folder: str) -> None:
    """transformers decodes each of its weights as the first group says, so it gets them decoded."""
    import torch
    import transformers

    fields = json.loads((FIXTURES / folder / "config.json").read_text())
    del fields["quantization_config"]
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields), attn_implementation="eager"
    ).float()
    decoded = dict(by_compressed_tensors(FIXTURES / folder))
    state = tensors_in(FIXTURES / folder) | {n: torch.from_numpy(x) for n, x in decoded.items()}
    missing, _ = reference.load_state_dict(state, strict=False)
    assert not missing
    model, params = from_pretrained(FIXTURES / folder)
    tiny.assert_same_logits(model, params, reference)
