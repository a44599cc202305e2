"""transformers 4's Flax models (Linen), which release 5 no longer has; random weights."""

from typing import Any

from tests.foreign.case import Case, Made, rule
from tests.support import array

IDS = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])


def _made(config: str, model: str, sizes: dict[str, Any]) -> Made:
    import transformers

    built = getattr(transformers, model)(getattr(transformers, config)(**sizes), seed=1)

    def fn(params: Any, ids: Any) -> Any:
        return built(ids, params=params, train=False)[0]

    return Made(fn, built.params, (IDS,), rule(r".*(kernel|embedding)"))


def _case(model: str, weights: int, config: str, name: str, **sizes: Any) -> Case:
    return Case("transformers", model, "__call__", weights, lambda: _made(config, name, sizes))


LLAMA = {
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 13,
}
CASES = (
    _case(
        "FlaxBertForMaskedLM, two layers, tied", 16, "BertConfig", "FlaxBertForMaskedLM", **LLAMA
    ),
    _case(
        "FlaxGPT2LMHeadModel, two layers, tied",
        10,
        "GPT2Config",
        "FlaxGPT2LMHeadModel",
        vocab_size=37,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=13,
        bos_token_id=1,
        eos_token_id=1,
    ),
    _case("FlaxLlamaForCausalLM, two layers", 16, "LlamaConfig", "FlaxLlamaForCausalLM", **LLAMA),
)
