"""Gradients of adapters on families of decoders, with PEFT on transformers' model as the judge."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.core.paths import flatten_with_paths
from tests.models import tiny
from tests.models.test_parity import made
from tests.peft_adapters.models import with_adapter
from tests.support import but_rarely

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PEFT heeds the pattern, although it says that it did not.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

# name -> (case, fields of LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    case: (case, {"target_modules": "all-linear"})
    for case in (
        "llama3",
        "mistral with a window",
        "ministral3",
        "qwen2 with some windows",
        "qwen3",
        "gemma2",
        "gemma3",
        "gemma4",
        "gemma4 with layers that share keys",
        "phi3",
        "smollm3 with every option",
        "olmo2",
        "olmo3",
        "granite",
    )
} | {
    "gpt-oss, attention": ("gpt-oss", {"target_modules": "all-linear"}),
    "gpt-oss, experts": (
        "gpt-oss",
        {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "gpt-oss, gate and up alone": (
        "gpt-oss",
        {"target_parameters": ["mlp.experts.gate_up_proj", "router.weight"]},
    ),
    "qwen3 moe": (
        "qwen3 moe",
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "qwen3-next": (
        "qwen3-next",
        {
            "target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"],
            "target_parameters": ["mlp.experts.down_proj", "gate.weight"],
            "lora_alpha": 6,
        },
    ),
    # alpha / r is exact: keys of length one enlarge the rounding of our s, which is in fp32.
    **{
        case: (case, {"target_modules": "all-linear", "lora_alpha": 6})
        for case in ("qwen3.5", "qwen3.5 with every option", "qwen3.5 moe")
    },
    "glm4 moe": (
        "glm4 moe",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "gate.weight"],
            "lora_alpha": 6,
        },
    ),
    "deepseek v3": (
        "deepseek v3",
        {
            "target_modules": [
                *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            ],
            "target_parameters": ["mlp.experts.down_proj", "gate.weight"],
            "lora_alpha": 6,
        },
    ),
    "mixtral, experts": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj", "gate.weight"]},
    ),
}


CONTAINED = ("qwen3.5", "gemma4", "mistral with a window", "qwen3", "gemma3", "olmo2")


@pytest.mark.parametrize("name", but_rarely(ADAPTERS, *CONTAINED, "gpt-oss, gate and up alone"))
def test_logits_and_gradients(
    name: str, tmp_path: Any, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's gradients, saved in the place of its factors, are ours in the tree that is loaded."""
    import torch
    import torch.nn.functional as F

    case, options = ADAPTERS[name]
    reference, model, params = made(case)
    # transformers computes some parts in single precision, whatever x is.
    if model.config.linear_layers or model.config.sigmoid_router:
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch, "float", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(5)
    # In double precision, but for norms and the like: single is 1e-5 off on either side.
    theirs = with_adapter(copy.deepcopy(reference).double(), options | {"lora_dropout": 0.0})
    model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    theirs.save_pretrained(tmp_path / "factors")
    ids = tiny.tokens(1, 3, 11)
    # PEFT computes the change of experts within a forward pass, and parameters are read anew.
    logits = theirs(input_ids=torch.from_numpy(ids).long()).logits
    labels = torch.from_numpy(ids[:, 1:]).long()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
    tree = lp.load(tmp_path / "factors", model, params)
    adapter, base = lj.split(tree)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(x.size for x in jax.tree.leaves(adapter)) == trained
    drawn = lj.lorafy(params, lp.rules(tmp_path / "factors", model))
    assert jax.tree.map(jnp.shape, lj.split(drawn)[0]) == jax.tree.map(jnp.shape, adapter)
    forward = lj.adapt(model.apply, strict=True)

    def loss(adapter: Any) -> Any:
        logits = forward({"params": lj.join(adapter, base)}, ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return losses.mean(), logits

    got, ours = jax.jit(jax.grad(loss, has_aux=True), compiler_options=tiny.FAST_COMPILE)(adapter)
    tiny.assert_close(ours, logits.detach().numpy())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    want = lj.split(lp.load(tmp_path / "gradients", model, params))[0]
    want, got = (dict(flatten_with_paths(tree)[0]) for tree in (want, got))
    assert want.keys() == got.keys()
    for path in want:
        assert np.abs(want[path]).max() > 1e-4, path
        tiny.assert_close(got[path], want[path], 1e-5)
