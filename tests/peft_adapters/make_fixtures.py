"""Writes the fixtures beside this file: tiny models, adapters by PEFT, and PEFT's logits.

    python -m tests.peft_adapters.make_fixtures

Needs the extra "parity". The fixtures let tests check parity without PyTorch.
"""

import shutil
from pathlib import Path

import numpy as np

from tests.peft_adapters import models

FIXTURES = Path(__file__).parent / "fixtures"
# name -> (family, fields of LoraConfig)
ADAPTERS: dict[str, tuple[str, dict]] = {
    "ranks-alphas-rslora": (
        "llama",
        {
            "target_modules": models.LLAMA_LINEAR,
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 1},
            "alpha_pattern": {"down_proj": 2},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "tokens-biases": (
        "llama",
        {"target_modules": ["k_proj"], "trainable_token_indices": [5, 3], "bias": "all"},
    ),
    "embedding-head": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"], "layers_to_transform": None},
    ),
    "tied-head": ("qwen2", {"target_modules": ["lm_head", "v_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "bert": (
        "bert",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "layers_to_transform": [1]},
    ),
}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 31}
SMALL_GPT2 = {"n_embd": 8, "n_layer": 2, "vocab_size": 31}
IDS = np.random.default_rng(5).integers(3, 31, (2, 7))


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    models.IDS = IDS
    for family, (config, model, fields) in models.FAMILIES.items():
        smaller = SMALL_GPT2 if family == "gpt2" else SMALL
        models.FAMILIES[family] = (config, model, fields | smaller)
    for name, (family, options) in ADAPTERS.items():
        folder = FIXTURES / name
        model = models.write_model(family, FIXTURES / "models" / family)
        adapted = models.with_adapter(model, {"r": 3, "lora_alpha": 7} | options)
        np.save(_made(folder) / "logits.npy", models.logits_of(adapted))
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    for path in FIXTURES.rglob("generation_config.json"):
        path.unlink()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
