"""Activated LoRA, with PEFT on transformers' model as the judge: logits, gradients, files, text."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from tests.peft_adapters.models import LLAMA_LINEAR, torch_model, with_adapter, write_model
from tests.support import assert_close, assert_identical

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
INVOCATION = [7, 9]
OPTIONS = {
    "target_modules": LLAMA_LINEAR,
    "rank_pattern": {"v_proj": 5},
    "alora_invocation_tokens": INVOCATION,
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
}
# The invocation twice, of which the last counts; none; half of one; as the last tokens of the row.
IDS = np.random.default_rng(5).integers(10, 61, (4, 11))
IDS[0, [2, 3, 6, 7]] = 7, 9, 7, 9
IDS[2, [4, 10]] = 9, 7
IDS[3, 9:] = 7, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    root = tmp_path_factory.mktemp("models")
    write_model("llama", root / "llama")
    return root


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.numpy()


def our_logits(model: Any, tree: Any) -> np.ndarray:
    return np.asarray(jax.jit(lj.adapt(model.apply, strict=True))({"params": tree}, IDS))


def test_files_both_ways(folder: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    plain = logits_of(torch_model(folder, "llama"))
    theirs = with_adapter(torch_model(folder, "llama"), OPTIONS)
    want = logits_of(theirs)
    changed = np.abs(want - plain).max(axis=-1) > 1e-2
    active = np.asarray(lj.invoked(IDS, INVOCATION))
    np.testing.assert_array_equal(changed, active)  # the judge knows the same tokens
    theirs.save_pretrained(tmp_path / "theirs")

    model, params = models.from_pretrained(folder / "llama")
    tree = lp.load(tmp_path / "theirs", model, params)
    assert_close(our_logits(model, tree), want, 1e-5)
    lp.save(tmp_path / "ours", model, tree, task_type="CAUSAL_LM")
    assert_identical(lp.load(tmp_path / "ours", model, params), tree)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == INVOCATION
    back = PeftModel.from_pretrained(torch_model(folder, "llama"), tmp_path / "ours").eval()
    assert_close(logits_of(back), want, 1e-5)


def test_gradients(folder: Any, tmp_path: Any, float64: None) -> None:
    """PEFT's gradients, saved in the place of its factors, are ours in the tree that is loaded."""
    import torch
    import torch.nn.functional as F

    theirs = with_adapter(torch_model(folder, "llama").double(), OPTIONS)
    theirs.save_pretrained(tmp_path / "factors")
    labels = torch.from_numpy(IDS[:, 1:])
    logits = theirs(input_ids=torch.from_numpy(IDS)).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()

    model, params = models.from_pretrained(folder / "llama")
    model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64, remat=True)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    adapter, base = lj.split(lp.load(tmp_path / "factors", model, params))
    forward = lj.adapt(model.apply, strict=True)

    def loss(adapter: Any) -> Any:
        logits = forward({"params": lj.join(adapter, base)}, IDS)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:])
        return each.mean()

    got = jax.jit(jax.grad(loss))(adapter)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    want = lj.split(lp.load(tmp_path / "gradients", model, params))[0]
    want, got = (dict(flatten_with_paths(tree)[0]) for tree in (want, got))
    for path in want:
        assert np.abs(want[path]).max() > 1e-4, path
        assert_close(got[path], want[path], 1e-5)


def test_generation(folder: Any, tmp_path: Any) -> None:
    """With a cache, the tokens before the invocation are the base's, and those after it are not."""
    import torch

    theirs = with_adapter(torch_model(folder, "llama"), OPTIONS)
    theirs.save_pretrained(tmp_path)
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    ids = torch.from_numpy(IDS)
    want = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    with theirs.disable_adapter():
        base = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    differ = (want != base).numpy().any(axis=1)
    assert differ.tolist() == [True, False, False, True], "the judge must see both kinds of rows"
    model, params = models.from_pretrained(folder / "llama")
    tree, apply = lp.load(tmp_path, model, params), lj.adapt(model.apply)
    new = want[:, IDS.shape[1] :].numpy()
    ours: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": (), "apply": apply}
    np.testing.assert_array_equal(models.generate(model, tree, IDS, **ours), new)
    # Padded on the left, by a token of the invocation; and token by token.
    padded = np.concatenate([np.full((4, 3), 7), IDS], axis=1)
    mask = np.arange(padded.shape[1]) >= 3
    steps = models.stream(model, tree, padded, np.broadcast_to(mask, padded.shape), **ours)
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), new)
    drawn = models.sample(model, tree, IDS, n=2, temperature=0.0, key=jax.random.key(0), **ours)
    np.testing.assert_array_equal(drawn.tokens, np.repeat(new, 2, axis=0))
