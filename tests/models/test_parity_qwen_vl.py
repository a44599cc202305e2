"""Qwen3.5 with images against transformers and PEFT on torch: images of any size in a text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.models import tiny, tiny_vision
from tests.models import tiny_qwen_vl as tiny_qwen

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CLASSES = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}


def theirs_of(folder: Path, case: str = "qwen3_5") -> Any:
    import transformers

    auto = getattr(transformers, f"{CLASSES[case]}ForConditionalGeneration")
    reference, info = auto.from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(info.values()), info
    return reference.eval()


@pytest.mark.parametrize("case", list(CLASSES))
def test_logits(case: str, tmp_path: Path) -> None:
    """From and to files; images count in their order, and RoPE goes by their rows and columns."""
    model, params = tiny_qwen.made(case, tie_word_embeddings=case == "qwen3_5")
    made_by_init = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3), int))["params"]
    assert jax.tree.map(jnp.shape, made_by_init) == jax.tree.map(jnp.shape, params)
    models.save_pretrained(tmp_path / "ours", model, params)
    reference = theirs_of(tmp_path / "ours", case)
    reference.save_pretrained(tmp_path / "theirs")
    given = tiny_qwen.inputs()
    want = reference(**tiny_qwen.as_theirs(given)).logits.detach().numpy()
    model, params = models.from_pretrained(tmp_path / "theirs", images=True)
    got = np.asarray(tiny_vision.run(model, params, **given))
    real = given["attention_mask"] == 1
    assert np.abs(want).max() > 1
    tiny.assert_close(got[real], want[real])
    for name, change in {
        "pixel_values": lambda x: x[:, ::-1],
        "image_grids": lambda x: x[:, :, ::-1],
    }.items():
        other = tiny_vision.run(model, params, **{**given, name: change(given[name])})
        assert np.abs(np.asarray(other)[0] - got[0]).max() > 0.1
    # The text alone is another model, of the same weights.
    text, alone = models.from_pretrained(tmp_path / "theirs")
    texts = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    whole, part = (tiny_vision.run(*each, **texts) for each in ((model, params), (text, alone)))
    np.testing.assert_array_equal(whole, part)
    if case == "qwen3_5":
        reference.model.save_pretrained(tmp_path / "bare")  # names without "model."
        bare = models.from_pretrained(tmp_path / "bare", images=True)[1]
        jax.tree.map(np.testing.assert_array_equal, bare, params)


def test_answers(tmp_path: Path) -> None:
    """Greedy continuations are transformers', at once and streamed, and images change them."""
    import torch

    model, params = tiny_qwen.made()
    models.save_pretrained(tmp_path / "model", model, params)
    reference = theirs_of(tmp_path / "model")
    given = tiny_qwen.inputs()
    for name in ("input_ids", "attention_mask"):  # padding at the left, as transformers needs it
        given[name][1] = np.roll(given[name][1], 3)
    new: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": 0}
    want = reference.generate(**tiny_qwen.as_theirs(given), **new, do_sample=False, pad_token_id=0)
    want = want[:, 17:].numpy()
    assert isinstance(want, np.ndarray) and torch.is_grad_enabled()
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    shown = {name: jnp.asarray(array) for name, array in given.items()}
    got = np.asarray(models.generate(model, params, ids, mask, inputs=shown, **new))
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    streamed = np.stack([*models.stream(model, params, ids, mask, inputs=shown, **new)], axis=1)
    np.testing.assert_array_equal(streamed, got[:, : streamed.shape[1]])
    shown["pixel_values"] = shown["pixel_values"][:, ::-1]
    assert (np.asarray(models.generate(model, params, ids, mask, inputs=shown, **new)) != got).any()


@pytest.mark.parametrize("targets", [r".*(layers|blocks).*\.(q_proj|qkv)", "all-linear"], ids=str)
def test_adapters(
    targets: str, tmp_path: Path, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's folders both ways, on text and vision; gradients within 1e-5 of PEFT's.

    In double precision: keys of linear layers have length one, which enlarges what is rounded.
    """
    import peft
    import torch

    model, params = tiny_qwen.made()
    models.save_pretrained(tmp_path / "model", model, params)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    torch.manual_seed(11)  # PEFT draws A
    adapted = peft.get_peft_model(theirs_of(tmp_path / "model").double(), config).eval().double()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    # transformers computes some parts in single precision, whatever x is.
    for owner, name, wide in (
        (torch, "float32", torch.float64),
        (torch, "float", torch.float64),
        (torch.Tensor, "float", torch.Tensor.double),
    ):
        monkeypatch.setattr(owner, name, wide)
    model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    given = tiny_qwen.inputs()
    given["pixel_values"] = given["pixel_values"].astype(np.float64)
    logits, mask = adapted(**tiny_qwen.as_theirs(given)).logits, given["attention_mask"]
    weights = np.random.default_rng(3).standard_normal(logits.shape)
    weights *= mask[..., None] / logits.numel()
    (logits * torch.from_numpy(weights)).sum().backward()

    tree = lp.load(tmp_path / "theirs", model, params)
    adapter, base = lj.split(tree)

    @jax.jit
    def run(adapter: Any) -> tuple[jax.Array, Any]:
        def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
            out = lj.adapt(model.apply, strict=True)({"params": lj.join(adapter, base)}, **given)
            return jnp.sum(out * weights), out

        gradients, out = jax.grad(loss, has_aux=True)(adapter)
        return out, gradients

    out, gradients = run(adapter)
    want = logits.detach().numpy()
    tiny.assert_close(np.asarray(out)[mask == 1], want[mask == 1])
    lp.save(tmp_path / "gradients", model, lj.join(gradients, base))
    got = load_file(tmp_path / "gradients/adapter_model.safetensors")
    named = {n.replace(".default", ""): p.grad for n, p in adapted.named_parameters()}
    named = {n: gradient.numpy() for n, gradient in named.items() if gradient is not None}
    assert named.keys() == got.keys() and any(".visual." in name for name in got)
    for name, gradient in named.items():
        tiny.assert_close(got[name], gradient, 1e-5)
    if targets == "all-linear":
        rules = [lj.LoraRule(targets="all-linear", rank=3)]
        by_kind = lj.split(lj.lorafy(params, rules, kinds=models.kinds(model.config)))[0]
        assert set(by_kind) == set(adapter)
        return
    # A merged folder is a model with images to transformers.
    monkeypatch.undo()
    models.save_pretrained(tmp_path / "merged", model, lj.merge(tree), dtype=jnp.float32)
    merged = theirs_of(tmp_path / "merged")(**tiny_qwen.as_theirs(tiny_qwen.inputs())).logits
    tiny.assert_close(merged.detach().numpy()[mask == 1], want[mask == 1])
