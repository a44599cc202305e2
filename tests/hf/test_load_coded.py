"""Kernels that are read as codes: those of the whole tree in codes, a layer in memory at a time."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.hf import load
from lora_jax.hf.load import param_shapes
from lora_jax.models import ConfigError, from_pretrained, key_table, kinds, save_pretrained
from lora_jax.models.pretrained import open_source
from lora_jax.quantized import QuantizeWarning, QuantRule, dequantize, is_coded, quantize
from tests.hf import trees
from tests.hf.test_gguf import write
from tests.models import tiny
from tests.support import over
from tests.train.tiny import decoder

UP = "model/layers/mlp/up_proj/kernel"


def leaves(params: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_coded)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in found}


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def written(case: str) -> Path:
        tiny.write_folder(tmp_path, case, trees.decoder(case)[1])
        return tmp_path

    return written


@over(("case", "format"), [("llama3", "nf4"), ("qwen3 moe", "int8")], often=[], called=", ".join)
def test_codes_are_those_of_the_tree(case: str, format: str, folder: Any) -> None:
    where = folder(case)
    model, plain = from_pretrained(where)
    _, coded = from_pretrained(where, quantize=format)
    assert_same(coded, quantize(plain, format, kinds=kinds(model.config)))
    found = leaves(coded)
    assert found[next(path for path in found if "up_proj" in path)].format.name == format
    still = {path for path, leaf in found.items() if not is_coded(leaf)}
    assert any("embed" in path for path in still) and any("norm" in path for path in still)
    assert not any("experts" in path for path in still)
    assert_same(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), coded),
        param_shapes(key_table(model.config), jnp.float32, format),
    )


@pytest.mark.slow
def test_rules_say_which_kernels(folder: Any) -> None:
    rules = [QuantRule(targets=["mlp"], format="int8"), QuantRule(targets=["q_proj"])]
    where = folder("llama3")
    _, coded = from_pretrained(where, quantize=rules, param_dtype=jnp.bfloat16)
    formats = {p.split("/")[-2]: x.format.name for p, x in leaves(coded).items() if is_coded(x)}
    assert formats == {
        "q_proj": "nf4", "gate_proj": "int8", "up_proj": "int8", "down_proj": "int8"
    }  # fmt: skip
    assert leaves(coded)[UP].dtype == jnp.bfloat16
    assert_same(
        leaves(coded)[UP].arrays, leaves(from_pretrained(where, quantize="int8")[1])[UP].arrays
    )


@pytest.mark.slow
def test_a_layer_is_read_at_a_time(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = load._read_box

    def part(source: Any, row: Any, box: Any, dtype: Any) -> Any:
        if row.path == UP:
            read.append(len(box[0]))
        return original(source, row, box, dtype)

    monkeypatch.setattr(load, "_read_box", part)
    where = folder("llama3")
    from_pretrained(where, quantize="nf4")
    assert read == [1, 1, 1]
    from_pretrained(where)
    assert read == [1, 1, 1, 3], "without codes, all layers are read at once"


@pytest.mark.slow
def test_codes_lie_on_a_mesh_as_the_kernel_does(folder: Any) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        whole = len(shape) < 2 or shape[-2] % 2 or shape[-1] % 2
        spec = [None] * len(shape) if whole else [*[None] * (len(shape) - 2), "x", "y"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    where = folder("llama3")
    _, alone = from_pretrained(where, quantize="nf4")
    _, placed = from_pretrained(where, quantize="nf4", sharding=place)
    assert_same(placed, alone)
    split = 0
    for leaf in filter(is_coded, leaves(placed).values()):
        codes = leaf.arrays["codes"]
        assert codes.sharding.is_equivalent_to(place("", codes.shape), codes.ndim)
        assert all(array.sharding.mesh == mesh for array in leaf.arrays.values())
        split += codes.addressable_shards[0].data.size < codes.size
    assert split > 3


@pytest.mark.parametrize("kind", ["Q4_0", pytest.param("Q8_0", marks=pytest.mark.slow)])
def test_the_codes_of_a_file_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    model, params = decoder(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )
    path = tmp_path / "model.gguf"
    write(path, model.config, params, kind)
    again, plain = from_pretrained(path)
    _, coded = from_pretrained(path, quantize="stored")
    assert leaves(coded)[UP].format.name == kind.lower()
    assert_same(dequantize(coded), plain)
    shapes = param_shapes(key_table(again.config), jnp.float32, "stored", open_source(path))
    assert_same(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), coded), shapes)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    alike = NamedSharding(mesh, PartitionSpec(None))
    assert_same(from_pretrained(path, quantize="stored", sharding=lambda *_: alike)[1], coded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_model_runs_over_the_codes_of_a_file(kind: str, tmp_path: Path) -> None:
    model, params = decoder(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )
    path = tmp_path / "model.gguf"
    write(path, model.config, params, kind)
    again, plain = from_pretrained(path)
    _, coded = from_pretrained(path, quantize="stored")
    ids = np.array([[1, 5, 2]], np.int32)
    forward = jax.jit(lj.adapt(again.apply))
    tiny.assert_close(forward({"params": coded}, ids), tiny.run(again, plain, ids), 1e-5)


def test_types_of_a_file_that_do_not_stay_are_named(tmp_path: Path) -> None:
    """As Q4_K_M and Q5_K_M files have them: types that are read as floats, and mixed stacks."""
    model, params = decoder(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )
    path = tmp_path / "model.gguf"
    write(path, model.config, params, "Q5_0")
    said = r"the kernels of this file are Q5_0 \(14\)\. .* Q4_0, "
    with pytest.raises(ConfigError, match=said):
        from_pretrained(path, quantize="stored")
    mixed = {"blk.0.ffn_down.weight": "Q8_0", "blk.1.attn_q.weight": "Q5_1"}
    write(path, model.config, params, lambda name: mixed.get(name, "Q4_0"))
    with pytest.warns(QuantizeWarning, match="2 of 7 kernels are read as floats") as caught:
        _, coded = from_pretrained(path, quantize="stored")
    floats = [path.split("/")[-2] for path, leaf in leaves(coded).items() if not is_coded(leaf)]
    assert {"q_proj", "down_proj"} <= {*floats} and "up_proj" not in floats
    assert re.search(r"lies in Q4_0 \(1\), Q5_1 \(1\)\. Weights of", str(caught[0].message))


def test_what_is_in_no_codes(folder: Any) -> None:
    where = folder("llama3")
    with pytest.raises(ConfigError, match="no kernel of this file is quantized. Choose a format"):
        from_pretrained(where, quantize="stored")
    with pytest.raises(ValueError, match="format='nf5' is unknown. Choose one of"):
        from_pretrained(where, quantize="nf5")
    with pytest.raises(ValueError, match="QuantRule"):
        from_pretrained(where, quantize=[QuantRule(targets=["nothing"])])


@pytest.mark.slow
def test_a_kernel_that_no_blocks_fit_stays_and_is_named(tmp_path: Path) -> None:
    sizes = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=10)  # as llama3's
    model, params = decoder(intermediate_size=131, **sizes)
    path = tmp_path / "model"
    save_pretrained(path, model, params)
    with pytest.warns(QuantizeWarning, match="down_proj/kernel fits no blocks.* of 7"):
        _, coded = from_pretrained(path, quantize="nf4")
    assert not is_coded(leaves(coded)["model/layers/mlp/down_proj/kernel"])
