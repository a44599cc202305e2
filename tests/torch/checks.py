"""Compares a tiny random model of any model_type with transformers and PEFT on torch."""

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models

VOCAB = 61
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")

# The sizes of a tiny model, under each name that configurations have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "word_embed_proj_dim", "emb_dim"),
        32,
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "ffn_hidden_size", "block_ff_dim", "inner_dim"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4
    ),
    **dict.fromkeys(("encoder_layers", "n_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"), 2
    ),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "lru_width_per_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim_expert"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("num_shared_experts", "num_kv_shared_layers"), 1),
    **dict.fromkeys(("num_experts_per_token",), 2),
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "sliding_window": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 6,
    "state_size": 8,
    "d_state": 8,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 4,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 4,
    "mamba_chunk_size": 4,
    "lru_width": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "n_layers_per_attn_res_block": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1, 3],
    "conv_L_cache": 3,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **dict.fromkeys(_LISTS),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop"), 0.0),
    "use_cache": True,
    "is_decoder": True,
}
_LAYERS = 4
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
# What fits no other model.
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "gpt2": {"n_inner": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def _sizes(defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes of a tiny model for a configuration's fields, parts included."""
    known: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in _SIZES:
            known[name] = _SIZES[name]
        elif isinstance(value, dict) and "model_type" in value and (own := _sizes(value)):
            known[name] = {"model_type": value["model_type"], **own}
    if "qk_rope_head_dim" in known:  # the size of a head follows from its parts
        known.pop("qk_head_dim", None)
        known["num_key_value_heads"] = known.get("num_attention_heads", 4)
    return known


def _without(fields: dict[str, Any], drop: tuple[str, ...]) -> dict[str, Any]:
    """Returns fields less some, those of parts as well."""
    return {
        name: _without(each, drop) if isinstance(each, dict) else each
        for name, each in fields.items()
        if name not in drop
    }


def _in_turns(defaults: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the lists of kinds of layers, in which all kinds that there are take turns."""
    wholes = {name: defaults.get(name) for name in _LISTS}
    kinds = {name: list(dict.fromkeys(each)) for name, each in wholes.items() if each}
    return {name: (each * _LAYERS)[:_LAYERS] for name, each in kinds.items()}


def tiny_configs(model_type: str) -> Iterator[Any]:
    """Yields transformers' configurations of a tiny model; not all of them fit together."""
    import transformers

    kind = transformers.CONFIG_MAPPING[model_type]
    defaults = kind().to_dict()
    own = _OWN.get(model_type, {})
    known = _sizes(defaults) | own
    texts = {name: each for name, each in known.items() if not isinstance(each, dict)}
    texts |= {name: known[name] for name in ("text_config",) if name in known}
    heads = ("head_dim",)
    drops = (heads, ()) if "qk_rope_head_dim" in known else ((), heads)
    turns = _in_turns(defaults)
    for some in (known, texts):
        for drop in (*drops, _LISTS, (*_LISTS, "num_kv_shared_layers")):
            fields = _without(some, drop) | own
            made: dict[str, Any] = {}
            with contextlib.suppress(Exception):
                made = kind(**fields).to_dict() | own
            lacking = {
                name: each
                for name, each in turns.items()
                if not set(each) <= set(made.get(name) or ())
            }
            for lists in (lacking, {}, turns):
                with contextlib.suppress(Exception):
                    yield kind(**fields | lists)
    yield kind(**known)  # says what is wrong


def random_model(model_type: str, seed: int = 0) -> Any:
    """Returns transformers' torch model with random weights, biases and gains among them.

    It has the first of the tiny configurations with which transformers' own code runs.
    """
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    for config in tiny_configs(model_type):
        torch.manual_seed(seed)
        try:
            model = auto.from_config(config, attn_implementation="eager").float().eval()
            with torch.no_grad():
                model(torch.full((1, 8), 3), use_cache=False)
            break
        except Exception as error:
            last = error
    else:
        raise last
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point() and buffer.ndim:
                buffer.add_(0.05 * torch.randn_like(buffer))
    return model


def distance(ours: Any, theirs: Any) -> float:
    """Returns the largest difference, relative to the largest number of `theirs`, or to 1."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


def _called_linear(model: Any, kinds: tuple[type, ...]) -> list[str]:
    """Lists the linear layers that a forward pass calls, and that return a product alone.

    The kernels of others are used by hand, and PEFT's adapters of them have no effect.
    """
    import torch

    head, called = model.get_output_embeddings(), dict[Any, bool]()
    names = {part: n for n, part in model.named_modules() if isinstance(part, kinds)}

    def record(part: Any, _: Any, out: Any) -> None:
        rows = getattr(part, "out_features", None) or part.nf
        called[part] = isinstance(out, torch.Tensor) and out.shape[-1] == rows

    hooks = [part.register_forward_hook(record) for part in names if part is not head]
    with torch.no_grad():
        model(torch.full((1, 8), 3), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [name for part, name in names.items() if called.get(part)]


def adapted_by_peft(model: Any, seed: int = 1) -> Any:
    """Returns PEFT's model with an adapter of random A and B on all linear layers."""
    import peft
    import torch
    import transformers

    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = _called_linear(model, kinds)
    if "mamba" in model.config.model_type or any(n.startswith("mamba") for n in vars(model.config)):
        linear = [n for n in linear if not n.endswith("out_proj")]  # PEFT refuses it
    if any(p.ndim == 3 for p in model.parameters()):  # PEFT would take these for the experts'
        linear = [n for n in linear if n.rpartition(".")[2] not in _OF_EXPERTS]
    names = "|".join(
        map(re.escape, linear)
    )  # PEFT shortens lists, to names of other modules at times
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=names, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return adapted


def _greedy_by_torch(model: Any, ids: Any) -> np.ndarray:
    """Returns three greedy tokens of each row, for each of which torch computes the whole row.

    Of several models, transformers' own cache gives other tokens, or none.
    """
    import torch

    rows = ids
    with torch.no_grad():
        for _ in range(3):
            drawn = model(rows, use_cache=False).logits[:, -1:].argmax(-1)
            rows = torch.cat([rows, drawn], dim=1)
    tokens: np.ndarray = rows[:, ids.shape[1] :].numpy()
    return tokens


def _loss_of(logits: Any, ids: Any) -> Any:
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], axis=2))


def compare(model_type: str, folder: Path, *, generates: bool = True) -> dict[str, Any]:
    """Compares one model_type at a tiny size with torch; see tests/benchmarks/torch_models.py.

    Returns:
      The largest differences, each relative to the largest number compared, or to 1: of logits, of
      an adapter's logits, of the gradients of A and B, and of PEFT's logits by the adapter that was
      written after a step; "greedy" says whether generated tokens are equal.
    """
    import torch
    from safetensors.numpy import load_file

    from lora_jax.torch import from_torch

    reference = random_model(model_type)
    reference.save_pretrained(folder / "base")
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 11)).astype(np.int32)
    there = torch.tensor(ids, dtype=torch.long)
    facts: dict[str, Any] = {"model_type": model_type}
    began = time.perf_counter()
    fn, params = from_torch(folder / "base")
    facts["cache"] = fn.config.cache_line()
    facts["stacks"] = [f"{s.name}: {s.start}+{s.period}x{s.repeats}" for s in fn.built.stacks]
    with torch.no_grad():
        wanted = reference(there, use_cache=False).logits.numpy()
        greedy = _greedy_by_torch(reference, there) if generates else None

    adapted = adapted_by_peft(reference)
    adapted.save_pretrained(folder / "adapter")
    theirs = adapted(there, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, theirs.shape[-1]), there[:, 1:].reshape(-1)
    ).backward()
    tree = lp.load(folder / "adapter", fn, params)
    adapter, base = lj.split(tree)
    forward = lj.adapt(fn)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(adapter: Any) -> Any:
        logits = forward(lj.join(adapter, base), ids)
        return _loss_of(logits, ids), logits

    adapter = jax.device_get(adapter)  # JAX would compile a program for each shape
    off = {path: {**parts, "b": np.zeros_like(parts["b"])} for path, parts in adapter.items()}
    (_, logits), _ = step(off)
    facts["logits"] = distance(logits, wanted)
    (_, logits), gradients = step(adapter)
    gradients = jax.device_get(gradients)
    facts["adapted"] = distance(logits, theirs.detach().numpy())
    lp.save(folder / "gradients", fn, lj.join(gradients, base), task_type="CAUSAL_LM")
    ours = load_file(folder / "gradients" / "adapter_model.safetensors")
    names = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert ours.keys() == names.keys(), sorted(ours.keys() ^ names.keys())[:4]
    theirs_of = {
        n: np.zeros_like(ours[n]) if p.grad is None else p.grad.numpy() for n, p in names.items()
    }
    size = max(float(np.abs(g).max()) for g in theirs_of.values())
    facts["gradients"] = max(
        float(np.abs(ours[n] - g).max()) / max(1.0, size) for n, g in theirs_of.items()
    )
    facts["gradient_size"] = size
    stepped = jax.tree.map(lambda x, g: x - np.float32(0.3) * g, adapter, gradients)
    (_, logits), _ = step(stepped)
    lp.save(folder / "stepped", fn, lj.join(stepped, base), task_type="CAUSAL_LM")
    adapted.load_adapter(folder / "stepped", "stepped")
    adapted.set_adapter("stepped")
    with torch.no_grad():
        facts["step"] = distance(logits, adapted(there, use_cache=False).logits.numpy())
    if greedy is not None:
        drawn = models.generate(fn, params, ids, max_new_tokens=3, eos_token_id=[])
        facts["greedy"] = bool(np.array_equal(np.asarray(drawn), greedy))
    facts["seconds"] = time.perf_counter() - began
    return facts


def _expert_parameters(model: Any) -> list[str]:
    """Lists the kernels of experts that transformers' ExpertsInterface runs, and of routers."""
    names = []
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            is_experts = hasattr(owner, "has_post_expert_norm") and parameter.ndim == 3
            is_router = type(owner).__name__.lower().endswith("router") and name == "weight"
            if is_experts or is_router:
                names.append(f"{owner_name}.{name}")
    return names


def compare_experts(model_type: str, folder: Path) -> dict[str, Any]:
    """Compares an adapter of the experts and routers of one model_type with PEFT's on torch.

    Returns:
      The number of adapted parameters, and the largest differences: of logits, and of the gradients
      of A and B, each relative to its largest number; "moved" is what the adapter adds to logits.
    """
    import peft
    import torch
    from safetensors.numpy import load_file

    from lora_jax.torch import from_torch

    reference = random_model(model_type)
    reference.save_pretrained(folder / "base")
    names = _expert_parameters(reference)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=names)
    adapted = peft.get_peft_model(reference, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 11)).astype(np.int32)
    there = torch.tensor(ids, dtype=torch.long)
    theirs = adapted(there, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, theirs.shape[-1]), there[:, 1:].reshape(-1)
    ).backward()

    fn, params = from_torch(folder / "base")
    adapter, base = lj.split(lp.load(folder / "adapter", fn, params))
    forward = lj.adapt(fn, strict=True)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(adapter: Any) -> Any:
        logits = forward(lj.join(adapter, base), ids)
        return _loss_of(logits, ids), logits

    (_, logits), gradients = step(adapter)
    # The gradients are written as an adapter, by whose tensors they are compared.
    lp.save(folder / "gradients", fn, lj.join(gradients, base), task_type="CAUSAL_LM")
    ours = load_file(folder / "gradients" / "adapter_model.safetensors")
    wanted = {
        name.replace(".default", ""): np.zeros(parameter.shape)
        if parameter.grad is None
        else parameter.grad.numpy()
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    assert ours.keys() == wanted.keys(), sorted(ours.keys() ^ wanted.keys())[:4]
    wanted_logits = theirs.detach().numpy()
    size = max(float(np.abs(gradient).max()) for gradient in wanted.values())
    assert size > 0
    return {
        "n": len(names),
        "logits": distance(logits, wanted_logits),
        "moved": distance(jax.jit(fn)(params, ids), wanted_logits),
        "gradients": max(float(np.abs(ours[name] - wanted[name]).max()) / size for name in ours),
    }


def is_exact(facts: dict[str, Any]) -> bool:
    """Returns True if logits agree to 1e-4 and gradients to 1e-5, before and after a step."""
    logits = max(facts["logits"], facts["adapted"], facts["step"])
    return logits <= 1e-4 and facts["gradients"] <= 1e-5 and facts["gradient_size"] > 0
