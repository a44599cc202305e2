"""Steps of tiny models, compiled for NVIDIA GPUs that are not here; each once for all tests."""

import dataclasses
import functools
import json
import math
import re
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest

from train.plan import __main__ as plan
from train.plan.compile import PreparedStep, prepare
from train.plan.job import PlanJob

# No two sizes of a layer are equal, nor equal to a row's length.
DENSE = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MODELS = {
    "dense": DENSE,
    "mixture": DENSE
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    | {"sliding_window": None},
    "experts in mxfp4": DENSE
    | {"model_type": "gpt_oss", "intermediate_size": 192, "sliding_window": 128}
    | {"num_local_experts": 16, "num_experts_per_tok": 2}
    | {"quantization_config": {"quant_method": "mxfp4"}},
    "windows": DENSE
    | {"model_type": "gemma2", "sliding_window": 320, "query_pre_attn_scalar": 64}
    | {"attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
}
_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step, and what it was compiled from."""

    job: PlanJob
    prepared: PreparedStep
    compiled: Any
    text: str

    @property
    def memory(self) -> Any:
        return self.compiled.memory_analysis()

    @functools.cached_property
    def floats(self) -> set[tuple[int, ...]]:
        """The shapes of all floating arrays of the HLO, inside fusions as well."""
        found = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", self.text)
        return {tuple(map(int, sizes.split(","))) for sizes in found}


def need_compiler() -> None:
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("the GPU's compiler is not installed")
    if find_spec("jax_triton") is None:
        pytest.skip("the compiler of the GPU's kernel is not installed: Python 3.12 has it")


@functools.cache
def compiled(model: str, topology: str, *options: Any) -> Step:
    """Compiles the step that `train.plan` plans, and prints how long that takes."""
    need_compiler()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(MODELS[model]))
        words = ["--model", path, "--topology", topology, "--targets", "all-linear", "--rank", 8]
        words += [*options, *(() if "--adapters" in options else ("--alone",))]
        asked = plan.parse(list(map(str, words)))
        plan.check_options(asked)
        job, optim = plan.make_job(asked.plan)
    with jax.numpy_dtype_promotion("standard"):
        prepared = prepare(job, plan.variants_to_plan(asked)[0], optim)
    began = time.perf_counter()
    made = prepared.lowered.compile()
    print(f"{model} on {topology} {options}: compiled in {time.perf_counter() - began:.1f} s")
    return Step(job, prepared, made, made.as_text())


def bytes_of(tree: Any) -> int:
    """Counts the bytes of a tree's arrays on one device; codes of 4 bits are half a byte."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        name = leaf.dtype.name
        total += size * (0.5 if name.endswith("int4") else leaf.dtype.itemsize)
    return round(total)
