"""SmolVLM against transformers and PEFT on torch: images in a row of text, the same logits."""

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
from lora_jax.hf.keys import nest_leaves
from tests.models import tiny, tiny_encoders, tiny_vision
from tests.parity import PARITY
from tests.support import array

pytestmark = PARITY
TEXT: dict[str, Any] = {
    **tiny.SIZES,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 300.0,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 18,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 5,
}
IMAGE = 59
FIELDS: dict[str, dict[str, Any]] = {
    "smolvlm": {"model_type": "smolvlm", "tie_word_embeddings": True},
    "idefics3": {"model_type": "idefics3"},
}
of_each = pytest.mark.parametrize("case", list(FIELDS))


def fields(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    parts = {"text_config": TEXT, "vision_config": VISION}
    return {**FIELDS[case], **parts, "scale_factor": 2, "image_token_id": IMAGE}


def made(case: str) -> tuple[Any, Any]:
    """A model and random parameters."""
    config = models.read_config(fields(case))
    rng = np.random.default_rng(5)

    def drawn(row: Any) -> jax.Array:
        if row.kind == "patches" and len(row.shape) == 4:
            return array(rng.standard_normal(row.shape) / 7, jnp.float32)
        return jnp.asarray(tiny_encoders.draw(rng, row.path, row.stacked_shape))

    rows = models.key_table(config)
    return models.SmolVLM(config), nest_leaves((row.path, drawn(row)) for row in rows)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, pixels): two images in the first row; one, and padding, in the second."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1, IMAGE, (2, 17))
    ids[0, [2, 3, 4, 5, 9, 10, 11, 12]] = IMAGE
    ids[1, [1, 2, 3, 4]] = IMAGE
    mask = np.ones_like(ids)
    mask[1, 13:] = 0
    pixels = rng.standard_normal((2, 2, 3, 20, 20)).astype(np.float32)
    pixels[1, 1] = 0
    return np.where(mask, ids, 0), mask, pixels


def theirs_of(folder: Path, case: str) -> Any:
    import transformers

    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[case] + "ForConditionalGeneration"
    auto = getattr(transformers, name)
    reference, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return reference.eval()


def theirs(reference: Any) -> Any:
    import torch

    ids, mask, pixels = map(torch.from_numpy, inputs())
    return reference(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits


@of_each
def test_logits(case: str, tmp_path: Path) -> None:
    """From and to files: nothing missing, nothing left over; images count, in their order."""
    model, params = made(case)
    made_by_init = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3), int))["params"]
    assert jax.tree.map(jnp.shape, made_by_init) == jax.tree.map(jnp.shape, params)
    models.save_pretrained(tmp_path / "ours", model, params)
    reference = theirs_of(tmp_path / "ours", case)
    reference.save_pretrained(tmp_path / "theirs")
    want = theirs(reference).detach().numpy()
    model, params = models.from_pretrained(tmp_path / "theirs")
    ids, mask, pixels = inputs()
    got = np.asarray(tiny_vision.run(model, params, ids, mask, pixel_values=pixels))
    assert np.abs(want).max() > 1
    tiny.assert_close(got[mask == 1], want[mask == 1])
    swapped = tiny_vision.run(model, params, ids, mask, pixel_values=pixels[:, ::-1])
    assert np.abs(np.asarray(swapped)[0] - got[0]).max() > 0.1
    if model.config.text.tie_word_embeddings:
        reference.model.save_pretrained(tmp_path / "bare")  # names without "model."
        jax.tree.map(
            np.testing.assert_array_equal, models.from_pretrained(tmp_path / "bare")[1], params
        )


def test_a_cache_and_too_many_tokens() -> None:
    model, params = made("smolvlm")
    ids, mask, pixels = (x[:1] for x in inputs())
    whole = tiny_vision.run(model, params, ids, mask, pixel_values=pixels)
    cache = models.init_cache(model.config, 1, 17, jnp.float32)
    first, cache = tiny_vision.run(model, params, ids[:, :14], cache=cache, pixel_values=pixels)
    rest, _ = tiny_vision.run(model, params, ids[:, 14:], cache=cache)
    tiny.assert_close(np.concatenate([first, rest], axis=1), whole, 1e-5)
    one = tiny_vision.run(model, params, ids, pixel_values=pixels[:, :1])
    assert np.isnan(np.asarray(one)[0, -1]).all()
    with pytest.raises(ValueError, match=r"Pass .*\[1, images, 3, 20, 20\]"):
        model.apply({"params": params}, ids, pixel_values=pixels[:, :, :, :15])


def test_answers(tmp_path: Path) -> None:
    """Greedy continuations are transformers', at once and streamed, and images change them."""
    import torch

    model, params = made("smolvlm")
    models.save_pretrained(tmp_path / "model", model, params)
    reference = theirs_of(tmp_path / "model", "smolvlm")
    ids, mask, pixels = inputs()
    mask = mask[:, ::-1].copy()  # padding at the left, as transformers needs it
    ids[1] = np.roll(ids[1], 4)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    new: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": 0}
    want = reference.generate(
        **{name: torch.from_numpy(x) for name, x in given.items()}, **new, do_sample=False
    )[:, 17:].numpy()
    more = {"inputs": {"pixel_values": jnp.asarray(pixels)}, **new}
    got = np.asarray(models.generate(model, params, ids, mask, **more))
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    streamed = np.stack([*models.stream(model, params, ids, mask, **more)], axis=1)
    np.testing.assert_array_equal(streamed, got[:, : streamed.shape[1]])
    more["inputs"] = {"pixel_values": jnp.asarray(pixels[:, ::-1])}
    assert (np.asarray(models.generate(model, params, ids, mask, **more)) != got).any()


@pytest.mark.parametrize("targets", [r".*(text|vision)_model.*\.(q|v)_proj", "all-linear"], ids=str)
def test_adapters(targets: str, tmp_path: Path) -> None:
    """PEFT's folders both ways, on text and vision; gradients within 1e-5 of PEFT's."""
    import peft
    import torch

    model, params = made("smolvlm")
    models.save_pretrained(tmp_path / "model", model, params)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets)
    adapted = peft.get_peft_model(theirs_of(tmp_path / "model", "smolvlm"), config).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    ids, mask, pixels = inputs()
    logits = theirs(adapted)
    weights = np.random.default_rng(3).standard_normal(logits.shape).astype(np.float32)
    weights *= mask[..., None] / logits.numel()
    (logits * torch.from_numpy(weights)).sum().backward()

    tree = lp.load(tmp_path / "theirs", model, params)
    adapter, base = lj.split(tree)

    @jax.jit
    def run(adapter: Any) -> tuple[jax.Array, Any]:
        def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
            tree = lj.join(adapter, base)
            out = lj.adapt(model.apply, strict=True)(
                {"params": tree}, ids, mask, pixel_values=pixels
            )
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
    assert named.keys() == got.keys()
    for name, gradient in named.items():
        tiny.assert_close(got[name], gradient, 1e-5)
    if targets == "all-linear":
        rules = [lj.LoraRule(targets="all-linear", rank=3)]
        by_kind = lj.split(lj.lorafy(params, rules, kinds=models.kinds(model.config)))[0]
        assert set(by_kind) == set(adapter)
