"""Damaged folders: one error each, which names the file and its damage."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.models import ConfigError, WeightsError, from_pretrained, save_pretrained
from lora_jax.models.pretrained import open_source
from tests.hf.trees import decoder
from tests.models import tiny

CASE = "qwen3"  # tied, with norms of its own
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"

Damage = Callable[[Path], Any]


@pytest.fixture(params=["whole", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(tmp_path, sharded=request.param == "sharded")


def saved(tmp_path: Path, *, sharded: bool, case: str = CASE) -> Path:
    model, params = decoder(case)
    out = tmp_path / "model"
    save_pretrained(out, model, params, max_shard_size=8000 if sharded else 10**9)
    return out


def shard_of(folder: Path, name: str) -> Path:
    if not (folder / INDEX).exists():
        return folder / WHOLE
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def cut(keep: int) -> Damage:
    def damage(folder: Path) -> None:
        path = shard_of(folder, UP)
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def header(change: Callable[[dict[str, Any]], bytes | None], size: int | None = None) -> Damage:
    """Writes the header again, as ``change`` leaves or returns it."""

    def damage(folder: Path) -> None:
        path = shard_of(folder, UP)
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        fields = json.loads(data[8 : 8 + n])
        raw = change(fields) or json.dumps(fields).encode()
        length = struct.pack("<Q", len(raw) if size is None else size)
        path.write_bytes(length + raw + data[8 + n :])

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    """Writes the file again with other tensors in it."""

    def damage(folder: Path) -> None:
        path = shard_of(folder, UP)
        content = load_file(path)
        change(content)
        save_file(content, path)

    return damage


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


# What is wrong -> (how it comes about, the error, what it says; {file} is the one of UP, {name}
# its name).
ANY_FOLDER: dict[str, tuple[Damage, type[Exception], list[str]]] = {
    "empty file": (cut(0), WeightsError, ["{file} is damaged or cut short"]),
    "no whole length": (cut(4), WeightsError, ["{file} is damaged or cut short"]),
    "half a header": (cut(200), WeightsError, ["{file} is damaged or cut short"]),
    "cut short": (cut(-100), WeightsError, ["{file} is damaged or cut short"]),
    "garbage in the header": (
        header(lambda _: b"\xff\x00garbage"),
        WeightsError,
        ["{file} is damaged or cut short"],
    ),
    "an enormous header": (
        header(lambda _: None, 2**60),
        WeightsError,
        ["{file} is damaged or cut short"],
    ),
    "a dtype nobody knows": (
        header(lambda fields: fields[UP].update(dtype="F31")),
        WeightsError,
        ["{file} is damaged or cut short"],
    ),
    "a shape beyond its bytes": (
        header(lambda fields: fields[UP].update(shape=[37, 25])),
        WeightsError,
        ["{file} is damaged or cut short"],
    ),
    "integers in the place of floats": (
        tensors(lambda t: t.update({UP: t[UP].astype(np.int32)})),
        WeightsError,
        ["weights must have one of the dtypes F64, F32, F16, BF16", UP + " is I32 ({file})"],
    ),
    "bytes in the place of floats": (
        header(lambda f: f[UP].update(dtype="I32")),
        WeightsError,
        [UP + " is I32 ({file})"],
    ),
    "no such architecture": (
        config(model_type="t5"),
        ConfigError,
        ["config.json: model_type 't5' is not supported"],
    ),
    "another architecture": (
        config(model_type="llama", use_sliding_window=None, layer_types=None),
        WeightsError,
        [
            "{folder} does not fit the model's configuration: 0 missing, 6 unexpected, 0 misshaped",
            "unexpected model.layers.1.self_attn.q_norm.weight [10]",
        ],
    ),
    "another size": (
        config(intermediate_size=38),
        WeightsError,
        ["0 missing, 0 unexpected, 9 misshaped", UP + " is [37, 24], expected [38, 24]"],
    ),
    "more layers": (
        config(num_hidden_layers=4, layer_types=None),
        WeightsError,
        ["missing model.layers.3.mlp.up_proj.weight [37, 24]"],
    ),
    "a string for a number": (
        config(num_attention_heads="6"),
        ConfigError,
        ["{folder}/config.json has a field of the wrong type"],
    ),
    "no heads": (
        config(num_attention_heads=0, head_dim=None),
        ConfigError,
        ["{folder}/config.json has a field of the wrong type"],
    ),
    "a list for a config": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ConfigError,
        ["config.json holds a list"],
    ),
}


def listing(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Writes the index again, as ``change`` leaves or returns it."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        text = change(index["weight_map"])
        (folder / INDEX).write_text(text if isinstance(text, str) else json.dumps(index))

    return damage


def twice(weight_map: dict[str, str]) -> str:
    lines = [f'"{name}": "{shard}"' for name, shard in [*weight_map.items(), (UP, "b")]]
    return '{"weight_map": {' + ", ".join(lines) + "}}"


def repeat(folder: Path) -> None:
    """The second file holds one of the first's tensors as well."""
    first, second = shard_of(folder, UP), shard_of(folder, "model.norm.weight")
    save_file({**load_file(second), UP: load_file(first)[UP]}, second)


SHARDED: dict[str, tuple[Damage, type[Exception], list[str]]] = {
    "a shard missing": (
        lambda folder: shard_of(folder, UP).unlink(),
        WeightsError,
        ["{folder} lacks shards that model.safetensors.index.json lists: {name}"],
    ),
    "a tensor that its shard lacks": (
        tensors(lambda t: t.pop(UP)),
        WeightsError,
        [INDEX + " names ", " for " + UP, "does not contain it"],
    ),
    "a tensor put in another shard": (
        listing(lambda m: m.update({UP: m["model.norm.weight"]})),
        WeightsError,
        [INDEX + " names ", " for " + UP, "does not contain it"],
    ),
    "a tensor listed twice": (
        listing(twice),
        WeightsError,
        ["{folder}/" + INDEX + " lists more than once: " + UP],
    ),
    "a tensor in two shards": (repeat, WeightsError, ["{name} both contain " + UP]),
    "no JSON": (listing(lambda _: "{"), WeightsError, [INDEX + " cannot be read"]),
    "no map": (listing(lambda _: "{}"), WeightsError, [INDEX + " cannot be read"]),
    "a list for a map": (
        listing(lambda _: '{"weight_map": []}'),
        WeightsError,
        [INDEX + " cannot be read"],
    ),
    "a number for a file": (
        listing(lambda m: m.update({UP: 3})),
        WeightsError,
        [INDEX + " cannot be read"],
    ),
    "another folder's file": (
        listing(lambda m: m.update({UP: "../model.safetensors"})),
        WeightsError,
        [INDEX + " names no file of its folder for " + UP],
    ),
}


def check(folder: Path, damage: Damage, error: type[Exception], texts: list[str]) -> None:
    file = shard_of(folder, UP)
    from_pretrained(folder)
    damage(folder)
    with pytest.raises(error) as raised:
        from_pretrained(folder)
    for text in texts:
        text = text.replace("{file}", str(file)).replace("{folder}", str(folder))
        assert text.replace("{name}", file.name) in str(raised.value)


@pytest.mark.parametrize("what", list(ANY_FOLDER))
def test_damage_is_named(what: str, folder: Path) -> None:
    check(folder, *ANY_FOLDER[what])


@pytest.mark.parametrize("what", list(SHARDED))
def test_an_index_and_its_shards_agree(what: str, tmp_path: Path) -> None:
    check(saved(tmp_path, sharded=True), *SHARDED[what])


@pytest.mark.parametrize(
    ("weights", "configured", "says"),
    [
        ("qwen2", "llama3", "unexpected model.layers.0.self_attn.q_proj.bias"),
        ("llama3", "qwen2", "missing model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "llama3", "missing lm_head.weight"),
        ("llama2", "llama3", "k_proj.weight is [24, 24], expected [20, 24]"),
    ],
)
def test_a_config_of_another_model(
    weights: str, configured: str, says: str, tmp_path: Path
) -> None:
    out = saved(tmp_path, sharded=False, case=weights)
    (out / "config.json").write_text(json.dumps(tiny.fields(configured)))
    with pytest.raises(WeightsError) as raised:
        from_pretrained(out)
    assert f"{out} does not fit" in str(raised.value)
    assert says in str(raised.value)


def test_a_file_that_is_cut_under_the_reader(tmp_path: Path) -> None:
    """An error, where a map of the file would kill the process."""
    out = saved(tmp_path, sharded=False)
    source = open_source(out)
    with (out / WHOLE).open("r+b") as file:
        file.truncate(6000)
    with pytest.raises(WeightsError, match=f"{WHOLE}: model.norm.weight cannot be read"):
        source.read("model.norm.weight")


def test_values_that_are_not_numbers_are_read(tmp_path: Path) -> None:
    """A run that went wrong can be looked into; a tied head may repeat them."""
    out = saved(tmp_path, sharded=False)
    content = load_file(out / WHOLE)
    content["model.embed_tokens.weight"][0] = np.nan
    content[UP][0, 0] = np.inf
    content["lm_head.weight"] = content["model.embed_tokens.weight"].copy()
    save_file(content, out / WHOLE)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = jax.tree.map(np.float32, from_pretrained(out, dtype=dtype)[1])
        layers = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert np.isnan(params["model"]["embed_tokens"]["embedding"][0]).all()
        assert np.isinf(layers[1, 0, 0])
        assert np.isfinite(layers[0]).all()


def test_values_beyond_the_range_of_half_precision(tmp_path: Path) -> None:
    out = saved(tmp_path, sharded=False)
    content = load_file(out / WHOLE)
    content[UP][3, 2] = 7e4
    save_file(content, out / WHOLE)
    with pytest.raises(WeightsError, match=f"{WHOLE}: {UP} has values beyond.*Use bfloat16"):
        from_pretrained(out, dtype=jnp.float16)
    first, *_ = jax.tree.leaves(from_pretrained(out, dtype=jnp.bfloat16)[1])
    assert np.isfinite(np.float32(first)).all()
