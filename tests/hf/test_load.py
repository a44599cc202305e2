"""Folders of safetensors: bitwise both ways, and one error for everything that is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from lora_jax.core.paths import flatten_with_paths
from lora_jax.models import (
    ConfigError,
    ModelNotFound,
    WeightsError,
    from_pretrained,
    hf_tensors,
    key_table,
)
from tests.hf.trees import decoder
from tests.models import tiny
from tests.support import over

OFTEN = [  # one of each way that a folder can lie
    *("llama with biases", "smollm2", "qwen3", "gemma3 with every option", "olmo2", "mixtral"),
    *("gpt-oss", "qwen3.5 moe", "phi3", "short longrope"),
]
CASE = "qwen3"  # tied, with norms of its own


@over("case", tiny.CASES, often=OFTEN, rare={*tiny.VARIED} - {*OFTEN})
def test_a_folder_is_read_bitwise(case: str, tmp_path: Path) -> None:
    model, params = decoder(case)
    tiny.write_folder(tmp_path, case, params)
    again, loaded = from_pretrained(tmp_path)
    assert again == model
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert type(loaded) is dict


def test_layouts_are_those_of_hugging_face(tmp_path: Path) -> None:
    """[out, in], one tensor per layer; the parity tests read files that transformers wrote."""
    _, params = decoder("llama3")
    tensors = tiny.write_folder(tmp_path, "llama3", params)
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    got = tensors["model.layers.2.mlp.up_proj.weight"]
    assert got.shape == (37, 24)
    np.testing.assert_array_equal(got, kernel[2].T)
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], params["model"]["embed_tokens"]["embedding"]
    )


@pytest.mark.parametrize("case", ["mistral with a window", "ministral3", "gemma2 without caps"])
def test_files_tell_whether_a_head_is_tied_where_config_does_not(case: str, tmp_path: Path) -> None:
    """Only a head that differs from the embedding is one of its own, as in transformers."""
    _, params = decoder(case)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    tensors = {
        head: np.random.default_rng(3).standard_normal((61, 24), np.float32),
        **tiny.write_folder(tmp_path, case, params),
    }
    fields = {name: x for name, x in tiny.fields(case).items() if name != "tie_word_embeddings"}
    if case != "gemma2 without caps":
        fields = {"model_type": "mistral3", "text_config": fields | {"tie_word_embeddings": False}}
    file, described = tmp_path / "model.safetensors", tmp_path / "config.json"
    described.write_text(json.dumps(fields))
    equal, last = tensors | {head: tensors[table]}, tensors[table].copy()
    last[-1, -1] += 1
    without = {name: x for name, x in tensors.items() if name != head}
    for held in (equal, without, tensors | {head: last}):
        save_file(held, file)
        model, loaded = from_pretrained(tmp_path)
        own = head in held and not np.array_equal(held[head], held[table])
        assert (model.config.tie_word_embeddings, "lm_head" in loaded) == (not own, own)
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], last.T)
    described.write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    if case == "gemma2 without caps":  # what the file says itself counts
        with pytest.raises(WeightsError, match="lm_head.weight differs from model.embed_tokens"):
            from_pretrained(tmp_path)


def test_shards(tmp_path: Path) -> None:
    _, params = decoder(CASE)
    tensors = tiny.write_folder(tmp_path, CASE, params)
    whole = tmp_path / "model.safetensors"
    whole.unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks shards.*model-1.safetensors"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("stored", "dtype", "param_dtype", "expected"),
    [
        (ml_dtypes.bfloat16, jnp.bfloat16, None, jnp.bfloat16),
        (ml_dtypes.bfloat16, jnp.float32, None, jnp.float32),
        (np.float32, jnp.bfloat16, jnp.float32, jnp.float32),
        (np.float16, jnp.float32, None, jnp.float32),
        (np.float32, jnp.bfloat16, None, jnp.bfloat16),
    ],
)
def test_dtypes(stored: Any, dtype: Any, param_dtype: Any, expected: Any, tmp_path: Path) -> None:
    _, params = decoder(CASE)
    tensors = tiny.write_folder(tmp_path, CASE, params)
    save_file({n: t.astype(stored) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    model, loaded = from_pretrained(tmp_path, dtype=dtype, param_dtype=param_dtype)
    assert (model.dtype, model.param_dtype) == (dtype, expected)

    def check(got: jax.Array, want: jax.Array) -> None:
        assert got.dtype == expected
        rounded = np.asarray(want).astype(stored).astype(expected)
        np.testing.assert_array_equal(np.asarray(got), rounded)

    jax.tree.map(check, loaded, params)


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe"])
def test_experts_fused_in_one_tensor(case: str, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and saves them with save_original_format=False."""
    model, params = decoder(case)
    tensors = tiny.write_folder(tmp_path, case, params)
    cfg = model.config
    fused = {
        name: tensor for name, tensor in tensors.items() if f".{cfg.family.mlp_name}." not in name
    }
    for layer in range(cfg.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.{cfg.family.mlp_name}", f"model.layers.{layer}.mlp"
        gate, up, down = (
            np.stack([tensors[f"{ours}.experts.{i}.{name}.weight"] for i in range(cfg.num_experts)])
            for name in cfg.family.expert_names
        )
        fused[f"{theirs}.gate.weight"] = tensors[f"{ours}.gate.weight"]
        fused[f"{theirs}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{theirs}.experts.down_proj"] = down
    save_file(fused, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)
    wrong = f"model.layers.1.{cfg.family.mlp_name}.experts.4.{cfg.family.expert_names[1]}.weight"
    fused["model.layers.1.mlp.experts.gate_up_proj"] = np.zeros((5, 9, 24), np.float32)
    save_file(fused, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=re.escape(wrong)):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("case", "prefix"), [("qwen3", ""), ("qwen3.5", "language_model."), ("gpt-oss", "")]
)
def test_names_of_a_bare_model(case: str, prefix: str, tmp_path: Path) -> None:
    """As transformers' AutoModel saves them: without "model.", and without a head."""
    _, params = decoder(case)
    tensors = tiny.write_folder(tmp_path, case, params, tie_word_embeddings=True)
    head = tensors.pop("lm_head.weight", None)
    bare = {prefix + name.removeprefix("model."): array for name, array in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    _, loaded = from_pretrained(tmp_path)
    rest = {name: part for name, part in params.items() if name != "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, loaded, rest)
    if head is not None:
        tiny.write_folder(tmp_path, case, params, tie_word_embeddings=False)
        save_file(bare, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match="(?s)1 missing, 0 unex.*no head.*ForCausalLM"):
            from_pretrained(tmp_path)
    save_file(bare | tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="under two names"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["glm4 moe", "deepseek v3"])
def test_layers_that_predict_further_tokens_are_left_out(case: str, tmp_path: Path) -> None:
    """Multi-token prediction: layers behind the last one. Within the model, they are an error."""
    model, params = decoder(case)
    tensors = tiny.write_folder(tmp_path, case, params)
    n, more = model.config.num_hidden_layers, np.zeros((3, 5), np.float32)
    names = "eh_proj enorm embed_tokens self_attn.o_proj mlp.experts.0.up_proj shared_head.head"
    further = {f"model.layers.{n}.{name}.weight": more for name in names.split()}
    save_file(tensors | further, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)
    save_file(
        tensors | {f"model.layers.{n - 1}.enorm.weight": more}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=rf"(?s)1 unexpected.*layers.{n - 1}.enorm"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["llama3", "glm4 moe"])
def test_a_bias_of_routers_stays_wide(case: str, tmp_path: Path) -> None:
    """In bf16 it would choose other experts."""
    _, params = decoder(case)
    tiny.write_folder(tmp_path, case, params)
    model, loaded = from_pretrained(tmp_path, dtype=jnp.bfloat16)
    drawn = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, drawn)
    wide = [path for path, leaf in flatten_with_paths(loaded)[0] if leaf.dtype == jnp.float32]
    assert wide == ["model/layers/sparse/mlp/e_score_correction_bias"] * (case == "glm4 moe")


def test_everything_wrong_is_in_one_error(tmp_path: Path) -> None:
    _, params = decoder(CASE)
    tensors = tiny.write_folder(tmp_path, CASE, params)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((37, 24), np.float32)
    tensors["extra"] = np.zeros(2, np.float32)
    wrong = "model.layers.0.self_attn.q_proj.weight"
    tensors[wrong] = np.ascontiguousarray(tensors[wrong].T)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
        from_pretrained(tmp_path)
    text = str(raised.value)
    assert str(tmp_path) in text
    assert "2 missing, 2 unexpected, 1 misshaped" in text
    for line in (
        "missing model.norm.weight [24]",
        "missing model.layers.1.mlp.up_proj.weight [37, 24]",
        "unexpected model.layers.3.mlp.up_proj.weight [37, 24]",
        "unexpected extra [2]",
        f"{wrong} is [24, 60], expected [60, 24]",
    ):
        assert line in text


def test_harmless_extras(tmp_path: Path) -> None:
    _, params = decoder(CASE)
    tensors = tiny.write_folder(tmp_path, CASE, params)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="lm_head.weight differs from model.embed_tokens"):
        from_pretrained(tmp_path)


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json is missing"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.fields(CASE)))
    with pytest.raises(WeightsError, match="neither model.safetensors nor"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**tiny.fields(CASE), "model_type": "t5"}))
    with pytest.raises(ConfigError, match="config.json: model_type 't5' is not supported"):
        from_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="nowhere is neither a file or folder"):
        from_pretrained(tmp_path / "nowhere")


def test_parameters_are_placed_as_asked(tmp_path: Path) -> None:
    _, params = decoder(CASE)
    tiny.write_folder(tmp_path, CASE, params)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    asked: dict[str, tuple[int, ...]] = {}

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        asked[path] = shape
        spec = PartitionSpec(None, None, "tensor")
        return NamedSharding(mesh, spec) if path.endswith("q_proj/kernel") else None

    _, loaded = from_pretrained(tmp_path, sharding=place)
    kernel = loaded["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "tensor")
    assert asked["model/layers/self_attn/q_proj/kernel"] == (3, 24, 60)
    assert len(asked) == len(jax.tree.leaves(params))


def test_writing_checks_the_tree() -> None:
    _, params = decoder(CASE)
    config = tiny.config(CASE)
    del params["model"]["norm"]
    params["more"] = jnp.zeros(3)
    params["model"]["embed_tokens"]["embedding"] = jnp.zeros((24, 61))
    with pytest.raises(WeightsError) as raised:
        list(hf_tensors(params, key_table(config)))
    for line in (
        "missing model/norm/scale",
        "unexpected more",
        "model/embed_tokens/embedding is [24, 61], expected [61, 24]",
    ):
        assert line in str(raised.value)
