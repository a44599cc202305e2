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
from lora_jax.models.layers.attend import IMPLEMENTATIONS, Kernel, head_dim_of
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
# The folders of the package `lora_jax` with the source of kernels and of what they call.
_SOURCES = ("cases", "core", "models/decoder", "models/layers", "quantized")
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
      variant: the sizes of the model that the cases have, such as "head_dim 64".
    """

    title: str
    option: str
    name: str
    replacement: str
    is_requested: bool
    dtype: DTypeLike
    kernel: Any
    make_cases: Callable[[], Sequence[Case]]
    variant: str = ""


class Verdict(NamedTuple):
    """The result of a trial.

    Attributes:
      failure: why the kernel is replaced; None if it holds.
      is_final: whether later runs may rely on it. Lack of time or of memory may pass.
      held: the names of the cases in which the kernel holds.
      left: the names of the cases that were not compared.
    """

    failure: str | None
    is_final: bool = True
    held: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


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
        head_dim = head_dim_of(outline.config)
        trials.append(
            KernelTrial(
                title=f"attention kernel {attention}",
                option="attention",
                name=attention,
                replacement="blockwise",
                is_requested=requested["attention"] != AUTO,
                dtype=dtype,
                kernel=implementation,
                make_cases=functools.partial(_attention_cases, implementation, dtype, head_dim),
                variant=f"head_dim {head_dim}",
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
            )
        )
    return trials


def _attention_cases(kernel: Any, dtype: DTypeLike, head_dim: int) -> list[Case]:
    """Returns the cases of a trial of attention."""
    all_cases = attention_cases(kernel, dtype, unit=_ATTENTION_UNIT, head_dim=head_dim)
    cases = {case.name: case for case in all_cases}
    return [cases[f"attention: {name}, {dtype}"] for name in _ATTENTION_CASES]


def _cases_of_codes(dtype: DTypeLike, has_experts: bool) -> list[Case]:
    """Returns the cases of the kernels that read codes, those of experts first."""
    cases = few_rows_cases(dtype)
    return [*ragged_cases(dtype), *cases] if has_experts else cases


def choose_replacements(
    trials: Sequence[KernelTrial], devices: Sequence[Any], console: Console
) -> dict[str, str]:
    """Tries kernels, and returns the options that replace those that fail: {option: value}.

    All processes must call it. A kernel that fails in one process is replaced in all of them.

    Args:
      trials: the trials.
      devices: the devices of this process, which all run each case.
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
        failures = hosts.gather(find_failure(trial, devices, console))
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


def find_failure(trial: KernelTrial, devices: Sequence[Any], console: Console) -> str | None:
    """Returns the reason why a kernel fails on some devices, or None if it holds.

    Each case is compared once. A later start compares the cases for which the time was too short.

    Args:
      trial: the trial.
      devices: devices of this process.
      console: console to print to.
    """
    path = cache_folder() / _CACHE / _digest_of_trial(trial, devices)
    verdict = _read_verdict(path)
    if verdict is None or verdict.left:
        held = () if verdict is None else verdict.held
        with doing(console, f"comparing the {trial.title} with dense arithmetic"):
            verdict = compare(trial, devices, held)
        if verdict.is_final or verdict.held:
            _write_verdict(path, verdict)
        if verdict.failure is None:
            tell(console, _describe(trial, verdict))
    if verdict.failure is None or not verdict.is_final:
        return verdict.failure
    return f"{verdict.failure} (delete {path} to compare it again)"


def _describe(trial: KernelTrial, verdict: Verdict) -> str:
    """Returns a line about the cases in which a kernel holds."""
    n_held = len(verdict.held)
    n_cases = n_held + len(verdict.left)
    line = f"the {trial.title} holds in {n_held} of {n_cases} cases"
    if verdict.held:
        line += f" ({'; '.join(verdict.held)})"
    if verdict.left:
        line += (
            f". {SECONDS:g} s were too short for the others ({'; '.join(verdict.left)}), so the "
            "next start compares them"
        )
    return line


def compare(
    trial: KernelTrial, devices: Sequence[Any], held: Sequence[str] = (), seconds: float = SECONDS
) -> Verdict:
    """Returns the verdict about a kernel on some devices, after some seconds at most.

    A case that has not ended then is not waited for. A kernel holds if no case failed, and one of
    those that were left ended.

    Args:
      trial: the trial.
      devices: devices of this process.
      held: the names of the cases that an earlier start compared.
      seconds: the seconds that the trial may take.
    """
    failures: list[Verdict] = []
    names_of_cases: list[str] = []
    held_names = list(held)
    is_over = threading.Event()

    def run_cases() -> None:
        cases = [case for case in trial.make_cases() if case.refusal is None]
        names_of_cases.extend(case.name for case in cases)
        for case in cases:
            if is_over.is_set():
                return
            if case.name in held:
                continue
            verdict = _compare_case(case, trial.kernel, devices)
            if verdict.failure is not None:
                failures.append(verdict)
                return
            held_names.append(case.name)

    def run() -> None:
        try:
            run_cases()
        except Exception as error:  # whatever a case does, the kernel does not hold
            failures.append(_verdict_of_error("its cases", error))

    # A kernel that hangs must not stop the run.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    is_late = thread.is_alive()
    is_over.set()
    held_now = tuple(held_names)
    left = tuple(name for name in names_of_cases if name not in held_now)
    if failures:
        return failures[0]._replace(held=held_now, left=left)
    if is_late and len(held_now) == len(held):
        failure = f"no case ended within {seconds:g} s"
        return Verdict(failure, is_final=False, held=held_now, left=left)
    return Verdict(None, held=held_now, left=left)


def _compare_case(case: Case, kernel: Any, devices: Sequence[Any]) -> Verdict:
    """Returns the verdict about a kernel by one case, which must hold on each device."""
    try:
        deviations = case.compare_on(kernel, devices)
    except Exception as error:  # a compiler's, or a device's
        return _verdict_of_error(case.name, error)
    for device, deviation in zip(devices, deviations, strict=True):
        if deviation.holds:
            continue
        where = f" on device {device.id}" if len(devices) > 1 else ""
        return Verdict(
            f"{case.name}: its error{where} is {deviation.error:.2g}, and rounding explains at "
            f"most {deviation.bound:.2g}"
        )
    return Verdict(None)


def _verdict_of_error(subject: str, error: Exception) -> Verdict:
    """Returns the verdict about a kernel that raised an error."""
    lines = str(error).strip().splitlines() or [""]
    message = f"{subject}: {type(error).__name__}: {lines[0][:200]}"
    return Verdict(message, is_final=not is_refusal(error))


def _digest_of_trial(trial: KernelTrial, devices: Sequence[Any]) -> str:
    """Returns the file name of a verdict, which depends on everything that may change it."""
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    driver = ""
    with contextlib.suppress(OSError):
        driver = _NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace")
    facts = [
        (trial.option, trial.name, str(trial.dtype), trial.variant),
        [(device.device_kind, device.id) for device in devices],
        driver,
        getattr(devices[0].client, "platform_version", ""),
        versions,
    ]
    digest = hashlib.sha256(repr(facts).encode())
    package_folder = Path(lora_jax.__file__).parent
    for folder in _SOURCES:
        for file in sorted((package_folder / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return f"{digest.hexdigest()}.json"


def _read_verdict(path: Path) -> Verdict | None:
    """Returns a verdict of the cache; None if there is none, or if it is damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        failure = fields["failure"]
        held = tuple(map(str, fields["held"]))
        left = tuple(map(str, fields["left"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if failure is not None and not isinstance(failure, str):
        return None
    if failure is not None:  # its other cases do not matter
        left = ()
    return Verdict(failure, held=held, left=left)


def _write_verdict(path: Path, verdict: Verdict) -> None:
    """Writes a verdict to the cache; it appears complete or not at all."""
    failure = verdict.failure if verdict.is_final else None
    fields = {"failure": failure, "held": verdict.held, "left": verdict.left}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each process writes a file of its own name, and renames it.
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8"
        ) as file:
            json.dump(fields, file)
        os.replace(file.name, path)
