"""The cases: models, sizes, what is adapted, and who takes part."""

import dataclasses
from typing import Any

LLAMA_TARGETS = {
    "all-linear": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    "q,v": ("q_proj", "v_proj"),
}
BERT_TARGETS = {"all-linear": ("query", "key", "value", "dense")}

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
}

# Shapes of models with random weights; the others are pretrained: see weights.py.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny Llama": _LLAMA
    | {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "tiny BERT": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A computation that all of its contenders do.

    Attributes:
      name: the name on the command line.
      title: the name in tables.
      kind: "train" (steps of a language model), "classify" (steps of an encoder), "decode" (greedy
        generation), "start" (a fresh process until its first step is done) or "import".
      contenders: names; the first is the reference, which takes turns with each of the others.
      model: pretrained, or a key of SHAPES.
      batch, seq: rows, and tokens a row (of the prompt).
      new_tokens: tokens to decode.
      rank, alpha: of the adapter.
      targets: "all-linear" or "q,v".
      remat: recompute each layer in the backward pass, in JAX the logits as well.
      dtype: dtype of weights and computation.
      attention: attention of the JAX models.
      tolerance: relative difference of losses that counts as agreement.
    """

    name: str
    title: str
    kind: str
    contenders: tuple[str, ...]
    model: str = "SmolLM2-135M"
    batch: int = 4
    seq: int = 128
    new_tokens: int = 0
    rank: int = 8
    alpha: float = 16
    targets: str = "all-linear"
    remat: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    tolerance: float = 2e-4

    @property
    def target_modules(self) -> list[str]:
        """The adapted modules' names, as PEFT takes them."""
        table = BERT_TARGETS if self.kind == "classify" else LLAMA_TARGETS
        return list(table[self.targets])


EVERYONE = ("lora_jax", "peft", "peft-compiled", "qwix", "quax", "naive", "full", "torch-full")


def _smollm2(name: str, sizes: str, **changes: Any) -> Case:
    fields = {"kind": "train", "contenders": EVERYONE} | changes
    targets = "q and v" if fields.get("targets") == "q,v" else "all linear"
    kept = ", remat" if fields.get("remat") else ""
    return Case(name=name, title=f"SmolLM2-135M, {sizes}, {targets}{kept}", **fields)


def _llama(name: str, model: str, seq: int) -> Case:
    return Case(
        name=name,
        title=f"{model} shapes, 1 × {seq:,}, bf16, remat",
        kind="train",
        model=model,
        contenders=("lora_jax", "peft", "peft-compiled", "unsloth"),
        batch=1,
        seq=seq,
        rank=16,
        alpha=32,
        remat=True,
        dtype="bfloat16",
        tolerance=2e-2,
    )


_DECODE = {"kind": "decode", "batch": 16, "seq": 96, "new_tokens": 64, "rank": 16, "alpha": 32}
CPU_CASES = [
    _smollm2("4x128", "4 × 128"),
    _smollm2("4x128-remat", "4 × 128", remat=True),
    _smollm2("4x128-qv", "4 × 128", targets="q,v"),
    _smollm2("1x2048", "1 × 2,048", batch=1, seq=2048),
    _smollm2("1x2048-remat", "1 × 2,048", batch=1, seq=2048, remat=True),
    _smollm2("1x2048-qv", "1 × 2,048", batch=1, seq=2048, targets="q,v"),
    Case(
        name="minilm",
        title="MiniLM, classifying 32 × 64, all linear",
        kind="classify",
        model="MiniLM",
        contenders=EVERYONE,
        batch=32,
        seq=64,
    ),
    Case(
        name="decode-adapter",
        title="SmolLM2-135M, decoding 16 × (96 + 64), live adapter",
        contenders=("lora_jax", "merged", "peft"),
        **_DECODE,
    ),
    Case(
        name="decode-base",
        title="SmolLM2-135M, decoding 16 × (96 + 64), no adapter",
        contenders=("base", "torch-base"),
        **_DECODE,
    ),
    Case(
        name="start",
        title="SmolLM2-135M, 4 × 128: a fresh process to its first step",
        kind="start",
        contenders=("lora_jax", "peft", "qwix", "quax", "naive", "full"),
    ),
    Case(
        name="import",
        title="the import statement",
        kind="import",
        contenders=("lora_jax", "jax", "optax", "peft", "qwix", "quax"),
    ),
]
GPU_CASES = [
    _llama("1b-2048", "Llama-3.2-1B", 2048),
    _llama("1b-8192", "Llama-3.2-1B", 8192),
    _llama("8b-2048", "Llama-3.1-8B", 2048),
    _llama("8b-8192", "Llama-3.1-8B", 8192),
]
CASES = {case.name: case for case in (*CPU_CASES, *GPU_CASES)}


def shrunk(case: Case) -> Case:
    """Returns a case of the same form that takes milliseconds, on tiny random weights."""
    return dataclasses.replace(
        case,
        title=f"tiny: {case.title}",
        model="tiny BERT" if case.kind == "classify" else "tiny Llama",
        batch=2,
        seq=min(case.seq, 24),
        new_tokens=min(case.new_tokens, 5),
        rank=2,
        alpha=4,
    )
