"""Files that claim more than they hold are errors in words, in bounded time and memory."""

import json
import struct
import time
import tracemalloc
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

from lora_jax import models
from lora_jax.hf.counts import check_counts
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import WeightsError

BILLION = 10**9
FIELDS = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_experts_per_tok": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 16}
CONFIGS = {
    "layers": (FIELDS | {"num_hidden_layers": BILLION}, "num_hidden_layers is 1000000000"),
    "layers of GPT-2": (GPT2 | {"n_layer": BILLION}, "n_layer is 1000000000"),
    "layers of BERT": (
        FIELDS | {"model_type": "bert", "num_hidden_layers": BILLION},
        "are too few",
    ),
    "experts of Mixtral": (
        FIELDS | EXPERTS | {"model_type": "mixtral", "num_local_experts": BILLION},
        "num_local_experts is 1000000000",
    ),
    "experts of Qwen3": (
        FIELDS | EXPERTS | {"model_type": "qwen3_moe", "num_experts": BILLION},
        "num_experts is 1000000000",
    ),
    "a part": (
        {"model_type": "smolvlm", "text_config": FIELDS | {"num_hidden_layers": BILLION}},
        "text_config.num_hidden_layers is 1000000000",
    ),
    "a text": (FIELDS | {"num_hidden_layers": "24"}, "num_hidden_layers .'24'. must be a whole"),
    "a negative number": (
        FIELDS | {"num_hidden_layers": -1},
        "num_hidden_layers .-1. must be a number of layers",
    ),
    "true": (FIELDS | {"num_hidden_layers": True}, "must be a whole number"),
}


@contextmanager
def bounded(seconds=10, n_bytes=50_000_000):
    """Fails if the block takes more time or memory of Python."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.monotonic() - start < seconds
    assert peak < n_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound model's folder."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    model = models.Decoder(models.read_config(FIELDS))
    params = model.init(jax.random.key(0), jnp.array([[1, 2]]))["params"]
    models.save_pretrained(folder, model, params)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the sound folder, to be spoilt."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_count_is_an_error_in_words(name, copy):
    fields, message = CONFIGS[name]
    (copy / "config.json").write_text(json.dumps(fields))
    with bounded(), pytest.raises(ConfigError, match=message) as caught:
        models.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["layers", "experts of Qwen3", "a part"])
def test_a_configuration_alone_is_bounded(name):
    fields, _ = CONFIGS[name]
    with bounded(), pytest.raises(ConfigError, match="No such model is known"):
        models.read_config(fields)


def test_layers_times_experts_are_bounded():
    fields = FIELDS | EXPERTS | {"model_type": "mixtral"}
    with bounded(), pytest.raises(ConfigError, match="make 64000000 experts"):
        models.read_config(fields | {"num_hidden_layers": 8000, "num_local_experts": 8000})


def test_the_index_of_a_layer_may_count_from_the_end():
    """LLaVA and Mistral 3 read the output of a layer of the vision encoder."""
    check_counts({"vision_feature_layer": -1, "text_config": FIELDS})
    with pytest.raises(ConfigError, match="vision_layers .-1. must be a number"):
        check_counts({"vision_layers": -1, "text_config": FIELDS})


def test_large_models_are_read():
    """The control: counts beyond those that need no comparison."""
    assert models.read_config(FIELDS | {"num_hidden_layers": 1000}).num_hidden_layers == 1000


@pytest.mark.parametrize("file", ["..", ".", "", "../model.safetensors", "/etc/passwd", 3])
def test_an_index_names_files_of_its_folder_alone(file, copy):
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": file}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="names no file of its folder|cannot be read"):
        models.from_pretrained(copy)


@pytest.mark.parametrize("has_index", [False, True])
def test_a_folder_in_the_place_of_weights(has_index, copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    if has_index:
        index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is a folder, but must be a file"):
        models.from_pretrained(copy)


def gguf_file(path, value_type, value):
    """Writes a GGUF file with one field, of this type and these bytes."""
    name = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name
    path.write_bytes(head + struct.pack("<I", value_type) + value)
    return path


ARRAY, STRING, UINT8, UINT32 = 9, 8, 0, 4
HUGE = 2**40
GGUF_FIELDS = {
    "array of texts": (ARRAY, struct.pack("<IQ", STRING, HUGE)),
    "array of bytes": (ARRAY, struct.pack("<IQ", UINT8, HUGE)),
    "array of numbers": (ARRAY, struct.pack("<IQ", UINT32, HUGE) + bytes(64)),
    "array of empty texts": (ARRAY, struct.pack("<IQ", STRING, HUGE) + bytes(8000)),
    "array of arrays": (ARRAY, struct.pack("<IQ", ARRAY, HUGE) * 9),
    "text": (STRING, struct.pack("<Q", HUGE)),
    "text of 2^64": (STRING, struct.pack("<Q", 2**64 - 1)),
}


@pytest.mark.parametrize("name", GGUF_FIELDS)
def test_a_gguf_file_claims_more_than_it_holds(name, tmp_path):
    path = gguf_file(tmp_path / "model.gguf", *GGUF_FIELDS[name])
    with bounded(), pytest.raises(WeightsError, match="is damaged or cut short") as caught:
        models.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n_tensors", "n_fields"), [(0, HUGE), (HUGE, 0)])
def test_a_gguf_file_of_countless_entries(n_tensors, n_fields, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + bytes(512))
    with bounded(), pytest.raises(WeightsError, match="is damaged or cut short"):
        models.from_pretrained(path)


def test_a_gguf_file_of_a_billion_layers(tmp_path):
    path = tmp_path / "model.gguf"
    fields = b""
    for name, value_type, value in (
        (b"general.architecture", STRING, struct.pack("<Q", 5) + b"llama"),
        (b"llama.block_count", UINT32, struct.pack("<I", BILLION)),
    ):
        fields += struct.pack("<Q", len(name)) + name + struct.pack("<I", value_type) + value
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + fields)
    with bounded(), pytest.raises(ConfigError, match="block_count is 1000000000"):
        models.from_pretrained(path)
