"""Checkpoints of compressed-tensors whose modules lie in codes of different kinds."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import lora_jax as lj
from lora_jax.hf.stored.methods import Targets
from lora_jax.hf.stored.tensor import CodeSettings
from lora_jax.models import ConfigError, WeightsError, from_pretrained, save_pretrained
from lora_jax.models.pretrained import open_source
from lora_jax.quantized import is_coded
from tests.hf import shipped
from tests.hf.test_load_coded import leaves
from tests.hf.test_save_codes import codes_config, contents
from tests.hf.test_stored import fields_of, tensors_of
from tests.train.scripts import begun
from tests.train.tiny import write_rows
from train import sft

FIXTURES = Path(__file__).parent / "fixtures"  # see README.md there
MIXED = FIXTURES / "fp8-blocks-and-channels"
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


def test_blocks_and_rows_in_one_checkpoint() -> None:
    source, held = open_source(MIXED), contents(MIXED)
    for name, block in (
        (f"{MLP}.up_proj.weight", (128, 128)),
        (f"{ATTENTION}.q_proj.weight", None),
    ):
        _, shape, raw = held[name]
        codes = np.frombuffer(raw, np.uint8).reshape(shape)
        scales = np.frombuffer(held[f"{name}_scale"][2], np.uint16).astype(np.uint32) << 16
        scales = scales.view(np.float32).reshape(held[f"{name}_scale"][1])
        meant = shipped.e4m3(codes) * shipped.spread(scales, codes.shape, *(block or (1, 10**9)))
        np.testing.assert_array_equal(source.read(name), meant)
    assert held[f"{MLP}.up_proj.weight_scale"][1] == (2, 2)


@pytest.mark.parametrize("folder", sorted(p.name for p in FIXTURES.iterdir() if p.is_dir()))
def test_folders_of_llm_compressor_stay_in_their_codes(folder: str, tmp_path: Path) -> None:
    model, params = from_pretrained(FIXTURES / folder, dtype=jnp.bfloat16)
    coded = {path for path, leaf in leaves(params).items() if is_coded(leaf)}
    assert len(coded) == (6 if folder == "w4a16-in-groups" else 7)
    save_pretrained(tmp_path / "out", model, params, codes_from=FIXTURES / folder)
    assert contents(tmp_path / "out") == contents(FIXTURES / folder)
    assert codes_config(tmp_path / "out") == codes_config(FIXTURES / folder)


@pytest.mark.slow
def test_a_run_trains_over_one(tmp_path: Path) -> None:
    folder = shutil.copytree(MIXED, tmp_path / "model")
    vocabulary = {chr(33 + i): i for i in range(64)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])), eos_token="A", pad_token="A"
    ).save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl")
    args = ["--model", folder, "--dataset", rows, "--output", tmp_path / "run", "--seq-len", 32]
    params = begun(sft.main, *args, "--targets", "q_proj", "--rank", 2)
    assert is_coded(leaves(lj.strip(params))["model/layers/self_attn/q_proj/kernel"])


A, B, C = CodeSettings(block=128), CodeSettings(group=32), CodeSettings()


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        ({"re:.*mlp.*": A, "Linear": B}, A),
        ({"re:.*self_attn.*": A, "Linear": B}, B),
        ({"re:.*self_attn.*": A, "Module": B}, B),
        ({"re:mlp": A, "Linear": B}, B),  # a pattern matches from the beginning
        ({"re:.*up_proj$": A, f"{MLP}.up_proj": B, "Linear": C}, B),
        ({"re:model.*": B, "re:.*up_proj": A}, A),  # in alphabetical order
        ({"re:.*down_proj": A, "Embedding": B}, None),
    ],
)
def test_the_target_that_counts(
    targets: dict[str, CodeSettings], settings: CodeSettings | None
) -> None:
    assert Targets(targets).settings_of(f"{MLP}.up_proj.weight") == settings
    assert Targets(targets).settings_of(f"{MLP}.up_proj.weight_packed") == settings


@pytest.mark.parity
def test_the_target_is_that_of_compressed_tensors() -> None:
    import torch
    from compressed_tensors.utils import match_targets

    rng, linear = random.Random(0), torch.nn.Linear(1, 1)
    parts = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    pool = [*parts, "Linear", "Module", "Embedding", "up_proj", "re:up_proj", "re:.*up_proj"]
    pool += ["re:.*mlp.*", "re:model", "re:^model.*proj$", "re:.*layers.[01].*", "re:lm_head"]
    seen = set()
    for _ in range(500):
        settings = {target: CodeSettings(i) for i, target in enumerate(rng.sample(pool, 5))}
        for name in parts:
            first = match_targets(name, linear, settings)[:1]
            want = settings[first[0]] if first else None
            assert Targets(settings).settings_of(f"{name}.weight") == want
            seen.add(first[0] if first else None)
    assert seen > {None, "Linear", "Module", "re:.*mlp.*", "lm_head"}


def with_groups(folder: Path, groups: list[dict[str, Any]], **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    config["quantization_config"]["config_groups"] = dict(enumerate(groups))
    path.write_text(json.dumps(config))


def group(layout: str, *targets: str) -> dict[str, Any]:
    codes = shipped.LAYOUTS[layout].config["config_groups"]["group_0"]
    return {**codes, "targets": [*targets]}


def test_layers_of_different_groups(tmp_path: Path) -> None:
    """No stack holds both; as arrays, each is what its own group says."""
    folder, other = tmp_path / "a", tmp_path / "b"
    fields = fields_of("compressed fp8 rows")
    meant = shipped.ship(folder, fields, tensors_of(fields), "compressed fp8 rows")
    blocks = shipped.ship(other, fields, tensors_of(fields), "compressed fp8 blocks")
    rows = [tensor for tensor in read(folder).items() if ".layers.1." not in tensor[0]]
    rest = [tensor for tensor in read(other).items() if ".layers.1." in tensor[0]]
    shipped.write(folder / "model.safetensors", dict(rows + rest))
    last = group("compressed fp8 blocks", r"re:model\.layers\.1\..*")
    with_groups(folder, [group("compressed fp8 rows", "Linear"), last])
    with pytest.raises(WeightsError, match="quantized differently"):
        from_pretrained(folder)
    params = from_pretrained(folder, quantize="none")[1]
    up = leaves(params)["model/layers/mlp/up_proj/kernel"]
    for i, weights in enumerate((meant, blocks)):
        want = weights[f"model.layers.{i}.mlp.up_proj.weight"]
        np.testing.assert_array_equal(up[i].T, want)


def read(folder: Path) -> shipped.Tensors:
    kinds = {dtype: kind for kind, dtype in shipped._DTYPES.items()}
    return {
        name: np.frombuffer(raw, np.dtype(kinds[dtype])).reshape(shape)
        for name, (dtype, shape, raw) in contents(folder).items()
    }


@pytest.mark.parametrize(
    ("target", "message"),
    [("re:(", "the target 're:\\(' is not a regular expression"), (3, "the target 3 is a int")],
)
def test_targets_that_are_none(target: Any, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(MIXED, tmp_path / "model")
    with_groups(folder, [group("compressed fp8 rows", target)])
    with pytest.raises(ConfigError, match=message):
        open_source(folder)


def test_a_module_that_no_target_names(tmp_path: Path) -> None:
    """Its shapes decide where one size of blocks is all there is; else it is an error."""
    folder = shutil.copytree(MIXED, tmp_path / "model")
    attention = group("compressed fp8 rows", "re:.*self_attn.*")
    with_groups(folder, [attention, group("compressed fp8 blocks", "re:other")])
    np.testing.assert_array_equal(
        open_source(folder).read(f"{MLP}.up_proj.weight"),
        open_source(MIXED).read(f"{MLP}.up_proj.weight"),
    )
    smaller = group("compressed fp8 blocks", "re:another")
    smaller["weights"] = smaller["weights"] | {"block_structure": [64, 64]}
    with_groups(folder, [attention, smaller, group("compressed fp8 blocks", "re:other")])
    with pytest.raises(
        WeightsError, match=r"up_proj.weight_scale has the shape \[2, 2\], but config.json implies"
    ):
        open_source(folder)
