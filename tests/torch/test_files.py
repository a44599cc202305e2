"""Weights of torch modules in files: memory, parts of tensors, and codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.hf import sources
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import WeightsError
from tests.torch.checks import distance, random_model
from tests.torch.small import IDS

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchConfig, TorchFolder, from_torch  # noqa: E402

LOADING = """
import json, sys
import jax
from safetensors.numpy import load_file
from lora_jax.torch import TorchFolder, from_torch

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

folder = TorchFolder(__import__("pathlib").Path(sys.argv[1]))
len(folder.config.key_rows())  # builds the module
jax.numpy.ones(3).block_until_ready()
for more in (False, True):  # a program that reads the whole file beforehand has a copy more
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    tensors = load_file(sys.argv[1] + "/model.safetensors") if more else {}
    _, params = from_torch(sys.argv[1])
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    print(json.dumps([status("VmHWM") - before, sum(sizes), max(sizes)]))
    del params
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_holds_two_tensors_beyond_what_stays(tmp_path):
    fields = {
        **{"model_type": "llama", "vocab_size": 99, "hidden_size": 512, "intermediate_size": 2048},
        **{"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rows = TorchConfig.from_hf(fields).key_rows()
    tensors = {n: np.zeros(row.hf_shape, np.float32) for row in rows for n in row.hf_names}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, control = map(json.loads, done.stdout.splitlines()[-2:])
    for (grown, total, largest), fits in ((plain, True), (control, False)):
        assert (grown <= total + 2 * largest + 16e6) == fits, (grown, total, largest)


def test_parts_of_tensors_in_files(tmp_path, monkeypatch):
    """Each tensor is joined once; what transformers leaves in the files is left there."""
    random_model("deepseek_v3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, joined = load_file(file), []
    join = TorchFolder._join_parts
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(TorchFolder, "_join_parts", lambda *a: joined.append(a[1]) or join(*a))
    experts = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    up = tensors[experts.format(1, 3)]
    save_file({**tensors, experts.format(61, 0): up}, file)
    _, params = from_torch(tmp_path)
    assert sorted(joined) == sorted(set(joined)) and len(joined) == 3 * 2
    whole = params["model"]["layers"]["0of1from1"]["mlp"]["experts"]["gate_up_proj"]["kernel"]
    np.testing.assert_array_equal(whole[0, 3, :, 16:], up.T)
    save_file({**tensors, experts.format(7, 0): up}, file)
    with pytest.raises(WeightsError, match=r"layers\.7\.mlp"):
        from_torch(tmp_path)
    del tensors[experts.format(1, 3)], tensors[experts.format(1, 3).replace("up", "gate")]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"\[3, 32, 32\].*expected \[4, 32, 32\]"):
        from_torch(tmp_path)


def test_codes_of_files_are_read_as_arrays(tmp_path):
    """FP8 in blocks, as DeepSeek-V3 is shipped: parts of experts, layers in a stack and outside."""
    random_model("deepseek_v3").save_pretrained(tmp_path / "floats")
    file = tmp_path / "floats/model.safetensors"
    tensors = {n: x.bfloat16() for n, x in safetensors_torch.load_file(file).items()}
    coded = dict(tensors)
    for name in [n for n in tensors if re.search(r"(_proj|_a|_b|_mqa)\.weight$", n)]:
        values, (rows, columns) = tensors[name].float(), tensors[name].shape
        scale = 0.5 + torch.rand(-(-rows // 16), -(-columns // 16))
        each = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        codes = (values / each).to(torch.float8_e4m3fn)
        coded |= {name: codes, f"{name}_scale_inv": scale}
        tensors[name] = codes.float() * each
    fields = json.loads((tmp_path / "floats/config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (tmp_path / "fp8").mkdir()
    text = json.dumps(fields | {"quantization_config": fp8})
    (tmp_path / "fp8/config.json").write_text(text)
    before = from_torch(tmp_path / "floats")[1]
    for folder, held in (("floats", tensors), ("fp8", coded)):
        safetensors_torch.save_file(held, tmp_path / folder / "model.safetensors")
    (_, want), (fn, params) = (from_torch(tmp_path / folder) for folder in ("floats", "fp8"))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert {*TorchFolder(tmp_path / "fp8").dtypes.values()} == {"BF16"}
    experts = [x["model"]["layers"]["0of1from1"]["mlp"]["experts"] for x in (params, before)]
    assert (
        distance(experts[0]["gate_up_proj"]["kernel"], experts[1]["gate_up_proj"]["kernel"]) > 1e-3
    )
    assert np.isfinite(jax.jit(fn)(params, IDS)).all() and len(coded) - len(tensors) > 20
    (tmp_path / "fp8/config.json").write_text(text.replace('"fp8"', '"sinq"'))
    with pytest.raises(ConfigError, match="quant_method"):
        from_torch(tmp_path / "fp8")
