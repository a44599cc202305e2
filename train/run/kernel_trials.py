"""Compares a kernel with dense arithmetic before a device uses it for the first time.

A **trial** runs small cases of the kernel, for 20 seconds at most. Its result is kept in the user's
cache folder for this device, driver, versions and source of the kernel. A kernel that fails is
replaced by the form that XLA compiles.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from jax.typing import DTypeLike
from rich.console import Console

import lora_jax
from lora_jax.cases.attention import attention_cases
from lora_jax.cases.case import Case
from lora_jax.cases.mixtures import gated, mixture_cases
from lora_jax.cases.products import few_rows_cases, ragged_cases, run_kernel
from lora_jax.folders import cache_folder
from lora_jax.models.decoder.experts import apply_ragged
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.attend import IMPLEMENTATIONS, Kernel
from lora_jax.training.layout import Layout
from lora_jax.training.remat import is_refusal
from train.console.errors import flag
from train.console.output import tell
from train.processes import hosts
from train.run.log import doing
from train.run.pretrained import ModelInfo

SECONDS = 20.0  # that a trial may take
_CACHE = "kernels"  # the folder of results in the user's cache
# The cases and sizes that fit into the time: most of it is the compilation of dense arithmetic.
_ATTENTION_CASES = ("causal", "padded, packed, a window, capped", "prompts and completions")
_ATTENTION_UNIT = 512
_N_EXPERTS, _EXPERTS_SHAPE = 4, (4, 64, 2)
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "triton", "jax-triton"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin"),
)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_CASE_SOURCE = "cases"
AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTrial:
    """A kernel that a run is about to use, and its cases.

    Attributes:
      title: the kernel in words.
      option: the option that chooses the kernel, such as "attention".
      name: the value of the option for the kernel, such as "splash".
      replacement: the value of the option that replaces the kernel.
      is_requested: whether the user asks for the kernel by name.
      dtype: the dtype of the cases.
      kernel: the first argument of `Case.compare`.
      make_cases: returns the cases, the most important first.
      sources: the files and folders of the kernel's source, in the package `lora_jax`.
    """

    title: str
    option: str
    name: str
    replacement: str
    is_requested: bool
    dtype: DTypeLike
    kernel: Any
    make_cases: Callable[[], Sequence[Case]]
    sources: tuple[str, ...]


class Verdict(NamedTuple):
    """The result of a trial.

    Attributes:
      failure: why the kernel is replaced; None if it holds.
      is_final: whether later runs may rely on it. Lack of time or of memory may pass.
    """

    failure: str | None
    is_final: bool = True


def find_trials(
    outline: ModelInfo, layout: Layout, *, attention: str, dtype: str, requested: Mapping[str, str]
) -> list[KernelTrial]:
    """Returns the trials of the kernels that a model uses on a mesh; on a CPU, there are none.

    Args:
      outline: the model.
      layout: the mesh.
      attention: the implementation of attention, by name.
      dtype: the dtype of activations.
      requested: the value of each option that may choose a kernel.
    """
    trials = []
    implementation = IMPLEMENTATIONS.get(attention)
    if isinstance(implementation, Kernel):
        trials.append(
            KernelTrial(
                title=f"attention kernel {attention}",
                option="attention",
                name=attention,
                replacement="blockwise",
                is_requested=requested["attention"] != AUTO,
                dtype=dtype,
                kernel=implementation,
                make_cases=functools.partial(_attention_cases, implementation, dtype),
                sources=("models/layers",),
            )
        )
    experts = requested.get("experts", AUTO)
    has_ragged_kernels = outline.active_experts is not None and layout.ragged_kernels
    if has_ragged_kernels and experts != "blocks":
        trials.append(
            KernelTrial(
                title="kernel of ragged experts",
                option="experts",
                name="ragged",
                replacement="blocks",
                is_requested=experts != AUTO,
                dtype=dtype,
                kernel=make_mixture(gated, apply_ragged),
                make_cases=functools.partial(
                    mixture_cases,
                    dtype,
                    layout.platform,
                    n_experts=_N_EXPERTS,
                    shape=_EXPERTS_SHAPE,
                ),
                sources=("models/decoder/experts.py", "models/decoder/moe.py"),
            )
        )
    few_rows = requested.get("few_rows", AUTO)
    has_rows_kernel = outline.has_codes and layout.platform == "tpu" and layout.mesh.size == 1
    if has_rows_kernel and few_rows != "xla":
        trials.append(
            KernelTrial(
                title="kernel for few rows",
                option="few_rows",
                name="kernel",
                replacement="xla",
                is_requested=few_rows != AUTO,
                dtype=dtype,
                kernel=run_kernel,
                make_cases=functools.partial(
                    _cases_of_codes, dtype, outline.active_experts is not None
                ),
                sources=("quantized", "core/few_rows.py", "core/ragged_call.py"),
            )
        )
    return trials


def _attention_cases(kernel: Any, dtype: DTypeLike) -> list[Case]:
    """Returns the cases of a trial of attention."""
    cases = {case.name: case for case in attention_cases(kernel, dtype, unit=_ATTENTION_UNIT)}
    return [cases[f"attention: {name}, {dtype}"] for name in _ATTENTION_CASES]


def _cases_of_codes(dtype: DTypeLike, has_experts: bool) -> list[Case]:
    """Returns the cases of the kernels that read codes, those of experts first."""
    cases = few_rows_cases(dtype)
    return [*ragged_cases(dtype), *cases] if has_experts else cases


def choose_replacements(
    trials: Sequence[KernelTrial], device: Any, console: Console
) -> dict[str, str]:
    """Tries kernels, and returns the options that replace those that fail: {option: value}.

    All processes must call it. A kernel that fails in one process is replaced in all of them.

    Args:
      trials: the trials.
      device: the device of this process.
      console: console to print to.
    """
    replacements = {}
    for trial in trials:
        if trial.is_requested:
            tell(
                console,
                f"{flag(trial.option, trial.name)} names a kernel, so the {trial.title} is not "
                f"compared with dense arithmetic first. With {flag(trial.option, AUTO)}, it is "
                "compared",
            )
            continue
        failures = hosts.gather(find_failure(trial, device, console))
        for process, failure in enumerate(failures):
            if failure is None:
                continue
            where = f" in process {process}" if len(failures) > 1 else ""
            tell(
                console,
                f"warning: the {trial.title} is replaced by {trial.replacement}, because it "
                f"failed{where} on this device: {failure}",
            )
            replacements[trial.option] = trial.replacement
            break
    return replacements


def find_failure(trial: KernelTrial, device: Any, console: Console) -> str | None:
    """Returns the reason why a kernel fails on a device, or None if it holds; compares it once.

    Args:
      trial: the trial.
      device: a device of this process.
      console: console to print to.
    """
    path = cache_folder() / _CACHE / _digest_of_trial(trial, device)
    verdict = _read_verdict(path)
    if verdict is None:
        with doing(console, f"comparing the {trial.title} with dense arithmetic"):
            verdict = compare(trial, device)
        if verdict.is_final:
            _write_verdict(path, verdict)
    if verdict.failure is None or not verdict.is_final:
        return verdict.failure
    return f"{verdict.failure} (delete {path} to compare it again)"


def compare(trial: KernelTrial, device: Any, seconds: float = SECONDS) -> Verdict:
    """Returns the verdict about a kernel on a device, after some seconds at most.

    A case that has not ended then is not waited for. A kernel holds if no case failed, and one of
    them ended.
    """
    failures: list[Verdict] = []
    names_of_cases: list[str] = []
    is_over = threading.Event()

    def run_cases() -> None:
        for case in trial.make_cases():
            if is_over.is_set():
                return
            if case.refusal is not None:
                continue
            verdict = _compare_case(case, trial.kernel, device)
            if verdict.failure is not None:
                failures.append(verdict)
                return
            names_of_cases.append(case.name)

    def run() -> None:
        try:
            run_cases()
        except Exception as error:  # whatever a case does, the kernel does not hold
            failures.append(_verdict_of_error("its cases", error))

    # A kernel that hangs must not stop the run.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    is_over.set()
    if failures:
        return failures[0]
    if thread.is_alive() and not names_of_cases:
        return Verdict(f"no case ended within {seconds:g} s", is_final=False)
    return Verdict(None)


def _compare_case(case: Case, kernel: Any, device: Any) -> Verdict:
    """Returns the verdict about a kernel by one case."""
    try:
        deviation = case.compare(kernel, device)
    except Exception as error:  # a compiler's, or a device's
        return _verdict_of_error(case.name, error)
    if deviation.holds:
        return Verdict(None)
    return Verdict(
        f"{case.name}: its error is {deviation.error:.2g}, and rounding explains at most "
        f"{deviation.bound:.2g}"
    )


def _verdict_of_error(subject: str, error: Exception) -> Verdict:
    """Returns the verdict about a kernel that raised an error."""
    lines = str(error).strip().splitlines() or [""]
    message = f"{subject}: {type(error).__name__}: {lines[0][:200]}"
    return Verdict(message, is_final=not is_refusal(error))


def _digest_of_trial(trial: KernelTrial, device: Any) -> str:
    """Returns the file name of a verdict, which depends on everything that may change it."""
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    driver = ""
    with contextlib.suppress(OSError):
        driver = _NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace")
    facts = [
        (trial.option, trial.name, str(trial.dtype)),
        device.device_kind,
        driver,
        getattr(device.client, "platform_version", ""),
        versions,
    ]
    digest = hashlib.sha256(repr(facts).encode())
    package_folder = Path(lora_jax.__file__).parent
    for source in (*trial.sources, _CASE_SOURCE):
        path = package_folder / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return f"{digest.hexdigest()}.json"


def _read_verdict(path: Path) -> Verdict | None:
    """Returns a verdict of the cache; None if there is none, or if it is damaged."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))["failure"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Verdict(failure) if failure is None or isinstance(failure, str) else None


def _write_verdict(path: Path, verdict: Verdict) -> None:
    """Writes a verdict to the cache; it appears complete or not at all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each process writes a file of its own name, and renames it.
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8"
        ) as file:
            json.dump({"failure": verdict.failure}, file)
        os.replace(file.name, path)
