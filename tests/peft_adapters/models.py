"""Tiny random models of several families, made by transformers, and configurations of adapters."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = SIZES | {
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR = DECODER | {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 13,
    "linear_value_head_dim": 5,
}
MIXTURE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12,
}
ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ENCODER = SIZES | {
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
# name -> (class of the configuration, class of the model, fields)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        DECODER | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        DECODER | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        DECODER
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 6}
        | {"norm_topk_prob": True, "mlp_only_layers": [], "tie_word_embeddings": False},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        DECODER
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20}
        | {"head_dim": 6, "sliding_window": 4, "swiglu_limit": 0.5},
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        DECODER
        | {"num_hidden_layers": 4, "head_dim": 6, "global_head_dim": 12, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
        | {"hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 61},
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", DECODER | ROUTED | {"use_qk_norm": True}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        DECODER
        | ROUTED
        | {"num_key_value_heads": 4, "q_lora_rank": 11, "kv_lora_rank": 9, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 5, "v_head_dim": 7},
    ),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", LINEAR | MIXTURE),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR | {"attention_bias": True}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", LINEAR | MIXTURE),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 61,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER | {"num_labels": 3}),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        ENCODER | {"num_labels": 3, "type_vocab_size": 1, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
IDS = np.random.default_rng(5).integers(3, 61, (2, 11))
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (family, fields of LoraConfig)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "regular expression": (
        "llama",
        {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
    ),
    "whole names": (
        "llama",
        {"target_modules": ["model.layers.1.mlp.up_proj", "layers.2.self_attn.k_proj"]},
    ),
    "defaults of the architecture": ("llama", {"target_modules": None}),
    "exclude a list": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    ),
    "exclude an expression": (
        "llama",
        {"target_modules": LLAMA_LINEAR, "exclude_modules": r".*\.1\.mlp\..*"},
    ),
    "some layers": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]}),
    "one layer by a pattern": (
        "llama",
        {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "ranks and alphas": (
        "llama",
        {
            "target_modules": LLAMA_LINEAR,
            "rank_pattern": {"v_proj": 5, "layers.1.mlp.up_proj": 1},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11, "down_proj": 2},
        },
    ),
    "rsLoRA": ("llama", {"target_modules": LLAMA_LINEAR, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": LLAMA_LINEAR, "use_dora": True}),
    "DoRA in some layers": (
        "llama",
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "use_dora": True},
    ),
    "biases, all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of adapted layers": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "bias": "lora_only"},
    ),
    "bias on B": ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    "modules saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.1.input_layernorm"]},
    ),
    "norms saved by the end of their names": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding with DoRA": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "PiSSA": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"}),
    "gaussian": ("llama", {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"}),
    "qwen2 all linear": ("qwen2", {"target_modules": "all-linear", "bias": "lora_only"}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied head": ("qwen2", {"target_modules": ["lm_head", "v_proj"]}),
    "tied embedding, ensured": (
        "qwen2",
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    ),
    "tied head, ensured": (
        "qwen2",
        {"target_modules": ["lm_head", "v_proj"], "ensure_weight_tying": True},
    ),
    "tied by an expression, ensured": (
        "qwen2",
        {"target_modules": r"(.*\.)?(embed_tokens|v_proj)", "ensure_weight_tying": True},
    ),
    "tied embedding saved": (
        "qwen2",
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "tied embedding and head": (
        "qwen2",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "lora_dropout": 0.1},
    ),
    "gpt2, tied embedding and head": (
        "gpt2",
        {"target_modules": ["wte", "lm_head"], "use_rslora": True},
    ),
    "tied tokens of both": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]},
        },
    ),
    "tied tokens": (
        "qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 2]}},
    ),
    "experts": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "experts, one parameter alone": (
        "mixtral",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"],
        },
    ),
    "experts and nothing else": (
        "mixtral",
        {"target_parameters": ["experts.gate_up_proj", "down_proj"]},
    ),
    "experts and router": (
        "qwen3_moe",
        {
            "target_modules": [],
            "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"],
            "alpha_pattern": {"gate.weight": 4},
        },
    ),
    "gpt-oss, experts": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 5},
        },
    ),
    "gpt-oss, router and one layer's gate and up": (
        "gpt_oss",
        {"target_parameters": ["router.weight", "model.layers.1.mlp.experts.gate_up_proj"]},
    ),
    "gpt-oss, all linear": ("gpt_oss", {"target_modules": "all-linear", "bias": "lora_only"}),
    "weights of linear layers": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"],
            "rank_pattern": {"up_proj.weight": 4},
            "alpha_pattern": {"v_proj.weight": 11, "up_proj": 99},
            "lora_dropout": 0.0,
        },
    ),
    "weight of the head alone": (
        "llama",
        {"target_modules": [], "target_parameters": ["lm_head.weight"], "lora_dropout": 0.0},
    ),
    "router of one layer": ("mixtral", {"target_parameters": ["model.layers.1.mlp.gate.weight"]}),
    "mixtral all linear": ("mixtral", {"target_modules": "all-linear"}),
    "qwen3_moe all linear": ("qwen3_moe", {"target_modules": "all-linear"}),
    "qwen3-next all linear": ("qwen3_next", {"target_modules": "all-linear"}),
    "qwen3-next, experts and router": (
        "qwen3_next",
        {
            "target_modules": ["in_proj_qkvz", "shared_expert_gate"],
            "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"],
            "alpha_pattern": {"gate.weight": 4},
        },
    ),
    "qwen3-next, one layer's experts": (
        "qwen3_next",
        {
            "target_modules": ["in_proj_ba"],
            "target_parameters": ["model.layers.2.mlp.experts.gate_up_proj"],
        },
    ),
    "gemma4 all linear": ("gemma4_text", {"target_modules": "all-linear"}),
    "gemma4, some layers": (
        "gemma4_text",
        {
            "target_modules": ["q_proj", "v_proj", "per_layer_input_gate"],
            "layers_to_transform": [0, 3],
        },
    ),
    "glm4_moe all linear": ("glm4_moe", {"target_modules": "all-linear"}),
    "deepseek_v3, experts and router": (
        "deepseek_v3",
        {
            "target_modules": [
                "q_b_proj",
                "kv_a_proj_with_mqa",
                "model.layers.2.self_attn.kv_b_proj",
            ],
            "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"],
        },
    ),
    "qwen3.5 moe all linear": ("qwen3_5_moe", {"target_modules": "all-linear"}),
    "qwen3.5 moe, shared and other experts": (
        "qwen3_5_moe",
        {
            "target_modules": ["shared_expert.up_proj", "shared_expert_gate"],
            "target_parameters": ["experts.gate_up_proj", "model.layers.1.mlp.gate.weight"],
        },
    ),
    "qwen3.5 all linear": ("qwen3_5", {"target_modules": "all-linear", "bias": "lora_only"}),
    "qwen3.5, some layers": (
        "qwen3_5",
        {
            "target_modules": ["in_proj_qkv", "out_proj", "o_proj", "up_proj"],
            "layers_to_transform": [0, 3],
            "rank_pattern": {"layers.0.linear_attn.in_proj_qkv": 5},
        },
    ),
    "qwen3.5, biases and ranks by layer": (
        "qwen3_5",
        {
            "target_modules": r".*(in_proj_[zba]|q_proj|down_proj)",
            "rank_pattern": {"layers.2.mlp.down_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 11},
            "bias": "all",
        },
    ),
    "qwen3.5, modules saved": (
        "qwen3_5",
        {
            "target_modules": ["in_proj_qkv"],
            "modules_to_save": ["layers.2.linear_attn.norm", "layers.1.input_layernorm"],
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 all linear, DoRA": (
        "gpt2",
        {"target_modules": "all-linear", "fan_in_fan_out": True, "use_dora": True},
    ),
    "gpt2, a name that PEFT does not tie": (
        "gpt2",
        {"target_modules": ["wte"], "ensure_weight_tying": True},
    ),
    "gpt2, biases": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "bert classifier": (
        "bert",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "bert, all biases": (
        "bert",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "bert all linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "roberta classifier": (
        "roberta",
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "use_rslora": True},
    ),
}
# PEFT adapts experts without dropout.
_SPARSE = "mixtral qwen3_moe gpt_oss glm4_moe deepseek_v3 qwen3_next qwen3_5_moe".split()
CONFIGS |= {
    name: (family, {"lora_dropout": 0.0} | options)
    for name, (family, options) in CONFIGS.items()
    if family in _SPARSE
}


def write_model(family: str, folder: Path) -> Any:
    """A folder with the family's tiny model; the model itself, in PyTorch."""
    import torch
    import transformers

    config_class, model_class, fields = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, config_class)(**fields)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def with_adapter(model: Any, options: dict[str, Any]) -> Any:
    """PEFT's model with random factors far from zero, alpha unlike the rank."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "lora_dropout": 0.05} | options)
    torch.manual_seed(3)  # PEFT draws A
    return shaken(get_peft_model(model, config).eval(), 0.2)


def shaken(model: Any, by: float) -> Any:
    """The model, with normal noise added to all that trains."""
    import torch

    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def torch_model(folders: Path, family: str) -> Any:
    """A family's model in PyTorch, from its folder in `folders`."""
    import transformers

    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folders / family).eval()


@functools.cache
def forward_of(model: Any) -> Any:
    """The model's function of adapted trees: trees of one structure share its program."""
    return jax.jit(lj.adapt(model.apply, strict=True))


def our_logits(model: Any, tree: Any) -> np.ndarray:
    """The logits of our model for an adapted tree."""
    return np.asarray(forward_of(model)({"params": tree}, IDS.astype(np.int32)))


@functools.cache
def plain_logits(folders: Path, family: str) -> np.ndarray:
    """PyTorch's logits without an adapter."""
    return logits_of(torch_model(folders, family))


def logits_of(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    """PyTorch's logits."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()
