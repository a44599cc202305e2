"""Folders whose kernels stay in the codes of the checkpoint that they were read from."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.hf.stored.kept import CodesCheck, rename_modules
from lora_jax.models import WeightsError, from_pretrained, key_table, save_pretrained
from lora_jax.models.pretrained import open_source
from lora_jax.quantized import Coded, dequantize, is_coded
from tests.adapted_trees import with_random_factors
from tests.hf import shipped
from tests.hf.test_gguf import write as write_gguf
from tests.hf.test_load_coded import assert_same
from tests.hf.test_stored import fields_of, tensors_of
from tests.hf.trees import decoder
from tests.models import tiny
from tests.support import lorafied, over

BYTES = dict[str, tuple[str, tuple[int, ...], bytes]]
WHOLE = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4}
MOE = {"rope_parameters": None, **tiny.CASES["qwen3 moe"], **WHOLE, "moe_intermediate_size": 256}


def ship(folder: Path, layout: str, shards: int = 2, **changes: Any) -> Path:
    fields = fields_of(layout, **changes)
    shipped.ship(folder, fields, tensors_of(fields), layout, shards)
    return folder


def contents(folder: Path) -> BYTES:
    """Each tensor's dtype, shape and bytes, by the headers of the files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                start, stop = (8 + size + at for at in entry["data_offsets"])
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[start:stop]
    return found


def arrays_of(folder: Path) -> shipped.Tensors:
    kinds = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
    return {
        name: np.frombuffer(raw, kinds[dtype]).reshape(shape)
        for name, (dtype, shape, raw) in contents(folder).items()
    }


def codes_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def merged(folder: Path, *targets: str, **how: Any) -> tuple[Any, Any, Any]:
    """A model, its tree with an adapter on these kernels, and the merged tree."""
    model, params = from_pretrained(folder, **how)
    tree = with_random_factors(lorafied(params, [lj.LoraRule(targets=[*targets], rank=2)]))
    return model, tree, lj.merge(tree)


@over("layout", shipped.LAYOUTS, often=["gpt-oss"], called=str)
def test_each_layout_is_written_as_it_was_shipped(layout: str, tmp_path: Path) -> None:
    folder, out = ship(tmp_path / "in", layout), tmp_path / "out"
    model, params = from_pretrained(folder)
    save_pretrained(out, model, params, codes_from=folder, max_shard_size=60_000)
    assert contents(out) == contents(folder)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert codes_config(out) == shipped.LAYOUTS[layout].config
    assert_same(from_pretrained(out)[1], params)


@pytest.mark.slow
def test_kernels_that_no_stack_holds(tmp_path: Path) -> None:
    """And experts, whose stacks have two axes; and another dtype of what is in no codes."""
    folder, out = ship(tmp_path / "in", "fp8 blocks, bf16", 1, **MOE), tmp_path / "out"
    model, params = from_pretrained(folder)
    tensors = tensors_of(fields_of("fp8 blocks, bf16", **MOE))
    head, _ = shipped.LAYOUTS["fp8 blocks, bf16"].tensors(
        np.random.default_rng(1), tensors["lm_head.weight"].shape, "lm_head"
    )
    shipped.write(folder / "model.safetensors", arrays_of(folder) | head)
    model, params = from_pretrained(folder)
    assert is_coded(params["lm_head"]["kernel"])
    assert is_coded(params["model"]["layers"]["mlp"]["experts"]["gate_proj"]["kernel"])
    save_pretrained(out, model, params, codes_from=folder, dtype=jnp.float16)
    want, got = contents(folder), contents(out)
    assert got.keys() == want.keys()
    for name in want:
        if want[name][0] == "F32":
            assert got[name][:2] == ("F16", want[name][1])
        else:
            assert got[name] == want[name]
    save_pretrained(folder, model, params, codes_from=folder, overwrite=True)  # in its own place
    assert contents(folder) == want


@pytest.mark.slow
def test_experts_fused_in_one_tensor(tmp_path: Path) -> None:
    """As transformers 5 saves them with save_original_format=False."""
    folder = ship(tmp_path / "in", "compressed fp8 rows", 1, **MOE)
    _, want = from_pretrained(folder)
    held = arrays_of(folder)
    tensors = {name: array for name, array in held.items() if ".experts." not in name}
    for mlp in ("model.layers.0.mlp", "model.layers.1.mlp"):
        for part in ("weight", "weight_scale"):
            gate, up, down = (
                np.stack([held[f"{mlp}.experts.{i}.{name}.{part}"] for i in range(5)])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            end = part.removeprefix("weight")
            tensors[f"{mlp}.experts.gate_up_proj{end}"] = np.concatenate([gate, up], axis=1)
            tensors[f"{mlp}.experts.down_proj{end}"] = down
    shipped.write(folder / "model.safetensors", tensors)
    model, params = from_pretrained(folder)
    assert_same(params, want)
    save_pretrained(tmp_path / "out", model, params, codes_from=folder)
    assert contents(tmp_path / "out") == contents(folder)


@over("layout", ["compressed fp8 rows", "nf4 nested"], often=["compressed fp8 rows"])
def test_a_bare_model_gets_its_prefix(layout: str, tmp_path: Path) -> None:
    """Tensors in codes, and what config.json says of them, have the names of all others."""
    folder, out = ship(tmp_path / "in", layout, 1, tie_word_embeddings=True), tmp_path / "out"
    whole = contents(folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'"model.', b'"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    config = json.loads((folder / "config.json").read_text())
    if (codes := config["quantization_config"])["quant_method"] == "compressed-tensors":
        codes["ignore"] = ["layers.7.mlp.up_proj", "re:.*lm_head", "re:^layers[.]8", "lm_head"]
        codes["config_groups"]["group_0"]["targets"] = ["Linear", "layers.0.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    model, params = from_pretrained(folder)
    save_pretrained(out, model, params, codes_from=folder)
    assert contents(out) == {name: x for name, x in whole.items() if name != "lm_head.weight"}
    if codes["quant_method"] == "compressed-tensors":
        ignored = ["model.layers.7.mlp.up_proj", "re:.*lm_head", r"re:(?:.*\.)?(?:layers[.]8)"]
        assert codes_config(out)["ignore"] == [*ignored, "lm_head"]
        targets = codes_config(out)["config_groups"]["group_0"]["targets"]
        assert targets == ["Linear", "model.layers.0.mlp.up_proj"]
    assert_same(from_pretrained(out)[1], params)


@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head|layers[.]8",
        "^lm_head|^layers[.]8[.]",
        "(^lm_head|layers[.]9)[^.]*$",
        ".*lm_head|layers[.]8",
        ".*(lm_head|[|]other)",
        "(?i)LAYERS[.]8[.]|lm",
        r"(layers)[.]8[.]x\1",
    ],
)
def test_a_pattern_matches_the_same_modules_behind_a_prefix(pattern: str) -> None:
    config = {"quant_method": "compressed-tensors", "ignore": [f"re:{pattern}"]}
    (after,) = rename_modules(config, lambda name: f"model.{name}")["ignore"]
    for name in (
        "lm_head",
        "lm_head_x",
        "layers.8.up",
        "layers.8.xlayers",
        "layers.9",
        "alayers.8",
    ):
        matches = re.match(pattern, name) is not None
        for prefix in ("", "model.", "a.model."):
            assert (re.match(after.removeprefix("re:"), prefix + name) is not None) == matches, name


@over("layout", ["fp8 blocks, fp32", "compressed mxfp4", "nf4"], often=[])
def test_merged_kernels_are_listed(layout: str, tmp_path: Path) -> None:
    folder, out = ship(tmp_path / "in", layout), tmp_path / "out"
    model, _, tree = merged(folder, "o_proj")
    save_pretrained(out, model, tree, codes_from=folder, dtype=jnp.bfloat16)
    want, got = contents(folder), contents(out)
    changed = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    for name in want:
        if not name.startswith(tuple(changed)) and want[name][0] != "F32":
            assert got[name] == want[name]
    kernels = [name for name in got if name.startswith(tuple(changed))]
    assert sorted(kernels) == [f"{name}.weight" for name in changed]
    assert {got[name][0] for name in kernels} == {"BF16"}
    config, before = codes_config(out), shipped.LAYOUTS[layout].config
    field, kept = {
        "fp8 blocks, fp32": ("modules_to_not_convert", [*changed, "lm_head"]),
        "compressed mxfp4": ("ignore", ["lm_head", *changed]),
        "nf4": ("llm_int8_skip_modules", [*changed, "lm_head"]),
    }[layout]
    assert config == {**before, field: kept}
    again = from_pretrained(out, dtype=jnp.bfloat16)[1]
    kernel = again["model"]["layers"]["self_attn"]["o_proj"]["kernel"]
    merge = tree["model"]["layers"]["self_attn"]["o_proj"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel, merge)
    codes = again["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert_same(codes.arrays, tree["model"]["layers"]["mlp"]["up_proj"]["kernel"].arrays)


@over(
    ("layout", "target", "with_it"),
    [
        ("fp8 blocks, fp32", "q_proj", ["k_proj", "v_proj"]),
        ("fp8 blocks, fp32", "up_proj", ["gate_proj"]),
        ("fp8 blocks, fp32", "down_proj", []),
        ("experts", "down_proj", ["gate_proj", "up_proj"]),
        ("gptq", "o_proj", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
        ("gpt-oss", "q_proj", []),
    ],
    often=["fp8 blocks, fp32, q_proj"],
    called=lambda case: ", ".join(case[:2]),
)
def test_what_readers_want_in_one_form(
    layout: str, target: str, with_it: list[str], tmp_path: Path
) -> None:
    own = {"layout": "fp8 blocks, fp32", **MOE} if layout == "experts" else {"layout": layout}
    folder = ship(tmp_path / "in", **own)
    model, _, tree = merged(folder, target)
    paths = CodesCheck(tree, key_table(model.config), open_source(folder)).paths_to_dequantize()
    assert sorted(path.split("/")[-2] for path in paths) == sorted(with_it)


@pytest.mark.slow
def test_what_cannot_stay_in_codes_is_refused(tmp_path: Path) -> None:
    folder, out = ship(tmp_path / "in", "fp8 blocks, fp32", num_hidden_layers=1), tmp_path / "out"
    model, params = from_pretrained(folder)
    with pytest.raises(
        WeightsError, match=r"down_proj/kernel is quantized \(fp8\)\. .*codes_from=.*"
    ):
        save_pretrained(out, model, params)
    own = lj.quantized.quantize(dequantize(params), "int8")
    with pytest.raises(WeightsError, match=r"is quantized \(int8\), but differs from"):
        save_pretrained(out, model, own, codes_from=folder)
    kernel = params["model"]["layers"]["self_attn"]["o_proj"]["kernel"]
    scales = kernel.arrays["scales"].at[0, 0, 0].multiply(2)
    other = Coded({**kernel.arrays, "scales": scales}, kernel.format, kernel.dtype)
    params["model"]["layers"]["self_attn"]["o_proj"]["kernel"] = other
    named = r"o_proj/kernel is quantized \(fp8\), but differs from model.layers.0.self_attn"
    with pytest.raises(WeightsError, match=named):
        save_pretrained(out, model, params, codes_from=folder)
    assert not out.exists()


@pytest.mark.slow
def test_what_no_config_can_say_is_refused(tmp_path: Path) -> None:
    folder, out = ship(tmp_path / "in", "fp8 blocks, fp32", 1, **MOE), tmp_path / "out"
    model, tree, whole = merged(folder, "down_proj")
    with pytest.raises(WeightsError, match=r"mlp\.experts is quantized only in part, .*dequantize"):
        save_pretrained(out, model, whole, codes_from=folder)
    write_gguf(tmp_path / "model.gguf", "llama2", decoder("llama2")[1])
    with pytest.raises(WeightsError, match="model.gguf is not a folder with safetensors files"):
        save_pretrained(out, model, whole, codes_from=tmp_path / "model.gguf")
    with pytest.raises(WeightsError, match="is a LoraWeight, not an array"):
        save_pretrained(out, model, tree, codes_from=folder)
    with pytest.raises(WeightsError, match="codes_from=.*no parameter is quantized"):
        save_pretrained(out, model, dequantize(whole), codes_from=folder)
    gptq = ship(tmp_path / "gptq", "gptq")
    model, _, whole = merged(gptq, "o_proj")
    with pytest.raises(
        WeightsError, match="o_proj.weight is no longer quantized.*gptq cannot describe"
    ):
        save_pretrained(out, model, whole, codes_from=gptq)
    assert not out.exists()


def torch_logits(folder: Path, ids: np.ndarray, **how: Any) -> np.ndarray:
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
        **how,
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.from_numpy(ids).long()).logits.numpy()
    return found


@pytest.mark.parity
@pytest.mark.parametrize(
    ("layout", "own", "targets"),
    [
        ("fp8 blocks, fp32", WHOLE, ["o_proj", "down_proj"]),
        ("fp8 blocks, bf16", MOE, ["q_proj", "k_proj", "v_proj"]),
        ("gpt-oss", {}, ["q_proj", "o_proj"]),
    ],
)
def test_transformers_reads_them(
    layout: str, own: dict[str, Any], targets: list[str], tmp_path: Path
) -> None:
    """As shipped, and with merged kernels in floats."""
    import transformers

    how = transformers.FineGrainedFP8Config if "fp8" in layout else transformers.Mxfp4Config
    folder, out, ids = ship(tmp_path / "in", layout, **own), tmp_path / "out", tiny.tokens(1, 2, 9)
    model, tree, whole = merged(folder, *targets)
    save_pretrained(out, model, lj.strip(tree), codes_from=folder)
    asked = {"quantization_config": how(dequantize=True)}
    base = torch_logits(folder, ids, **asked)
    np.testing.assert_array_equal(torch_logits(out, ids, **asked), base)
    save_pretrained(out, model, whole, codes_from=folder, overwrite=True)
    got = jax.jit(lj.adapt(model.apply))({"params": tree}, ids)
    want = torch_logits(out, ids, **asked)
    assert np.abs(want - base).max() > 0.1
    tiny.assert_close(got, want, 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("own", "targets"),
    [
        (WHOLE, ["o_proj"]),
        (WHOLE, ["q_proj", "down_proj"]),
        (MOE, ["v_proj"]),
        (MOE, ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_transformers_takes_the_list(
    own: dict[str, Any], targets: list[str], tmp_path: Path
) -> None:
    """The modules that it gives FP8 kernels, on a GPU, are those that the files hold in codes."""
    import torch
    import transformers
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
    from transformers.quantizers.base import HfQuantizer

    folder, out = ship(tmp_path / "in", "fp8 blocks, fp32", **own), tmp_path / "out"
    model, _, tree = merged(folder, *targets)
    save_pretrained(out, model, tree, codes_from=folder)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(out)
        empty = transformers.AutoModelForCausalLM.from_config(config)
    how = transformers.FineGrainedFP8Config(**codes_config(out))
    kept = HfQuantizer.get_modules_to_not_convert(empty, how.modules_to_not_convert)
    replace_with_fp8_linear(empty, kept, how, pre_quantized=True)
    is_fp8 = {n for n, m in empty.named_modules() if type(m) is FP8Linear or "FP8" in str(type(m))}
    codes = {name.removesuffix(".weight") for name, x in contents(out).items() if x[0] == "F8_E4M3"}
    assert is_fp8 == {
        name.partition(".experts")[0] + ".experts" * (".experts" in name) for name in codes
    }
    assert not any(name.split(".")[-1] in targets for name in is_fp8)
