"""Experts of transformers' modules: adapters as by PEFT on torch, and the memory of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import peft as lp
from tests.support import but_rarely
from tests.torch.checks import compare_experts, distance

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import (  # noqa: E402
    TorchModel,
    from_torch,
    recipe,  # noqa: E402
)
from lora_jax.torch.config import TorchConfig  # noqa: E402

# One model of each kind: plain kernels; kernels [in, out] with biases, and a gate of its own;
# experts without a gate; kernels [in, out] without biases; and a gate of its own alone.
KINDS = ("olmoe", "gpt_oss", "nemotron_h", "aria_text", "minimax_m3_vl_text")


@pytest.mark.parametrize("model_type", but_rarely(KINDS, "aria_text", "minimax_m3_vl_text"))
def test_experts_and_routers_train_as_by_peft(model_type, tmp_path):
    facts = compare_experts(model_type, tmp_path)
    assert facts["n"] >= 2 and facts["moved"] > 1e-3, facts
    assert facts["logits"] < 1e-5 and facts["gradients"] < 1e-4, facts


@pytest.mark.parametrize("name", ["muse_spark", "openai_privacy_filter"])
def test_a_module_of_experts(name):
    """Experts alone: with a norm after each expert, and with a gate that has limits."""
    import transformers

    classes = {
        "muse_spark": "MuseSparkExperts",
        "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    }
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    config = transformers.CONFIG_MAPPING[name]()
    config = config.get_text_config()
    sizes = {
        "hidden_size": 12,
        "moe_hidden_size": 12,
        "moe_intermediate_size": 10,
        "intermediate_size": 10,
    }
    sizes |= {"num_experts": 5, "n_routed_experts": 5, "num_local_experts": 5}
    for field, size in sizes.items():
        if hasattr(config, field):
            setattr(config, field, size)
    config._experts_implementation = "eager"
    module = getattr(modeling, classes[name])(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 12)).astype(np.float32)
    chosen = np.stack([rng.permutation(5)[:2] for _ in range(7)])
    weights = rng.uniform(size=(7, 2)).astype(np.float32)
    want = module(torch.tensor(x), torch.tensor(chosen), torch.tensor(weights))
    (want**2).sum().backward()

    config._experts_implementation = "lora_jax"
    fn, params = from_torch(module)

    def squares(params):
        out = fn(params, x, chosen, weights)
        return (out**2).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(squares, has_aux=True))(params)
    assert distance(out, want.detach().numpy()) < 1e-5
    by_torch = module.down_proj.grad.numpy()
    if not module.is_transposed:
        by_torch = by_torch.swapaxes(1, 2)
    assert distance(gradient["down_proj"]["kernel"], by_torch) < 1e-5


def compile_olmoe_layer(vocab_size):
    """Returns the gradient of an adapter of one layer of OLMoE-1B-7B, for a row of 2,048 tokens."""
    import transformers

    hf = transformers.OlmoeConfig(
        num_hidden_layers=1, intermediate_size=1024, vocab_size=vocab_size
    )
    config = TorchConfig(hf.to_json_string(use_diff=False))
    fn = TorchModel(config, jnp.bfloat16, jnp.bfloat16, remat=True)
    from lora_jax.hf.keys import nest_leaves

    rows = config.key_rows()
    shapes = {row.path: jax.ShapeDtypeStruct(row.stacked_shape, jnp.bfloat16) for row in rows}
    params = nest_leaves(shapes.items())
    rule = lj.LoraRule(targets=["experts"], rank=8, alpha=16)
    tree = jax.eval_shape(lambda params: lj.lorafy(params, [rule], key=jax.random.key(0)), params)
    adapter, base = lj.split(tree)
    forward = lj.adapt(fn, strict=True)

    def loss(adapter, base, ids):
        return jnp.mean(forward(lj.join(adapter, base), ids) ** 2)

    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(adapter, base, ids)


def test_a_layer_of_experts_copies_no_kernel_for_a_token(monkeypatch):
    kernels_of_tokens = "tensor<16384x2048x2048xbf16>"  # 128 GiB
    lowered = compile_olmoe_layer(64)
    assert kernels_of_tokens not in lowered.as_text()
    # A CPU has no products of bf16: its compiler would convert all kernels to fp32 before the loop.
    passes = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    compiled = lowered.compile({"xla_disable_hlo_passes": passes})
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 2**30
    monkeypatch.setattr(recipe, "EXPERTS_NAME", "batched_mm")
    assert kernels_of_tokens in compile_olmoe_layer(65).as_text()


def test_a_parameter_that_is_no_kernel_of_experts_is_refused(tmp_path):
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 9}
    hf = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2)
    fn, params = from_torch(transformers.LlamaForCausalLM(hf))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.w1"]}
    with pytest.raises(lp.PeftError, match="has no experts, or computes them without"):
        lp.rules(fields, fn)
