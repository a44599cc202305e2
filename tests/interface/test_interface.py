"""The public interface: what earlier releases had is there, and their adapters load."""

import copy
import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.interface.record import interface, missing, names_of_page

HERE = Path(__file__).parent
RECORDS = sorted(HERE.glob("*.json"))


@pytest.fixture(scope="module")
def current():
    return interface()


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_nothing_public_is_removed_or_renamed(record, current):
    lines = missing(json.loads(record.read_text()), current)
    assert lines == [], "CHANGELOG must name these under Removed, with what to write instead"


def test_what_a_change_removes_or_renames_is_named(current):
    changed = copy.deepcopy(current)
    del changed["names"]["lora_jax.lorafy"]
    changed["names"]["lora_jax.swap"] = ["params", "others"]
    changed["names"]["lora_jax.join"] = ["base", "adapter"]
    changed["options"]["sft"].remove("--lr")
    assert missing(current, changed) == [
        "lora_jax.join does not take its parameters in the order adapter, base.",
        "lora_jax.lorafy is missing.",
        "lora_jax.swap has no parameter other.",
        "sft has no --lr.",
    ]


def test_an_addition_is_no_removal(current):
    added = copy.deepcopy(current)
    added["names"]["lora_jax.new"] = []
    added["names"]["lora_jax.lorafy"].append("new")
    added["options"]["sft"].append("--new")
    assert missing(current, added) == []


def test_names_of_a_page():
    text = "| name | what |\n|---|---|\n| `f(a=1)`, `g.h` (or `b=2`) | `not` |\nSee `this`.\n"
    assert names_of_page(text) == {"lora_jax.f", "lora_jax.g.h"}


def two_layers(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


def kernel(shape, start):
    numbers = np.arange(start, start + np.prod(shape), dtype=np.float32)
    return np.cos(numbers).reshape(shape)


# What each release computed with the adapter that it saved: LoRA, and DoRA in bf16.
OUTPUTS = {
    "adapter-0.1.0": [
        [0.14340366423130035, 0.2953452169895172, -0.033649299293756485],
        [-0.26697778701782227, -0.4260142743587494, 0.004545210395008326],
    ],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_adapters_of_earlier_releases_load(name, tmp_path):
    zipfile.ZipFile(HERE / f"{name}.zip").extractall(tmp_path)
    first = {"kernel": kernel((5, 7), 1), "bias": kernel((7,), 2)}
    base = {"first": first, "second": {"kernel": kernel((7, 3), 3)}}
    x = np.sin(np.arange(10, dtype=np.float32)).reshape(2, 5)
    params = lj.load_adapter(tmp_path, base)
    outputs = lj.adapt(two_layers)(params, x)
    np.testing.assert_allclose(outputs, OUTPUTS[name], rtol=0, atol=1e-6)
    assert np.abs(outputs - two_layers(base, x)).max() > 0.1
    assert lj.adapter_info(tmp_path) == {"model": "two layers"}
