"""Checkpoints in codes: read as they lie in the file, and meaning what their makers say."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.hf.load import param_shapes
from lora_jax.hf.stored.methods import ConfigCodes
from lora_jax.models import (
    ConfigError,
    DecoderConfig,
    from_pretrained,
    hf_tensors,
    key_table,
    kinds,
)
from lora_jax.models.decoder.experts import IN_CODES
from lora_jax.models.pretrained import open_source
from lora_jax.quantized import Coded, is_coded
from lora_jax.quantized.coded import host_array
from lora_jax.quantized.formats import FP8
from tests.adapted_trees import with_random_factors
from tests.hf import shipped
from tests.hf.test_load_coded import assert_same, leaves
from tests.models import tiny
from tests.support import AS_FOR_USERS, over

# Of blocks of 128, axes of 136, 144, 72 and 264 have a partial one or nothing else; of groups of 64
# and less, 128, 64 and 192 have whole ones.
PARTIAL = {"hidden_size": 136, "intermediate_size": 264, "head_dim": 36, "num_attention_heads": 4}
WHOLE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 4}


def fields_of(layout: str, **changes: Any) -> dict[str, Any]:
    sizes = PARTIAL if "fp8" in layout else WHOLE
    if layout == "gpt-oss":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    case = "gpt-oss" if layout == "gpt-oss" else "llama3"
    return {**tiny.fields(case), **sizes, "num_hidden_layers": 2, **changes}


def tensors_of(fields: dict[str, Any]) -> shipped.Tensors:
    config, rng = DecoderConfig.from_hf(fields), np.random.default_rng(3)
    return {
        name: tiny.draw(rng, name, row.hf_shape)
        for row in key_table(config)
        for name in row.hf_names
    }


@pytest.fixture
def shipped_as(tmp_path: Path) -> Any:
    """(layout, changes of config.json's fields) -> (folder, the weights that its codes mean)."""

    def written(layout: str, shards: int = 2, **changes: Any) -> tuple[Path, shipped.Tensors]:
        fields = fields_of(layout, **changes)
        folder = tmp_path / "model"
        return folder, shipped.ship(folder, fields, tensors_of(fields), layout, shards)

    return written


UP = "model.layers.1.mlp.up_proj"
OUR_UP = "model/layers/mlp/up_proj/kernel"


LINEAR = [layout for layout in shipped.LAYOUTS if layout != "gpt-oss"]


@pytest.mark.parametrize("layout", LINEAR)
def test_numbers_of_each_layout(layout: str, shipped_as: Any) -> None:
    """Bitwise in fp32, as they are read and as they are computed; scales lie in another shard."""
    folder, meant = shipped_as(layout, num_hidden_layers=1)
    source = open_source(folder)
    assert source.coded_names == {name for name in meant if name.endswith("_proj.weight")}
    for name in source.coded_names:
        np.testing.assert_array_equal(source.read(name), meant[name])
        out = np.empty((5, 7), np.float32)
        source.read_into(out, name, (slice(2, 7), slice(3, 10)))
        np.testing.assert_array_equal(out, meant[name][2:7, 3:10])
    up = UP.replace("1", "0") + ".weight"
    coded = source.codes(up, jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda coded: coded.as_array())(coded), meant[up])
    half = jax.jit(lambda coded: coded.as_array())(source.codes(up, jnp.bfloat16))
    np.testing.assert_array_equal(half, meant[up].astype(jnp.bfloat16))


def test_coded_scales_of_long_rows_stay_codes(shipped_as: Any) -> None:
    """Steps are for several rows, or run on from row to row; products are rounded before sums."""
    sizes = {"hidden_size": 1024, "intermediate_size": 384}
    folder, meant = shipped_as("nf4 nested", num_hidden_layers=1, **sizes)
    own = {"xla_backend_optimization_level": 3}  # as for users: without, no product joins a sum
    as_array = jax.jit(lambda coded: coded.as_array(), compiler_options=own)
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    for name, n_steps in ((up, 1), (down, 3)):
        coded = open_source(folder).codes(name, jnp.float32)
        assert coded.arrays["scales"].dtype == np.uint8
        assert coded.arrays["scale_steps"].shape == (len(meant[name]), n_steps)
        np.testing.assert_array_equal(as_array(coded), meant[name])
    held = sum(raw(folder, f"{up}{part}").nbytes for part in ("", ".absmax", ".nested_absmax"))
    assert held < open_source(folder).codes(up, jnp.float32).nbytes <= 1.01 * held


@over("layout", LINEAR, often=["nf4 nested"], called=str)
def test_a_model_keeps_its_codes(layout: str, shipped_as: Any, capsys: Any) -> None:
    folder, meant = shipped_as(layout)
    model, params = from_pretrained(folder, param_dtype=jnp.bfloat16)
    assert "14 kernels stay in the codes" in capsys.readouterr().err
    coded = {path for path, leaf in leaves(params).items() if is_coded(leaf)}
    assert len(coded) == 7 and all(path.endswith("_proj/kernel") for path in coded)
    assert leaves(params)[OUR_UP].dtype == jnp.bfloat16
    table, source = key_table(model.config), open_source(folder)
    shapes = param_shapes(table, jnp.bfloat16, source=source)
    assert_same(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params), shapes)
    _, plain = from_pretrained(folder, quantize="none")
    for name, array in hf_tensors(plain, table):
        np.testing.assert_array_equal(array, meant[name])
    again = from_pretrained(folder, quantize="stored")[1]
    for name, array in hf_tensors(lj.quantized.dequantize(again), table):
        np.testing.assert_array_equal(array, meant[name])


@pytest.mark.parametrize("layout", ["fp8 blocks, fp32", "fp8 static", "gpt-oss"])
def test_shapes_of_a_config_alone(layout: str, shipped_as: Any) -> None:
    folder, _ = shipped_as(layout)
    source, path = open_source(folder), folder / "config.json"
    table = key_table(source.config)
    promised = ConfigCodes(path, json.loads(path.read_text()), table)
    assert promised.coded_names == source.coded_names
    want = param_shapes(table, jnp.float32, source=source)
    assert_same(param_shapes(table, jnp.float32, source=promised), want)


def test_what_a_config_alone_does_not_tell(shipped_as: Any) -> None:
    folder, _ = shipped_as("fp8 blocks, fp32")
    fields, table = fields_of("fp8 blocks, fp32"), key_table(open_source(folder).config)
    codes = shipped.LAYOUTS["fp8 blocks, fp32"].config
    kept = ["model.layers.*.mlp.up", "mlp.gate_proj", "lm_head"]  # the first is no module's name
    fields["quantization_config"] = codes | {"modules_to_not_convert": kept}
    found = ConfigCodes(folder, fields, table).coded_names
    assert f"{UP}.weight" in found and not any("gate_proj" in name for name in found)
    fields["quantization_config"] = shipped.LAYOUTS["nf4"].config
    with pytest.raises(
        ConfigError, match="does not determine the shapes of weights quantized by bitsandbytes"
    ):
        ConfigCodes(folder, fields, table)
    assert ConfigCodes(folder, fields_of("nf4"), table).coded_names == frozenset()


def raw(folder: Path, name: str) -> np.ndarray:
    """The bytes of a tensor, by its file's header."""
    for path in folder.glob("*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + size])
        if name in header:
            start, stop = (8 + size + at for at in header[name]["data_offsets"])
            return np.frombuffer(path.read_bytes()[start:stop], np.uint8)
    raise KeyError(name)


def test_bytes_are_those_of_the_file(shipped_as: Any) -> None:
    folder, _ = shipped_as("fp8 blocks, bf16")
    arrays = leaves(from_pretrained(folder)[1])[OUR_UP].arrays
    codes, scales = (np.asarray(arrays[name])[1].T for name in ("codes", "scales"))
    np.testing.assert_array_equal(codes.view(np.uint8).ravel(), raw(folder, f"{UP}.weight"))
    assert (scales.shape, scales.dtype) == ((3, 2), jnp.bfloat16)
    inverse = np.frombuffer(np.ascontiguousarray(scales).tobytes(), np.uint8)
    np.testing.assert_array_equal(inverse, raw(folder, f"{UP}.weight_scale_inv"))


def test_bytes_of_4_bits_are_those_of_the_file(shipped_as: Any) -> None:
    folder, _ = shipped_as("compressed mxfp4")
    arrays = leaves(from_pretrained(folder)[1])[OUR_UP].arrays
    codes, scales = (np.asarray(arrays[name])[1].T for name in ("codes", "scales"))
    bits = shipped.packed(codes.astype(np.int8) & 15)
    np.testing.assert_array_equal(bits.ravel(), raw(folder, f"{UP}.weight_packed"))
    held = np.ascontiguousarray(scales).view(np.uint8)
    np.testing.assert_array_equal(held.ravel(), raw(folder, f"{UP}.weight_scale"))


@pytest.mark.slow
def test_codes_on_a_mesh(shipped_as: Any) -> None:
    """Codes are sharded as the kernel; scales of partial blocks lie everywhere."""
    folder, _ = shipped_as("fp8 blocks, fp32")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        is_kernel = path.endswith("_proj/kernel")
        return NamedSharding(mesh, PartitionSpec(*([None, "x", "y"] if is_kernel else [])))

    model, alone = from_pretrained(folder)
    _, placed = from_pretrained(folder, sharding=place)
    assert_same(placed, alone)
    kernel = leaves(placed)[OUR_UP]
    assert kernel.arrays["codes"].sharding.spec == PartitionSpec(None, "x", "y")
    assert kernel.arrays["scales"].sharding.is_fully_replicated
    ids = tiny.tokens(1, 2, 5)
    forward = jax.jit(lj.adapt(model.apply))
    want = forward({"params": alone}, ids)
    tiny.assert_close(forward({"params": placed}, ids), want, 1e-5)


@pytest.mark.parity
@over(
    ("layout", "kind"),
    [
        ("fp8 blocks, bf16", "llama"),
        ("fp8 blocks, fp32", "qwen3"),
        ("fp8 blocks, fp16", "qwen3 moe"),
        ("fp8 blocks, fp32", "deepseek v3"),
    ]
    + [(layout, "llama") for layout in LINEAR if "fp8 blocks" not in layout],
    often=["fp8 blocks, bf16, llama", "fp8 blocks, fp32, qwen3", "nf4 nested, llama"],
    called=", ".join,
)
def test_logits_are_those_of_transformers(
    layout: str, kind: str, shipped_as: Any, tmp_path: Path
) -> None:
    """On the weights that the codes mean, which transformers reads as floats."""
    import torch
    import transformers

    own = {} if kind == "llama" else {"rope_parameters": None, **tiny.CASES[kind]}
    folder, meant = shipped_as(layout, **own)
    shipped.plain(tmp_path / "plain", fields_of(layout, **own), meant)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    model, params = from_pretrained(folder)
    tiny.assert_same_logits(model, params, reference)


@pytest.mark.parity
def test_gpt_oss_is_that_of_transformers(shipped_as: Any) -> None:
    """Its own reader of MXFP4, from the same files: weights bitwise, logits closely."""
    import torch
    import transformers

    folder, meant = shipped_as("gpt-oss")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    model, params = from_pretrained(folder)
    found = reference.state_dict()
    for name, array in hf_tensors(lj.quantized.dequantize(params), key_table(model.config)):
        np.testing.assert_array_equal(found[name].numpy(), array)
        np.testing.assert_array_equal(array, meant[name])
    tiny.assert_same_logits(model, params, reference)


@pytest.mark.parity
def test_fp8_is_that_of_transformers() -> None:
    """Every code but NaN, with scales of all magnitudes; whole blocks, all that it can judge."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (256, 384), np.uint8)
    scales = np.exp2(rng.uniform(-100, 100, (2, 3))).astype(np.float32)
    ours = Coded({"codes": codes.view(jnp.float8_e4m3fn), "scales": scales}, FP8, np.float32)
    reader = Fp8Dequantize(SimpleNamespace(quantization_config=SimpleNamespace(dequantize=True)))
    whole = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    theirs = reader._dequantize_one(whole, torch.from_numpy(scales), torch.float32).numpy()
    np.testing.assert_array_equal(host_array(ours), theirs)


def largest_float(hlo: str) -> int:
    """The size of the largest array of floats that lies in memory: none within a fusion does."""
    within = re.sub(r"^%(fused|wrapped)_[^\n]*\{\n.*?^\}$", "", hlo, flags=re.M | re.S)
    shapes = re.findall(r"= (?:f32|f16|bf16)\[([\d,]*)\]", within)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "largest", "all_of_them"),
    [("fp8 blocks, fp32", 136 * 264, 5 * 136 * 264), ("gpt-oss", 64 * 192, 5 * 64 * 192)],
)
def test_a_step_holds_one_kernel_at_most(
    layout: str, largest: int, all_of_them: int, shipped_as: Any
) -> None:
    """In floats, each kernel or each expert by itself. Control: the whole tree as arrays first."""
    folder, _ = shipped_as(layout, num_hidden_layers=2 if layout == "gpt-oss" else 5)
    model, params = from_pretrained(folder, remat=True)
    tree = with_random_factors(
        lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)], kinds=kinds(model.config))
    )
    adapter, base = lj.split(tree)
    ids = tiny.tokens(1, 1, 3)
    assert model.experts == (IN_CODES if layout == "gpt-oss" else "auto")

    def compiled(prepare: Any) -> Any:
        def loss(adapter: Any, base: Any) -> jax.Array:
            params = prepare(lj.join(adapter, base))
            return jnp.sum(lj.adapt(model.apply)({"params": params}, ids) ** 2)

        lowered = jax.jit(jax.value_and_grad(loss)).lower(adapter, base)
        return lowered.compile(AS_FOR_USERS)

    ours, control = compiled(lambda tree: tree), compiled(lj.quantized.dequantize)
    assert largest_float(ours.as_text()) == largest
    assert largest_float(control.as_text()) >= all_of_them
    jax.tree.map(
        lambda a, b: tiny.assert_close(a, b, 1e-5), *(f(adapter, base) for f in (ours, control))
    )
