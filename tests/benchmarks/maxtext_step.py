"""Compiles MaxText's training step with qwix's LoRA for a slice of TPUs, and writes its HLO.

    python -P tests/benchmarks/maxtext_step.py OUT TOKENS

OUT gets the optimised HLO. It runs in an environment with MaxText (``pip install maxtext[tpu]``),
not with this project: see `tests.benchmarks.estimates_maxtext`. MaxText's own compilation ahead of
time knows no LoRA, so its models get here what its fine-tuning gives them: qwix's factors,
replicated.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import lora_utils, model_creation_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

CONFIG = Path(MAXTEXT_CONFIGS_DIR) / "base.yml"
OPTIONS = [
    "run_name=estimate",
    "model_name=llama3.1-8b",
    "compile_topology=v5e-16",
    "compile_topology_num_slices=1",
    "ici_fsdp_parallelism=16",
    "per_device_batch_size=1",
    "dtype=bfloat16",
    "weight_dtype=bfloat16",
    "attention=flash",
    "remat_policy=full",
    "opt_type=adamw",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
    "lora={enable_lora: true, lora_rank: 16, lora_alpha: 32}",
]


def with_lora(create: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """Returns MaxText's factory of models, whose models have qwix's factors."""

    def factory(config: Any, *args: Any, **options: Any) -> Callable[[], Any]:
        plain = create(config, *args, **options)

        def made() -> Any:
            model = plain()
            # All tokens of a row: its kernel of attention refuses a single one.
            ids = jnp.zeros((config.micro_batch_size_to_train_on, config.max_target_length), int)
            provider = lora_utils._build_lora_provider(config)
            inputs = {"decoder_input_tokens": ids, "decoder_positions": ids}
            rngs = getattr(model.decoder, "rngs", None)
            model = qwix.apply_lora_to_model(model, provider, **inputs, rngs=rngs)
            whole = jax.sharding.PartitionSpec()
            for _, part in nnx.iter_graph(model):
                if "qwix_rngs" in getattr(part, "__dict__", {}):
                    del part.qwix_rngs
                if isinstance(part, nnx.LoRAParam):
                    part.set_metadata(sharding=whole, out_sharding=None, sharding_names=None)
            return model

        return made

    return factory


def main() -> None:
    out, tokens = sys.argv[1:]
    compile_step = train_compile.jit_and_compile

    def written(*args: Any) -> Any:
        compiled = compile_step(*args)
        Path(out).write_text(compiled.as_text())
        return compiled

    train_compile.jit_and_compile = written
    create = model_creation_utils.get_nnx_create_model_fn
    model_creation_utils.get_nnx_create_model_fn = with_lora(create)
    train_compile.main(["", str(CONFIG), f"max_target_length={tokens}", *OPTIONS])


if __name__ == "__main__":
    main()
