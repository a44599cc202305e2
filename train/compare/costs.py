"""Costs of the best arms: a step's memory and time, an answer's time, and a machine's price.

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

STEPS = 16  # of a timed run
_ROWS, _PROMPT, _TOKENS, _LENGTH = 8, 64, 16, 128
_ROUNDS = 7
_ROOT = Path(__file__).parents[2]  # of the scripts
_PYTHON = (sys.executable, "-P", "-m")  # what the working folder holds comes first without -P


def step_cost(trial: Trial, folder: Path, session: Session) -> dict[str, Any]:
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
    script, output = trial.script, folder / trial.name
    changes = {"steps": STEPS, "epochs": None, "output": str(output), "report_to": ("none",)}
    changes |= {"log_every": 1}  # so that no step ends together with the next
    changes |= {"save_every": STEPS, "score_every": 0, "eval_every": 0, "eval_questions": 0}
    changes |= {"eval_dataset": None}  # which is measured with --eval-every alone
    config = replace_options(trial.config, changes)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.default_backend() == "cpu":
        options = folder / f"{trial.name}.yaml"
        options.write_text(options_file(config, script), encoding="utf-8")
        command = [*_PYTHON, script, "--config", str(options), "--output", str(output)]
        _output_of([*command, "--overwrite"])
    else:
        with session.part():
            finetune(script, replace_options(config, {"overwrite": True}), trial.task, session)
    report = read_json(output / REPORT)
    memory = report["compiled_bytes"]
    low, high = report["step_seconds_quartiles"] or (None, None)
    return {
        "step_seconds": report["median_step_seconds"],
        "step_seconds_low": low,
        "step_seconds_high": high,
        "compiled_bytes": memory["arguments"] + memory["temporaries"] if memory else None,
        "peak_bytes": report["peak_bytes"],
    }


def plan_result(
    trial: Trial, topology: str, price: float | None, tokens_a_row: int
) -> tuple[PlanResult, str]:
    """Plans a run for a machine that is not there; see `train.plan`.

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
    optim, adapter, data = trial.config.optim, trial.config.adapter, trial.config.data
    rows = optim.batch_size * optim.grad_accum * trial.steps
    command = [
        *(*_PYTHON, "train.plan", "--model", data.model, "--topology", topology),
        *("--batch-size", optim.batch_size, "--grad-accum", optim.grad_accum),
        *("--seq-len", tokens_a_row, "--tokens", rows * tokens_a_row, "--dtype", optim.dtype),
        *("--remat", optim.remat or AUTO, "--optimizer", optim.optimizer, "--alone", "--json"),
    ]
    if adapter.full:
        command.append("--full")
    else:
        command += ["--rank", adapter.rank, "--targets", *adapter.targets]
        for variant in adapter.variants:
            command.append(flag(variant.option))
            for name, value in adapter.settings_of(variant).items():
                command += [flag(name), value]
    if price is not None:
        command += ["--price", price]
    made = json.loads(_output_of([str(word) for word in command]))
    if not made["fits"]:
        raise UserError(
            f"{topology} does not hold {trial.name}: {made['refused'] or made['failed']}"
        )
    bytes_of_chip = made["per_chip_bytes"]["total"]
    plan = PlanResult(
        trial.arm, bytes_of_chip, made["step_seconds"], made["chip_hours"], made["cost"]
    )
    words = f"{topology} ({made['chips']} chips), at {made['utilisation']:.0%} of its peak"
    return plan, words if price is None else f"{words}, {price:g} a chip-hour"


def answer_latency(arm: Arm, model: Any, plain: Tree, adapted: Tree, decodes: bool) -> Latency:
    """Times an answer of the base, of the merged adapter, and of the adapter beside the base.

    The three ways take turns for several rounds, each of which begins with another way.

    Args:
      arm: the adapter's.
      model: the model.
      plain: its parameters without an adapter.
      adapted: its parameters with the adapter.
      decodes: whether the model answers token by token; else it reads texts or images.
    """
    inputs, what = _inputs_of(model.config, decodes)
    ways: list[tuple[Forward, Tree]] = [
        (model.apply, plain),
        (model.apply, lj.merge(adapted)),
        (lj.adapt(model.apply), adapted),
    ]
    answering = functools.partial(_decoding, model) if decodes else _reading
    timed = [answering(params, inputs, apply) for apply, params in ways]
    for run in timed:
        run()  # compiles
    medians: list[list[float]] = [[] for _ in timed]  # of each way, round by round
    for turn in range(_ROUNDS):
        for way in range(len(timed)):
            place = (turn + way) % len(timed)
            medians[place].append(statistics.median(timed[place]()))
    base, merged, live = medians
    return Latency(
        arm=arm,
        base=statistics.median(base),
        merged=statistics.median(merged),
        live=statistics.median(live),
        what=what,
        merged_ratio=ratio_of(merged, base),
        live_ratio=ratio_of(live, base),
    )


def _inputs_of(config: Any, decodes: bool) -> tuple[np.ndarray, str]:
    """Returns the inputs of an answer, and what is timed, in words."""
    rng = np.random.default_rng(0)
    if isinstance(config, models.VisionConfig):
        shape = (_ROWS, config.num_channels, *config.image_size)
        return rng.normal(size=shape).astype(np.float32), f"{_ROWS} images"
    length = _PROMPT if decodes else min(_LENGTH, config.max_tokens)
    ids = rng.integers(1, min(config.vocab_size, 1000), (_ROWS, length), dtype=np.int32)
    if decodes:
        return ids, f"a decoding step of {_ROWS} rows"
    return ids, f"{_ROWS} texts of {length} tokens"


def ratio_of(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Returns the ratio of times to others of the same rounds."""
    ratios = [time / other for time, other in zip(times, others, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def saved_base_bytes(plain: Tree, folder: Path) -> int | None:
    """Returns the bytes of a base's files, saved as a run of full fine-tuning saves its model.

    Args:
      plain: the parameters of the base.
      folder: a folder in which the files are written, and then deleted.

    Returns:
      The bytes; None for weights in codes, which full fine-tuning does not save as they are.
    """
    if any(map(is_coded, jax.tree.leaves(plain, is_leaf=is_coded))):
        return None
    whole = lj.lorafy(plain, [lj.TrainRule(targets=".*")])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        lj.save_adapter(Path(name) / "base", whole)
        return folder_bytes(Path(name))


def _decoding(
    model: models.Decoder, params: Tree, ids: np.ndarray, apply: Forward
) -> Callable[[], list[float]]:
    def run() -> list[float]:
        tokens: Iterator[np.ndarray] = models.stream(
            model, params, ids, max_new_tokens=_TOKENS, eos_token_id=(), apply=apply
        )
        times = [time.perf_counter() for _ in tokens]
        return [after - before for before, after in itertools.pairwise(times)]

    return run


def _reading(params: Tree, ids: np.ndarray, apply: Forward) -> Callable[[], list[float]]:
    forward = jax.jit(lambda params, ids: apply({"params": params}, ids))

    def run() -> list[float]:
        times = [time.perf_counter()]
        for _ in range(5):
            jax.block_until_ready(forward(params, ids))
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]

    return run


def _output_of(command: Sequence[str]) -> str:
    """Runs a command; returns what it printed.

    Raises:
      UserError: it failed; holds the end of what it said.
    """
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        tail = " ".join(done.stderr.split())[-500:]
        raise UserError(
            f"{' '.join(command[command.index('-m') :])} ended with code {done.returncode}: {tail}"
        )
    return done.stdout
