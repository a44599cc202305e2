"""Memory of loading and saving SmolLM2-135M, and a model in codes, in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.models import from_pretrained, key_table, read_config, save_pretrained
from tests.hf import shipped
from tests.models import tiny
from tests.support import thorough

pytestmark = pytest.mark.slow

# What a process needs besides: Python, JAX and this library alone come to about 250 MB.
ALLOWANCE = 320e6

# The peak is asked of the kernel for this very program: getrusage would count the memory of the
# process that started it.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lora_jax import models

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder, dtype, sharded, out, in_codes = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", 4)
mesh = Mesh(np.array(jax.devices()), ("fsdp",))

def place(path, shape):
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp"))

model, params = models.from_pretrained(
    folder, dtype=jnp.dtype(dtype), sharding=place if sharded else None
)
sizes = [x.nbytes for x in jax.tree.leaves(params)]
report = {"model": sum(sizes), "largest": max(sizes), "loaded": peak()}
if out:
    models.save_pretrained(out, model, params, codes_from=folder if in_codes else None)
print(json.dumps({**report, "saved": peak()}))
"""


def measure(*arguments: Any) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},  # a TPU's library takes memory of its own
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print({name: f"{value / 1e6:.0f} MB" for name, value in report.items()})
    return report


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of SmolLM2's weights, by the dtype that they are stored in."""
    root = tmp_path_factory.mktemp("smollm2")
    model, params = from_pretrained(SMOLLM2.package.local() / SMOLLM2.entry)
    for dtype in ("float32", "bfloat16"):
        save_pretrained(root / dtype, model, params, dtype=jnp.dtype(dtype))
    return {dtype: str(root / dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("stored", "dtype", "sharded"),
    [
        pytest.param("float32", "float32", False, marks=thorough),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        pytest.param("bfloat16", "bfloat16", False, marks=thorough),
    ],
)
def test_loading(folders: dict[str, str], stored: str, dtype: str, sharded: bool) -> None:
    got = measure(folders[stored], dtype, sharded, None, False)
    assert got["model"] == 134_515_008 * jnp.dtype(dtype).itemsize
    assert got["loaded"] <= got["model"] + got["largest"] + ALLOWANCE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("sharded", [pytest.param(False, marks=thorough), True])
def test_codes(sharded: bool, tmp_path: Path) -> None:
    """Loaded and saved with a layer's codes beyond the model.

    All layers' codes of one kernel take 200 MB, 800 MB in floats; and the one file 600 MB.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 24}
    fields = {**tiny.fields("llama2"), **sizes, "head_dim": 32, "tie_word_embeddings": True}
    codes = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {}
    for row in key_table(read_config(fields)):
        for name in row.hf_names:
            array = np.ones(row.hf_shape, np.float32)
            if name.endswith("_proj.weight"):
                array = np.full(row.hf_shape, 0x38, np.uint8).view(ml_dtypes.float8_e4m3fn)
                blocks = tuple(-(-n // 128) for n in row.hf_shape)
                tensors[f"{name}_scale_inv"] = np.ones(blocks, np.float32)
            tensors[name] = array
    shipped.write(tmp_path / "model.safetensors", tensors)
    config = fields | {"quantization_config": codes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    del tensors
    got = measure(str(tmp_path), "bfloat16", sharded, str(tmp_path / "out"), True)
    assert got["model"] <= 1.01 * (tmp_path / "model.safetensors").stat().st_size
    layer = 3 * 1024 * 8192
    assert got["loaded"] <= got["model"] + layer + ALLOWANCE
    assert got["saved"] <= got["model"] + layer + ALLOWANCE
    sizes = [(tmp_path / part / "model.safetensors").stat().st_size for part in (".", "out")]
    assert abs(sizes[0] - sizes[1]) < 1e-3 * sizes[0]  # norms and embeddings, in bf16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_saving(folders: dict[str, str], tmp_path: Path) -> None:
    """No more than the largest tensor, the embedding's, beyond the parameters."""
    got = measure(folders["bfloat16"], "float32", False, str(tmp_path / "out"), False)
    embedding = 4 * 49152 * 576
    assert (tmp_path / "out/model.safetensors").stat().st_size > embedding + ALLOWANCE
    assert got["saved"] <= got["model"] + embedding + ALLOWANCE
