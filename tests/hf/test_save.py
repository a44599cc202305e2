"""Folders that we write: read back bitwise, and by transformers; whole or not there at all."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open

import lora_jax as lj
from lora_jax import folders
from lora_jax.hf import load, save
from lora_jax.models import (
    WeightsError,
    from_pretrained,
    hf_tensors,
    key_table,
    load_tokenizer,
    save_pretrained,
)
from tests.hf.trees import decoder
from tests.models import tiny
from tests.support import array, but_rarely, lorafied, over, thorough, with_random_factors

CASE = "qwen3"  # tied, with norms of its own
INDEX = "model.safetensors.index.json"
# Of names that every family has; the layers of a stack differ in rank.
RULES = [
    lj.LoraRule(targets="all-linear", layers=[1], rank=3, alpha=5),
    lj.LoraRule(targets="all-linear", rank=2, alpha=3),
]


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def check(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, got, want)


def cast(model: Any, params: Any, dtype: Any) -> Any:
    """The tree in a dtype, but for what a family keeps in fp32."""
    rows = {row.path: row for row in key_table(model.config)}

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.astype(rows[name].dtype_of(dtype))

    return jax.tree.map_with_path(one, params)


# Each family in one of these, each of these with several families.
KEPT = [(jnp.float32, 3000), (jnp.bfloat16, 10**9), (jnp.float16, 3000)]


OFTEN = {"llama3", "qwen3", "mixtral", "qwen3 moe with every option", "gemma3", "phi3"}


@over(
    ("case", "kept"),
    zip(tiny.CASES, itertools.cycle(KEPT), strict=False),
    often=OFTEN,
    called=lambda case: case[0],
)
def test_what_is_saved_loads_bitwise(case: str, kept: tuple[Any, int], tmp_path: Path) -> None:
    dtype, max_shard_size = kept
    model, params = decoder(case)
    params = cast(model, params, dtype)
    save_pretrained(tmp_path / "out", model, params, max_shard_size=max_shard_size)
    again, loaded = from_pretrained(tmp_path / "out", dtype=dtype)
    assert again.config == model.config
    same(loaded, params)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == np.dtype(dtype).name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_all_files_follow_the_umask(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "out", *decoder(CASE))
    (tmp_path / "file").touch()
    modes = {p.stat().st_mode for p in [*(tmp_path / "out").iterdir(), tmp_path / "file"]}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_another_dtype_is_rounded_once(dtype: Any, tmp_path: Path) -> None:
    model, params = decoder(CASE)
    save_pretrained(tmp_path / "out", model, params, dtype=dtype)
    _, loaded = from_pretrained(tmp_path / "out", dtype=dtype)
    same(loaded, jax.tree.map(lambda x: x.astype(dtype), params))


def test_the_config_names_the_dtype_of_most_parameters(tmp_path: Path) -> None:
    model, params = decoder(CASE)
    halves = jax.tree.map_with_path(
        lambda path, x: x if "norm" in jax.tree_util.keystr(path) else x.astype(jnp.bfloat16),
        params,
    )
    save_pretrained(tmp_path / "out", model, halves)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == np.float32
        assert file.get_tensor("model.embed_tokens.weight").dtype == jnp.bfloat16


def test_shards_are_as_large_as_asked(tmp_path: Path) -> None:
    model, params = decoder(CASE)
    out = tmp_path / "a/b/out"  # parents are made
    save_pretrained(out, model, params, max_shard_size=8000)
    index = json.loads((out / INDEX).read_text())
    tensors = dict(hf_tensors(params, key_table(model.config)))
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 3
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert sorted(p.name for p in out.glob("*.safetensors")) == files
    sizes = dict.fromkeys(files, 0)
    for name, file in index["weight_map"].items():
        sizes[file] += tensors[name].nbytes
    assert max(sizes.values()) <= 8000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.size for t in tensors.values())
    # A tensor that is larger than the limit gets a file of its own.
    save_pretrained(out, model, params, max_shard_size=1, overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == len(tensors)
    same(from_pretrained(out)[1], params)


def split(mesh: Mesh, shape: tuple[int, ...], *names: str) -> NamedSharding:
    """Each name on the first axis from the back that it divides."""
    spec: list[str | None] = [None] * len(shape)
    for name in names:
        for axis in reversed(range(len(shape))):
            if spec[axis] is None and shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def meshes() -> dict[str, Mesh]:
    return {
        "explicit": jax.make_mesh((2, 2), ("a", "b")),
        "auto": Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")),
        # Three layers on three devices.
        "layers": Mesh(np.array(jax.devices()[:3]), ("layers",)),
    }


def placement(kind: str) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    mesh = meshes()[kind]
    if kind == "layers":
        return lambda _, shape: NamedSharding(
            mesh, PartitionSpec("layers" if shape[0] == 3 else None)
        )
    return lambda path, shape: split(mesh, shape, *("ab" if len(path) % 2 else "ba"))


@over(
    ("case", "kind"),
    zip(tiny.CASES, itertools.cycle(meshes()), strict=False),
    often=OFTEN,
    called=lambda case: case[0],
    rare={*tiny.VARIED} - OFTEN,
)
def test_sharded_loading_and_saving(case: str, kind: str, tmp_path: Path) -> None:
    model, params = decoder(case)
    save_pretrained(tmp_path / "one", model, params, max_shard_size=5000)
    place = placement(kind)
    _, loaded = from_pretrained(tmp_path / "one", dtype=jnp.bfloat16, sharding=place)
    want = cast(model, params, jnp.bfloat16)
    same(loaded, want)
    divided = 0
    for path, leaf in jax.tree.leaves_with_path(loaded):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.sharding == place(name, leaf.shape)
        divided += not leaf.is_fully_replicated
    # Stacks of other numbers of layers are not divided.
    three = any(leaf.shape[0] == 3 for leaf in jax.tree.leaves(params))
    assert divided > 5 or (kind == "layers" and not three)
    save_pretrained(tmp_path / "two", model, loaded)
    same(from_pretrained(tmp_path / "two", dtype=jnp.bfloat16)[1], want)


def test_a_devices_part_is_read_alone_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = decoder("llama2")
    save_pretrained(tmp_path / "out", model, params)
    read: dict[str, list[tuple[int, ...]]] = {}
    part = load._read_box

    def watched(source: Any, row: Any, *args: Any) -> np.ndarray:
        out = part(source, row, *args)
        read.setdefault(row.path, []).append(out.shape)
        return out

    monkeypatch.setattr(load, "_read_box", watched)
    place = placement("auto")
    from_pretrained(tmp_path / "out", sharding=place)
    for row in key_table(model.config):
        shape = place(row.path, row.stacked_shape).shard_shape(row.stacked_shape)
        n = np.prod(row.stacked_shape) // np.prod(shape)
        assert read[row.path] == [shape] * n
    assert read["model/layers/mlp/up_proj/kernel"] == [(3, 12, 37)] * 2
    assert read["model/layers/self_attn/q_proj/kernel"] == [(3, 12, 12)] * 4


def test_an_axis_that_does_not_divide_is_named(tmp_path: Path) -> None:
    model, params = decoder(CASE)
    save_pretrained(tmp_path / "out", model, params)
    everywhere = NamedSharding(meshes()["auto"], PartitionSpec("a"))
    with pytest.raises(
        ValueError, match=r"model/embed_tokens/embedding of shape \[61, 24\] cannot be sharded"
    ):
        from_pretrained(tmp_path / "out", sharding=lambda *_: everywhere)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_merged_tree_is_rounded_once(dtype: Any, tmp_path: Path) -> None:
    model, params = decoder(CASE)
    params = jax.tree.map(lambda x: array(x, dtype), params)
    rules = [dataclasses.replace(rule, targets=["q_proj"]) for rule in RULES]
    adapted = with_random_factors(lorafied(params, rules))
    save_pretrained(tmp_path / "out", model, lj.merge(adapted))
    _, loaded = from_pretrained(tmp_path / "out", dtype=dtype)
    weight = adapted["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    exact = weight.replace(base=weight.base.astype(jnp.float32)).merged()
    got = loaded["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(exact.astype(dtype)))
    change = np.asarray(got, np.float32) - np.asarray(weight.base, np.float32)
    assert np.abs(change).max() > 0.1


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, params = decoder(CASE)
    out = tmp_path / "out"
    with pytest.raises(WeightsError) as raised:
        save_pretrained(out, model, jax.eval_shape(lambda: lj.lorafy(params, RULES)))
    assert "q_proj/kernel is a LoraWeight, not an array" in str(raised.value)
    assert "down_proj/kernel" in str(raised.value)
    assert "lora_jax.merge(params)" in str(raised.value)
    with pytest.raises(WeightsError, match="missing model/norm/scale\n  unexpected params/model"):
        save_pretrained(out, model, {"params": params})
    with pytest.raises(WeightsError, match="float32.*another dtype(.|\n)*: int8"):
        save_pretrained(out, model, params, dtype=jnp.int8)
    scale = params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"].copy()
    scale[3] = 1e5
    with pytest.raises(WeightsError, match="model.norm.weight has values beyond.*float16"):
        save_pretrained(out, model, params, dtype=jnp.float16)
    assert list(tmp_path.iterdir()) == []
    scale[3] = np.inf
    save_pretrained(out, model, params, dtype=jnp.float16)


@pytest.mark.parametrize(
    ("module", "step"),
    [(save, "write_tensors"), (save, "_write_json"), (folders, "replace_folder")],
)
def test_an_interrupted_save_leaves_what_was_there(
    module: ModuleType, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = decoder(CASE)
    out = tmp_path / "out"
    seen = []

    def interrupted(*args: Any, **_: Any) -> None:
        seen.extend(p.name for p in tmp_path.iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(out, model, params)
    assert seen == [".out.partial"]
    assert list(tmp_path.iterdir()) == []

    (tmp_path / ".out.partial").mkdir()  # as a kill leaves it
    (tmp_path / ".out.partial/model-00007-of-00009.safetensors").write_bytes(b"half")
    save_pretrained(out, model, params)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    more = jax.tree.map(lambda x: x + 1, params)
    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(out, model, more, overwrite=True)
    same(from_pretrained(out)[1], params)
    save_pretrained(out, model, more, overwrite=True)
    same(from_pretrained(out)[1], more)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    model, params = decoder(CASE)
    out = tmp_path / "out"
    save_pretrained(out, model, params)
    with pytest.raises(
        FileExistsError, match="out already exists. Name another folder, or pass overwrite"
    ):
        save_pretrained(out, model, params)
    (out / "config.json").rename(out / "thesis.tex")
    with pytest.raises(FileExistsError, match="not the folder of a model"):
        save_pretrained(out, model, params, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not the folder of a model"):
        save_pretrained(tmp_path / "file", model, params, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", model, params, overwrite=True)
    same(from_pretrained(tmp_path / "empty")[1], params)


def test_tokenizers(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    model, params = decoder(CASE)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    tokenizer.chat_template = "{{ messages[0].content }}"
    first, second = tmp_path / "first", tmp_path / "second"
    save_pretrained(first, model, params, tokenizer=tokenizer)
    save_pretrained(second, model, params, tokenizer=first)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for folder in (first, second):
        again = load_tokenizer(folder)
        assert again("b a c").input_ids == [1, 0, 2]
        assert again.chat_template == tokenizer.chat_template
    # A folder may be its own source.
    save_pretrained(first, model, params, tokenizer=str(first), overwrite=True)
    assert load_tokenizer(first)("b").input_ids == [1]
    bare = tmp_path / "bare"
    save_pretrained(bare, model, params)
    with pytest.raises(FileNotFoundError, match="bare contains neither a tokenizer"):
        save_pretrained(tmp_path / "out", model, params, tokenizer=bare)
    assert not (tmp_path / "out").exists()


def in_transformers(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of the folder's model, which has to load without a remark."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.float().numpy()


@thorough
@pytest.mark.parity
@pytest.mark.parametrize("case", list(tiny.CASES))
def test_transformers_reads_it(case: str, tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, case, decoder(case)[1])
    model, params = from_pretrained(tmp_path)
    save_pretrained(tmp_path / "out", model, params, max_shard_size=5000)
    ids = tiny.tokens(1, 2, 11)
    tiny.assert_close(in_transformers(tmp_path / "out", ids), tiny.run(model, params, ids))


@pytest.mark.parity
@pytest.mark.parametrize("case", but_rarely(tiny.CASES, *tiny.VARIED))
def test_transformers_reads_a_merged_export(case: str, tmp_path: Path) -> None:
    model, params = decoder(case)
    rules = RULES
    if model.config.linear_layers:  # a layer a stack, and transformers computes them in fp32
        rules = [
            lj.LoraRule(targets="all-linear", exclude=["linear_attn", "self_attn"], rank=2, alpha=3)
        ]
    elif model.config.first_k_dense_replace:  # its dense stack may have one layer
        rules = RULES[1:]
    adapted = with_random_factors(lorafied(params, rules))
    save_pretrained(tmp_path / "out", model, lj.merge(adapted), max_shard_size=5000)
    ids = tiny.tokens(1, 2, 11)
    got = in_transformers(tmp_path / "out", ids)
    forward = jax.jit(lj.adapt(model.apply), compiler_options=tiny.FAST_COMPILE)
    tiny.assert_close(got, forward({"params": adapted}, ids))
    adapter, base = lj.split(adapted)
    adapter = {path: parts | {"b": np.zeros_like(parts["b"])} for path, parts in adapter.items()}
    plain = np.asarray(forward({"params": lj.join(adapter, base)}, ids))
    assert np.abs(got - plain).max() > 0.1
