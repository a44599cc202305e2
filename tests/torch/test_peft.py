"""Decoders of twelve kinds train as by PEFT on torch: logits, gradients, files before and after."""

import pytest

from tests.support import but_rarely
from tests.torch.checks import compare, is_exact

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

# One of each kind: plain, norms after blocks, parallel blocks with layer norms, soft caps and
# windows that alternate, biases, latent attention, experts with a shared one, experts by groups,
# attention and convolutions, state spaces, states and attention side by side, and positions by
# biases of scores.
KINDS = (
    *("llama", "glm4", "cohere2", "gemma2", "starcoder2", "deepseek_v3", "qwen2_moe", "glm4_moe"),
    *("lfm2", "mamba2", "falcon_h1", "bloom"),
)


@pytest.mark.parametrize(
    "model_type", but_rarely(KINDS, "glm4", "starcoder2", "glm4_moe", "falcon_h1")
)
def test_a_model_trains_as_by_peft(model_type, tmp_path):
    facts = compare(model_type, tmp_path, generates=False)
    assert is_exact(facts), facts
    assert not is_exact(facts | {"gradients": 2e-5})
