"""ViT and DINOv2 against transformers and PEFT on torch: the same weights, the same outputs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.models import tiny, tiny_vision
from tests.parity import PARITY

pytestmark = PARITY
AUTO = {"none": "AutoModel", "classification": "AutoModelForImageClassification"}
of_each_case = pytest.mark.parametrize("case", list(tiny_vision.CASES))


def write_model(folder: Path, case: str, head: str = "classification") -> Any:
    """Our folder of a tiny model, as transformers reads it: nothing is missing or left over."""
    import transformers

    model, params = tiny_vision.model(case, head)
    models.save_pretrained(folder, model, params)
    auto = getattr(transformers, AUTO[head])
    more = {"add_pooling_layer": False} if head == "none" and case.startswith("vit") else {}
    reference, info = auto.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info.values()), info
    return reference.eval()


def run_reference(reference: Any, pixels: np.ndarray, **options: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return reference(torch.from_numpy(pixels), **options)[0].numpy()


@pytest.mark.parametrize("head", list(AUTO))
@of_each_case
def test_both_ways(case: str, head: str, tmp_path: Path) -> None:
    reference = write_model(tmp_path / "ours", case, head)
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)  # files of transformers 5 have the names of 4
    model, params = models.from_pretrained(tmp_path / "theirs")
    assert model.config.head == head
    pixels = tiny_vision.pixels(case)
    want = run_reference(reference, pixels)
    assert np.abs(want).max() > 0.5
    tiny.assert_close(tiny_vision.run(model, params, pixels), want)


@pytest.mark.parametrize("size", [(20, 35), (13, 16), (10, 40)])
@pytest.mark.parametrize("case", ["vit", "dinov2", "dinov2 of oblong images"])
def test_other_sizes(case: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Positions are resampled; pixels beyond the last whole patch do not count."""
    reference = write_model(tmp_path / "ours", case)
    model, params = models.from_pretrained(tmp_path / "ours")
    pixels = tiny_vision.pixels(case, size=size)
    options = {"interpolate_pos_encoding": True} if case == "vit" else {}
    want = run_reference(reference, pixels, **options)
    tiny.assert_close(tiny_vision.run(model, params, pixels), want)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_adapters(case: str, targets: Any, tmp_path: Path) -> None:
    """PEFT's folders both ways, of both versions' names; and the gradients of an adapter."""
    import peft
    import torch

    reference = write_model(tmp_path / "model", case)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, modules_to_save=["classifier"]
    )
    theirs = peft.get_peft_model(reference, config).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    pixels, labels = tiny_vision.pixels(case), np.array([2, 0])
    out = theirs(torch.from_numpy(pixels), labels=torch.from_numpy(labels))
    out.loss.backward()

    model, params = models.from_pretrained(tmp_path / "model")
    forward = jax.jit(lj.adapt(model.apply, strict=True))
    plain = np.asarray(tiny_vision.run(model, params, pixels))
    want = out.logits.detach().numpy()
    assert np.abs(want - plain).max() > 0.1, "the adapter must be seen"
    tree = lp.load(tmp_path / "theirs", model, params)
    tiny.assert_close(forward({"params": tree}, pixels), want, 1e-5)

    older = with_older_names(tmp_path / "theirs", tmp_path / "older", model)
    again = lp.load(older, model, params)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), again, tree))

    adapter, base = lj.split(tree)

    @jax.jit
    def gradients(adapter: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            logits = lj.adapt(model.apply)({"params": lj.join(adapter, base)}, pixels)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels])

        return jax.grad(loss)(adapter)

    grads = lj.join(gradients(adapter), base)
    lp.save(tmp_path / "gradients", model, grads)
    got = load_file(tmp_path / "gradients/adapter_model.safetensors")
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    assert named.keys() == got.keys()
    for name, gradient in named.items():
        assert np.abs(gradient).max() > 1e-4, name
        tiny.assert_close(got[name], gradient, 1e-5)

    lp.save(tmp_path / "ours", model, tree)
    fresh = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "model"), tmp_path / "ours")
    tiny.assert_close(run_reference(fresh.eval(), pixels), want, 1e-5)


def theirs_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForImageClassification.from_pretrained(folder)


def with_older_names(folder: Path, to: Path, model: Any) -> Path:
    """The folder of an adapter as transformers 4's modules are called."""
    older = {
        (row.in_module or row.hf).format(*index).removesuffix(".weight"): name
        for row in models.key_table(model.config)
        for index, name in zip(row.members, row.hf_names, strict=True)
    }
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, dot, rest = key.removeprefix("base_model.model.").partition(".lora_")
        name = older[name].removesuffix(".weight") if dot else name
        tensors[f"base_model.model.{name}{dot}{rest}"] = tensor
    config = json.loads((folder / "adapter_config.json").read_text())
    ends = {"q_proj": "query", "v_proj": "value", "o_proj": "attention.output.dense"}
    named = config["target_modules"]
    config["target_modules"] = [ends.get(x) or older[x].removesuffix(".weight") for x in named]
    to.mkdir()
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, to / "adapter_model.safetensors")
    return to
