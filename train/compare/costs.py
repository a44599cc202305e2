"""Measures the costs of the best arms: memory and time of a step, answer times, and prices.

A step is timed by the script itself, in a process of its own: what other runs left in memory does
not count, and neither does what trains beside them.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax import models
from lora_jax.core.types import Forward, Tree
from lora_jax.quantized import is_coded
from train.compare.result import Arm, Latency, PlanResult, Ratio
from train.compare.trials import Trial
from train.console.errors import UserError, flag
from train.finetune import finetune
from train.options.common import AUTO
from train.options.file import replace_options
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.output import REPORT, folder_bytes
from train.settings.files import options_file

TIMED_STEPS = 16
_ANSWER_ROWS = 8  # of a timed answer
_PROMPT_TOKENS = 64
_NEW_TOKENS = 16
_TEXT_TOKENS = 128  # at most
_TIMING_ROUNDS = 7
_PASSES_PER_ROUND = 5
_ROOT = Path(__file__).parents[2]  # of the scripts
_PYTHON = (sys.executable, "-P", "-m")  # what the working folder holds comes first without -P


def measure_step_cost(trial: Trial, folder: Path, session: Session) -> dict[str, Any]:
    """Trains a few steps of a run in a process of its own.

    An accelerator belongs to this process: there, the run is trained in it.

    Args:
      trial: the run.
      folder: for the run's files, and what it printed.
      session: tells of signals.

    Returns:
      The fields of `RunResult` about a step: "step_seconds" with its quartiles, "compiled_bytes"
      and "peak_bytes". Compilations of further shapes are no part of a step's time.

    Raises:
      UserError: the process failed.
    """
    script = trial.script
    output = folder / trial.name
    changes = {
        "steps": TIMED_STEPS,
        "epochs": None,
        "output": str(output),
        "report_to": ("none",),
        "log_every": 1,  # so that no step ends together with the next
        "save_every": TIMED_STEPS,
        "score_every": 0,
        "eval_every": 0,
        "eval_questions": 0,
        "eval_dataset": None,  # which is measured with --eval-every alone
    }
    config = replace_options(trial.config, changes)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.default_backend() == "cpu":
        config_path = folder / f"{trial.name}.yaml"
        config_path.write_text(options_file(config, script), encoding="utf-8")
        command = [*_PYTHON, script, "--config", str(config_path), "--output", str(output)]
        _run_command([*command, "--overwrite"])
    else:
        with session.part():
            finetune(script, replace_options(config, {"overwrite": True}), trial.task, session)
    report = read_json(output / REPORT)
    memory = report["compiled_bytes"]
    low_seconds, high_seconds = report["step_seconds_quartiles"] or (None, None)
    return {
        "step_seconds": report["median_step_seconds"],
        "step_seconds_low": low_seconds,
        "step_seconds_high": high_seconds,
        "compiled_bytes": memory["arguments"] + memory["temporaries"] if memory else None,
        "peak_bytes": report["peak_bytes"],
    }


def plan_for_topology(
    trial: Trial, topology: str, price: float | None, tokens_a_row: int
) -> tuple[PlanResult, str]:
    """Plans a run for another machine; see `train.plan`.

    Args:
      trial: the run.
      topology: the machine.
      price: price of a chip-hour.
      tokens_a_row: the length of a sequence.

    Returns:
      The plan, and the machine in words.

    Raises:
      UserError: there is no such machine, or it does not hold the run's arrays.
    """
    optim = trial.config.optim
    n_rows = optim.batch_size * optim.grad_accum * trial.steps
    options = {
        "--model": trial.config.data.model,
        "--topology": topology,
        "--batch-size": optim.batch_size,
        "--grad-accum": optim.grad_accum,
        "--seq-len": tokens_a_row,
        "--tokens": n_rows * tokens_a_row,
        "--dtype": optim.dtype,
        "--remat": optim.remat or AUTO,
        "--optimizer": optim.optimizer,
    }
    command = [*_PYTHON, "train.plan"]
    for option, value in options.items():
        command += [option, str(value)]
    command += ["--alone", "--json", *_adapter_arguments(trial.config.adapter)]
    if price is not None:
        command += ["--price", str(price)]
    plan = json.loads(_run_command(command))
    if not plan["fits"]:
        raise UserError(
            f"{trial.name} does not fit on {topology}: {plan['refused'] or plan['failed']}. Use a "
            "larger --topology."
        )
    topology_plan = PlanResult(
        arm=trial.arm,
        bytes_per_device=plan["per_chip_bytes"]["total"],
        step_seconds=plan["step_seconds"],
        device_hours=plan["chip_hours"],
        cost=plan["cost"],
    )
    source = f"at {plan['utilisation']:.0%} of its peak"
    if plan["estimated_seconds"] is not None:
        source = "by its compiler's estimate"
    machine = f"{topology} ({plan['chips']} chips), {source}"
    if price is not None:
        machine += f", {price:g} a chip-hour"
    return topology_plan, machine


def _adapter_arguments(adapter: Any) -> list[str]:
    """Returns the command-line arguments for an adapter's options, or for full fine-tuning."""
    if adapter.full:
        return ["--full"]
    arguments = ["--rank", str(adapter.rank), "--targets", *adapter.targets]
    for variant in adapter.variants:
        arguments.append(flag(variant.option))
        for name, value in adapter.settings_of(variant).items():
            arguments += [flag(name), str(value)]
    return arguments


def measure_answer_latency(
    arm: Arm, model: Any, base_params: Tree, adapted_params: Tree, decodes: bool
) -> Latency:
    """Times an answer of the base, of the merged adapter, and of the adapter beside the base.

    The three programs take turns for several rounds, each of which begins with another program.

    Args:
      arm: the adapter's.
      model: the model.
      base_params: its parameters without an adapter.
      adapted_params: its parameters with the adapter.
      decodes: whether the model answers token by token; else it reads texts or images.
    """
    inputs, description = _make_answer_inputs(model.config, decodes)
    timer_of = functools.partial(_make_decoding_timer, model) if decodes else _make_forward_timer
    adapted_apply: Forward = lj.adapt(model.apply)
    timers = [
        timer_of(base_params, inputs, model.apply),
        timer_of(lj.merge(adapted_params), inputs, model.apply),
        timer_of(adapted_params, inputs, adapted_apply),
    ]
    for timer in timers:
        timer()  # compiles
    medians: list[list[float]] = [[] for _ in timers]  # of each program, round by round
    # Each round begins with another program, so that drift affects all programs alike.
    for round_index in range(_TIMING_ROUNDS):
        for offset in range(len(timers)):
            program = (round_index + offset) % len(timers)
            seconds = timers[program]()
            medians[program].append(statistics.median(seconds))
    base, merged, live = medians
    return Latency(
        arm=arm,
        base=statistics.median(base),
        merged=statistics.median(merged),
        live=statistics.median(live),
        what=description,
        merged_ratio=compare_times(merged, base),
        live_ratio=compare_times(live, base),
    )


def _make_answer_inputs(config: Any, decodes: bool) -> tuple[np.ndarray, str]:
    """Returns random inputs of the model, and a description of the answer that is timed."""
    rng = np.random.default_rng(0)
    if isinstance(config, models.VisionConfig):
        shape = (_ANSWER_ROWS, config.num_channels, *config.image_size)
        return rng.normal(size=shape).astype(np.float32), f"{_ANSWER_ROWS} images"
    n_tokens = _PROMPT_TOKENS if decodes else min(_TEXT_TOKENS, config.max_tokens)
    ids = rng.integers(1, min(config.vocab_size, 1000), (_ANSWER_ROWS, n_tokens), dtype=np.int32)
    if decodes:
        return ids, f"a decoding step of {_ANSWER_ROWS} rows"
    return ids, f"{_ANSWER_ROWS} texts of {n_tokens} tokens"


def compare_times(seconds: Sequence[float], base_seconds: Sequence[float]) -> Ratio:
    """Returns the ratio of times to the base's times in the same rounds."""
    ratios = [time / base_time for time, base_time in zip(seconds, base_seconds, strict=True)]
    return Ratio(median=statistics.median(ratios), low=min(ratios), high=max(ratios))


def saved_base_bytes(base_params: Tree, folder: Path) -> int | None:
    """Returns the bytes of a base's files, saved as a run of full fine-tuning saves its model.

    Args:
      base_params: the parameters of the base.
      folder: a folder in which the files are written, and then deleted.

    Returns:
      The bytes; None for weights in codes, which full fine-tuning does not save as they are.
    """
    leaves = jax.tree.leaves(base_params, is_leaf=is_coded)
    if any(is_coded(leaf) for leaf in leaves):
        return None
    trained_params = lj.lorafy(base_params, [lj.TrainRule(targets=".*")])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        lj.save_adapter(Path(name) / "base", trained_params)
        return folder_bytes(Path(name))


def _make_decoding_timer(
    model: models.Decoder, params: Tree, ids: np.ndarray, apply: Forward
) -> Callable[[], list[float]]:
    """Returns a function that decodes tokens, and returns the seconds of each after the first."""

    def step_seconds() -> list[float]:
        tokens: Iterator[np.ndarray] = models.stream(
            model, params, ids, max_new_tokens=_NEW_TOKENS, eos_token_id=(), apply=apply
        )
        times = [time.perf_counter() for _ in tokens]
        return [end - start for start, end in itertools.pairwise(times)]

    return step_seconds


def _make_forward_timer(params: Tree, ids: np.ndarray, apply: Forward) -> Callable[[], list[float]]:
    """Returns a function that runs some forward passes, and returns the seconds of each."""
    forward = jax.jit(lambda params, ids: apply({"params": params}, ids))

    def pass_seconds() -> list[float]:
        times = [time.perf_counter()]
        for _ in range(_PASSES_PER_ROUND):
            jax.block_until_ready(forward(params, ids))
            times.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(times)]

    return pass_seconds


def _run_command(command: Sequence[str]) -> str:
    """Runs a command and returns its standard output.

    Raises:
      UserError: it failed; holds the end of what it said.
    """
    python_path = str(_ROOT)
    inherited_path = os.environ.get("PYTHONPATH")
    if inherited_path:
        python_path += os.pathsep + inherited_path
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path}
    )
    if process.returncode:
        module_command = " ".join(command[command.index("-m") :])
        error_end = " ".join(process.stderr.split())[-500:]
        raise UserError(f"{module_command} ended with code {process.returncode}: {error_end}")
    return process.stdout
