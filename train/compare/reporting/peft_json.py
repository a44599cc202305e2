"""Runs as the result files of PEFT's method_comparison, so that figures lie beside its table.

The format is that of `method_comparison/MetaMathQA/results` in PEFT's repository. A field that was
not measured here is null, such as the number of tokens; PEFT's own `processing.py`, which makes a
table of whole numbers, wants such fields filled in.
"""

import math
from pathlib import Path
from typing import Any

from lora_jax.training.processes import write_json
from train.compare.options import METHODS
from train.compare.result import Arm, Comparison, RunResult

FOLDER = "peft"

_STATUS = {"done": "success", "failed": "failed", "stopped early": "canceled"}
_OPTIMIZERS = {"lora-fa": "lora-fa", "lora-plus": "lora+"}
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_UNKNOWN_CONFIG = (
    *("dtype", "max_seq_length", "batch_size_eval", "compile", "use_gc", "query_template"),
    *("grad_norm_clip", "lr_scheduler", "use_amp", "autocast_adapter_dtype"),
    *("generation_kwargs", "attn_implementation", "init_kv_cache_prefix"),
)
# Fields of a LoraConfig that are null here, off, or empty.
_NULL = (
    *("task_type", "auto_mapping", "peft_version", "revision", "exclude_modules", "lora_dropout"),
    *("bias", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("trainable_token_indices", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("alora_invocation_tokens", "monteclora_config", "layer_replication", "target_parameters"),
    *("use_bdlora", "arrow_config"),
)
_OFF = (
    *("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias"),
    "ensure_weight_tying",
)
_EMPTY = ("rank_pattern", "alpha_pattern", "loftq_config")
_UNKNOWN_METRICS = (
    *("valid accuracy", "train time", "eval time", "tokens / sec"),
    *("mem allocated avg", "mem reserved avg", "elapsed time"),
)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes each run that began as a result of PEFT's.

    The task's score is its "test accuracy", the memory of the compiled step its maximum, and the
    median time of a step its training time a step. Methods that no LoraConfig says are left out:
    a head alone, tiny adapters, random subspaces.

    Args:
      comparison: the measurements.
      folder: made where it is missing.

    Returns:
      The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = (run.trained_parameters for run in comparison.runs if run.arm.method == "full")
    total = next((count for count in whole if count is not None), None)
    files = []
    for run in comparison.runs:
        method = run.arm.method
        if run.status == "waiting" or (method != "full" and METHODS[method].in_peft is None):
            continue
        content = _result(comparison, run, total)
        name = content["run_info"]["experiment_name"].replace("/", "--")
        files.append(folder / f"{name}.json")
        write_json(files[-1], content)
    return files


def _result(comparison: Comparison, run: RunResult, total: int | None) -> dict[str, Any]:
    facts, arm = comparison.facts, run.arm
    last = _metrics(run, run.steps)
    last |= {"test accuracy": _number(run.score), "train total tokens": None}
    last["forgetting"] = _number(run.forgotten)
    on_the_way = [
        _metrics(run, point.step) | dict.fromkeys(_UNKNOWN_METRICS) for point in run.held_out
    ]
    added = 0 if arm.method == "full" else run.trained_parameters
    versions = {name.lower(): version for name, version in facts.versions.items()}
    packages = {f"{name}-version": versions.get(name) for name in (*_PACKAGES, *versions)}
    method = "full-finetuning" if arm.method == "full" else "lora"
    steps = [point.step for point in run.held_out]
    return {
        "run_info": {
            "created_at": facts.date,
            "total_time": run.seconds,
            "experiment_name": f"{method}/{run.name}",
            "peft_branch": None,
            "train_config": {
                "model_id": facts.model,
                "batch_size": arm.batch_size,
                "max_steps": facts.steps,
                "eval_steps": steps[0] if steps else None,
                "seed": run.seed,
                "optimizer_type": _OPTIMIZERS.get(arm.method),
                "optimizer_kwargs": {"lr": arm.learning_rate},
                **dict.fromkeys(_UNKNOWN_CONFIG),
            },
            "peft_config": None if arm.method == "full" else _peft_config(arm, facts.model),
            "error_msg": run.error or "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": run.compiled_bytes,
            "accelerator_memory_reserved_99th": None,
            "train_time": run.step_seconds and run.step_seconds * run.steps,
            "file_size": run.saved_bytes,
            "num_trainable_params": run.trained_parameters,
            "num_total_params": None if total is None or added is None else total + added,
            "status": _STATUS[run.status],
            "metrics": [*on_the_way, last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {facts.dataset: {"sha": None, "created_at": None}},
            "package_info": packages | {f"{name}-commit-hash": None for name in _PACKAGES},
            "system_info": {
                **dict.fromkeys(("system", "release", "version", "machine", "processor")),
                "accelerator": facts.machine,
            },
            "pytorch_info": None,
        },
    }


def _metrics(run: RunResult, step: int) -> dict[str, object]:
    """Returns the fields of both kinds of metrics: the training loss up to a step, and its rows."""
    until = [point.value for point in run.losses if point.step <= step]
    return {
        "step": step,
        "train loss": _number(until[-1]) if until else None,
        "train samples": step * run.arm.batch_size,
    }


def _number(value: float | None) -> float | None:
    """Returns a number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def _peft_config(arm: Arm, model: str) -> dict[str, Any]:
    """Returns the fields of PEFT's LoraConfig."""
    targets: Any = list(arm.targets or ())
    return {
        **dict.fromkeys(_NULL),
        **dict.fromkeys(_OFF, False),
        **{name: {} for name in _EMPTY},
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "r": arm.rank,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "lora_alpha": arm.alpha,
        "init_lora_weights": True,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        **(METHODS[arm.method].in_peft or {}),
    }
