"""Measures and prints the costs of a run: its memory, time, and size on disk."""

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lora_jax.models import VisionConfig
from lora_jax.quantized import bytes_of
from lora_jax.training.processes import write_json
from lora_jax.training.run.best import Best
from lora_jax.training.run.log import duration
from train.console.errors import flag
from train.console.output import tell
from train.console.program import program
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.log import read_metrics
from train.run.output import FACTS, PROCESS_SECONDS
from train.run.pretrained import ModelInfo

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "lora_jax")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's results depend on."""
    versions_by_package = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions_by_package[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions_by_package


def tree_bytes(tree: Any) -> int:
    """Returns the size of all arrays of a tree in bytes. The leaves may be abstract.

    Two quantized values of 4 bits take one byte, as on accelerators.
    """
    return sum(map(bytes_of, jax.tree.leaves(tree)))


def byte_size(size: float) -> str:
    """Formats a number of bytes, such as "19.6 MB", or "3.2 kB" below a megabyte."""
    return f"{size / 1e3:.1f} kB" if size < 999_950 else f"{size / 1e6:,.1f} MB"


def step_time(seconds: float) -> str:
    """Formats the time of a step, such as "5.9 ms", or "7.83 s" from a second on."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:,.2f} s"


def print_costs(console: Console, report: Mapping[str, Any]) -> None:
    """Prints a table of a run's time, memory, and size on disk."""
    table = Table(title="Cost of the run", show_header=False)
    memory = report["compiled_bytes"]
    seconds = report["median_step_seconds"]
    if seconds is None:
        step = "no step taken"
    else:
        step = step_time(seconds)
    step_bytes = report.get("compiled_step_bytes")
    device_peak = report.get("device_peak_bytes")
    estimate = report.get("estimated_step_seconds")
    lines = [
        ("step (median)", step),
        ("step, as the compiler estimates", None if estimate is None else step_time(estimate)),
        ("compilation of the step", f"{report['compile_seconds']:.1f} s"),
        ("further compilations", f"{report['further_compile_seconds']:.1f} s"),
        ("compiled: temporaries", byte_size(memory["temporaries"]) if memory else "not reported"),
        ("compiled: arguments", byte_size(memory["arguments"]) if memory else "not reported"),
        ("compiled: step in total", None if step_bytes is None else byte_size(step_bytes)),
        ("peak memory of a device", None if device_peak is None else byte_size(device_peak)),
        ("peak memory of the process", byte_size(report["peak_bytes"])),
        ("adapter on disk", byte_size(report["adapter_bytes"])),
        ("base in memory", byte_size(report["base_bytes"])),
    ]
    for name, value in lines:
        if value is not None:
            table.add_row(name, value)
    console.print(table)


def print_best(console: Console, best: Best, patience: int | None) -> None:
    """Prints the best step, and the reason if the run ended early."""
    standing = best.standing
    if standing.value is None:
        sentence = f"{best.metric} was never measured, so the saved adapter is the last one"
    else:
        sentence = f"the best {best.metric} is {standing.value:.4g}, at step {standing.step}"
    if best.is_over:
        sentence = (
            f"the run ended early, because {best.metric} did not improve for {standing.waited} "
            f"measurements ({flag('patience', patience)}); {sentence}"
        )
    tell(console, sentence)


def ask_words(outline: ModelInfo) -> tuple[str, ...]:
    """Returns the module and the arguments, without --adapter, of a command that uses a model."""
    if "head" in outline.head:
        is_of_images = isinstance(outline.config, VisionConfig)
        return "train.predict", "IMAGE" if is_of_images else "TEXT"
    if outline.tokenizer.chat_template is None:
        return "train.generate", "--prompt", "TEXT"
    return "train.generate", "--interactive"


def print_commands(console: Console, adapter: Path, ask: Sequence[str], *, merged: bool) -> None:
    """Prints the commands that use and that export the trained model.

    Args:
      console: console to print to.
      adapter: the adapter's folder.
      ask: the words of the command that uses the model; see `ask_words`.
      merged: whether the model can only be exported as a merged model.
    """
    export = ["train.export", "--output", str(adapter.parent / "exported")]
    if merged:
        export.append("--merged")
    commands = {"to use it": ask, "to export it": export}
    for purpose, (module, *arguments) in commands.items():
        command = program(module, "--adapter", str(adapter), *arguments)
        tell(console, f"{purpose}: {command}")


def print_adapter(console: Console, adapter: Path, report: Mapping[str, Any]) -> None:
    """Prints an adapter's folder and size on disk, and the base's size in memory."""
    tell(
        console,
        f"adapter saved in {adapter} ({byte_size(report['adapter_bytes'])}; "
        f"the base takes {byte_size(report['base_bytes'])} in memory)",
    )


def note_seconds(folder: Path, session: Session) -> None:
    """Writes the seconds that this process has worked so far to the facts of a run.

    A killed earlier process worked at least until its last line of metrics. Nothing is written if
    there are no facts, or if they cannot be written.

    Args:
      folder: the folder of a run that has begun.
      session: the session of this process.
    """
    facts = read_json(folder / FACTS)
    if not facts:
        return
    seconds_by_process = facts.setdefault(PROCESS_SECONDS, {})
    process = str(session.began_at)
    # The first note of this process completes the time of the process before it.
    if seconds_by_process and process not in seconds_by_process:
        last_process = list(seconds_by_process)[-1]
        seconds = seconds_by_process[last_process]
        for line in read_metrics(folder):
            seconds = max(seconds, line["time"] - float(last_process))
        seconds_by_process[last_process] = seconds
    seconds_by_process[process] = time.monotonic() - session.began
    with contextlib.suppress(OSError):
        write_json(folder / FACTS, facts)


def whole_time(folders: Iterable[Path], session: Session) -> str:
    """Formats the total time of runs, such as "3 min 20 s" or "3 min 20 s in 2 processes".

    Args:
      folders: the folders of the runs. A process that worked on several runs counts once.
      session: the session of this process, which counts until now.
    """
    seconds_by_process = {str(session.began_at): time.monotonic() - session.began}
    for folder in folders:
        noted_seconds = read_json(folder / FACTS).get(PROCESS_SECONDS, {})
        for process, seconds in noted_seconds.items():
            seconds_by_process[process] = max(seconds, seconds_by_process.get(process, 0))
    text = duration(sum(seconds_by_process.values()))
    n_processes = len(seconds_by_process)
    return f"{text} in {n_processes} processes" if n_processes > 1 else text
