"""Encoders' files: with and without a prefix, with other heads, without the head asked for."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.models import ConfigError, WeightsError, from_pretrained, save_pretrained
from tests.hf.trees import encoder
from tests.models import tiny_encoders

BEGINS = "freshly initialised, unless an adapter brings its own"
FAMILIES = ["bert", "roberta", "xlm-roberta"]
CLASS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
ENDING = {
    "none": "Model",
    "masked_lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
}


def write(folder: Path, case: str, head: str, change: Any = dict) -> tuple[Any, dict[str, Any]]:
    """A folder as transformers writes it for that head; returns parameters and tensors."""
    model, params = encoder(case, head)
    fields = tiny_encoders.fields(case)
    fields["architectures"] = [CLASS[fields["model_type"]] + ENDING[head]]
    fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.config.num_labels)}
    tensors = tiny_encoders.write_folder(folder, fields, params, model.config)
    tensors = change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return params, tensors


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("head", list(ENDING))
@pytest.mark.parametrize("case", FAMILIES)
def test_a_folder_is_read_bitwise(
    case: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, tensors = write(tmp_path, case, head)
    model, loaded = from_pretrained(tmp_path)
    assert model == encoder(case, head)[0]
    same(loaded, params)
    assert capsys.readouterr().err == ""
    prefix = "bert." if case == "bert" else "roberta."
    assert any(name.startswith(prefix) for name in tensors) == (head != "none")


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_the_prefix_may_be_there_or_not(case: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> dict[str, Any]:
        return {f"{case}.{name}": tensor for name, tensor in tensors.items()}

    def remove(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(f"{case}."): tensor for name, tensor in tensors.items()}

    for head, change in (("none", add), ("masked_lm", remove), ("classification", remove)):
        params, _ = write(tmp_path, case, head, change)
        same(from_pretrained(tmp_path)[1], params)
    write(tmp_path, case, "none", lambda tensors: {**tensors, **add(tensors)})
    with pytest.raises(
        WeightsError, match=f"holds one weight under two names, .*{case}.embeddings"
    ):
        from_pretrained(tmp_path)


def test_tensorflows_names_of_norms(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        out = {}
        for name, tensor in tensors.items():
            for old, tensorflow in new.items():
                name = name.replace(old, tensorflow)
            out[name] = tensor
        assert sum("gamma" in name for name in out) == 8
        return out

    params, _ = write(tmp_path, "bert", "masked_lm", rename)
    same(from_pretrained(tmp_path)[1], params)


def test_repeated_tensors_of_a_tied_head(tmp_path: Path) -> None:
    """A file may hold the decoder as well, or in its place; but not another."""
    decoder = "cls.predictions.decoder"

    def also(tensors: dict[str, Any]) -> dict[str, Any]:
        weight = tensors["bert.embeddings.word_embeddings.weight"]
        return {
            **tensors,
            f"{decoder}.weight": weight.copy(),
            f"{decoder}.bias": tensors["cls.predictions.bias"].copy(),
        }

    def instead(tensors: dict[str, Any]) -> dict[str, Any]:
        both = also(tensors)
        del both["bert.embeddings.word_embeddings.weight"], both["cls.predictions.bias"]
        return both

    def another(tensors: dict[str, Any]) -> dict[str, Any]:
        both = also(tensors)
        both[f"{decoder}.bias"][0] += 1
        return both

    for change in (also, instead):
        params, _ = write(tmp_path, "bert", "masked_lm", change)
        same(from_pretrained(tmp_path)[1], params)
    write(tmp_path, "bert", "masked_lm", another)
    with pytest.raises(WeightsError, match=f"{decoder}.bias differs from cls.predictions.bias"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_a_head_that_is_not_there_is_drawn(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, _ = write(tmp_path, case, "masked_lm")
    model, loaded = from_pretrained(tmp_path, head="classification", num_labels=4)
    said = capsys.readouterr().err
    absent = "pooler, classifier" if case == "bert" else "classifier"
    assert said == f"{tmp_path} holds no {absent}: {BEGINS}\n"
    assert (model.config.head, model.config.num_labels) == ("classification", 4)
    base = loaded[case]
    new = {"classifier": loaded["classifier"]}
    if case == "bert":
        new["pooler"] = base.pop("pooler")
    same(base, params[case])  # the rest is the file's
    kernels = [leaf for leaf in jax.tree.leaves(new) if leaf.ndim == 2]
    assert len(kernels) == 2
    for kernel in kernels:
        assert 0.01 < np.std(kernel) < 0.03  # initializer_range is 0.02
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(new) if leaf.ndim == 1)

    again = from_pretrained(tmp_path, head="classification", num_labels=4)[1]
    same(again["classifier"], loaded["classifier"])
    key = jax.random.key(1)
    other = from_pretrained(tmp_path, head="classification", num_labels=4, key=key)[1]
    first, second = (jax.tree.leaves(tree["classifier"]) for tree in (loaded, other))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_other_heads_tensors_are_left_alone(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def more(tensors: dict[str, Any]) -> dict[str, Any]:
        extra = {"qa_outputs.bias": np.zeros(2, np.float32)}
        if case == "bert":
            extra["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
            extra["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
            extra["bert.embeddings.position_ids"] = np.arange(29)[None]
        return {**tensors, **extra}

    params, _ = write(tmp_path, case, "masked_lm", more)
    same(from_pretrained(tmp_path)[1], params)
    same(from_pretrained(tmp_path, head="embedding")[1], {case: params[case]})
    write(tmp_path, case, "classification", more)
    from_pretrained(tmp_path, head="embedding", pooling="cls", normalize=True)
    assert capsys.readouterr().err == ""


def test_nothing_else_is_left_alone(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors["bert.encoder.layer.1.output.dense.bias"], tensors["classifier.bias"]
        return {**tensors, "classifier.extra": np.zeros(3, np.float32)}

    write(tmp_path, "bert", "classification", spoil)
    with pytest.raises(WeightsError) as raised:
        from_pretrained(tmp_path)
    text = str(raised.value)
    assert "2 missing, 1 unexpected, 0 misshaped" in text
    for line in (
        "missing bert.encoder.layer.1.output.dense.bias [24]",
        "missing classifier.bias [3]",  # half a head is a fault, not a head to draw
        "unexpected classifier.extra [3]",
    ):
        assert line in text


@pytest.mark.parametrize("head", list(tiny_encoders.HEADS))
@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_what_is_saved_is_loaded_with_its_head(case: str, head: str, tmp_path: Path) -> None:
    model, params = encoder(case, head)
    save_pretrained(tmp_path / "model", model, params)
    again, loaded = from_pretrained(tmp_path / "model")
    assert again == model
    same(loaded, params)


def test_another_number_of_labels_than_the_files(tmp_path: Path) -> None:
    write(tmp_path, "bert", "classification")
    with pytest.raises(WeightsError, match=r"classifier.weight is \[3, 24\], expected \[5, 24\]"):
        from_pretrained(tmp_path, head="classification", num_labels=5)


def test_a_drawn_head_is_placed_and_cast_as_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "roberta", "masked_lm")
    asked = {}

    def place(path: str, shape: tuple[int, ...]) -> None:
        asked[path] = shape

    _, loaded = from_pretrained(
        tmp_path, head="classification", param_dtype=jax.numpy.bfloat16, sharding=place
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jax.numpy.bfloat16.dtype}
    assert asked["classifier/out_proj/kernel"] == (24, 2)


def test_options_of_other_models_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "bert", "none")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "position_embedding_type": "x"}))
    with pytest.raises(ConfigError, match="config.json: position_embedding_type='x'"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_encoders.fields("gpt2")))
    with pytest.raises(ConfigError, match="A gpt2 model has no option head"):
        from_pretrained(tmp_path, head="classification")
    with pytest.raises(ConfigError, match="is a GGUF file, which cannot be loaded with head"):
        from_pretrained(tmp_path / "model.safetensors", head="classification")
