"""Finds JAX's devices in a separate process, and the reasons why JAX misses other devices.

Such a process may fail, hang or end for the sake of JAX.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.console.program import program
from train.doctor.hardware import Hardware
from train.doctor.troubles import Trouble, set_variables

_MAX_SECONDS = 180  # seconds for JAX to find its devices
# So that the probe takes no memory from programs that compute.
_PROBE_VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "1"}
# The oldest driver of NVIDIA's that each plugin runs on, the newest plugin first.
_DRIVERS = {"cuda13": 580, "cuda12": 525}
VARIABLES = (
    *("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TPU_VISIBLE_CHIPS"),
    *("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)
_ROOT = Path(__file__).resolve().parents[2]  # of `train` and `lora_jax`


class ChildEnding(NamedTuple):
    """The output, the errors and the exit code of a process; `code` is None after a timeout."""

    output: str
    errors: str
    code: int | None

    @property
    def last_error(self) -> str:
        """Returns the last line of the errors that is not blank."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with code {self.code} and said nothing"


def run_module(
    module: str, args: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None
) -> ChildEnding:
    """Runs the `main` of a module of this project in a process, from any working folder.

    Args:
      module: the module: "train.doctor.probe".
      args: its command line.
      seconds: the time after which it is ended.
      variables: environment variables that are not set here already.
    """
    try:
        ended = subprocess.run(
            module_command(module, args),
            env=dict(variables or {}) | os.environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output, errors = (part or b"" for part in (error.stdout, error.stderr))
        return ChildEnding(_decoded_output(output), _decoded_output(errors), None)
    return ChildEnding(ended.stdout, ended.stderr, ended.returncode)


def module_command(module: str, args: Sequence[str]) -> list[str]:
    """Returns the command that runs the `main` of a module of this project; see `run_module`."""
    start = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from {module} import main; main()"
    return [sys.executable, "-P", "-c", start, *args]


def _decoded_output(part: bytes | str) -> str:
    return part if isinstance(part, str) else part.decode(errors="replace")


class Circumstances(NamedTuple):
    """The facts on which a diagnosis is based.

    Attributes:
      hardware: the accelerators that the system has.
      versions: versions of packages by name.
      variables: the environment.
      ending: how the process ended that asked JAX for its devices.
    """

    hardware: Hardware
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    ending: ChildEnding

    @property
    def found(self) -> dict[str, Any] | None:
        """The facts that the process found; None if it failed."""
        lines = self.ending.output.strip().splitlines()
        return json.loads(lines[-1]) if self.ending.code == 0 and lines else None

    @property
    def asked(self) -> str:
        """The platforms that the user allows JAX, or "" for any platform."""
        return self.variables.get("JAX_PLATFORMS", "")

    @property
    def plugin(self) -> str | None:
        """The installed JAX plugin for NVIDIA GPUs: "cuda12" or "cuda13"."""
        for name in _DRIVERS:
            if f"jax-{name}-plugin" in self.versions:
                return name
        return None


def ask_jax() -> ChildEnding:
    """Finds JAX's devices in a separate process; see `train.doctor.probe`."""
    return run_module("train.doctor.probe", (), _MAX_SECONDS, _PROBE_VARIABLES)


def describe(now: Circumstances) -> dict[str, Any]:
    """Returns the facts about devices for the report."""
    jax_devices = now.found or {}
    hardware = now.hardware
    n_of_all_processes = jax_devices.get("of_all_processes")
    has_several_processes = jax_devices.get("of_all_processes", 1) != jax_devices.get("count", 1)
    devices = f"{jax_devices['count']} × {jax_devices['kind']}" if jax_devices else "nothing"
    return {
        "JAX computes on": devices,
        "of all processes": n_of_all_processes if has_several_processes else None,
        "GPUs of the system": list(hardware.cards) or ("yes" if hardware.nvidia else None),
        "NVIDIA's driver": hardware.driver,
        "TPU chips of the system": hardware.tpus or None,
        "set": set_variables(VARIABLES, now.variables),
    }


def describe_kernels(now: Circumstances) -> dict[str, Any]:
    """Returns the facts about attention and mixtures of experts for the report."""
    found = now.found or {}
    return {
        "of 2,048 tokens": found.get("attention"),
        "flash compiled by": found.get("flash_compiled_by"),
        "below 512 tokens": "dense" if found else None,
        "mixtures of experts": found.get("experts"),
        "to test them": program("train.check") if found else None,
    }


def diagnose(now: Circumstances) -> list[Trouble]:
    """Returns the troubles of the devices, with remedies."""
    found, platforms = now.found, now.asked
    has_gpu = now.hardware.nvidia or bool(now.hardware.cards)
    troubles = _broken_plugins(now.ending.errors)
    if found is None:
        troubles.append(_failure(now))
    elif found["platform"] == "cpu" and (has_gpu or now.hardware.tpus):
        if platforms in ("cpu", "cpu,"):
            what = f"JAX_PLATFORMS={platforms} keeps JAX from the {'GPU' if has_gpu else 'TPU'}"
            troubles.append(Trouble(what, "unset it to compute there", fatal=False))
        else:
            troubles.append(_missed_gpu(now) if has_gpu else _missed_tpu(now))
    elif now.plugin and not has_gpu and found["platform"] == "cpu":
        troubles.append(
            Trouble(
                f"JAX's plugin for {now.plugin} is installed, and the system shows no NVIDIA GPU",
                "if there is one, install NVIDIA's driver; start a container with --gpus all "
                "(docker), "
                "or request nvidia.com/gpu (Kubernetes)",
                fatal=False,
            )
        )
    if found and found.get("flash_missing"):
        remedy = 'pip install "lora_jax[gpu-kernels]"'
        troubles.append(Trouble(found["flash_missing"], remedy, fatal=False))
    return troubles


def _broken_plugins(errors: str) -> list[Trouble]:
    """Returns a trouble for each JAX plugin that raised an error."""
    _, *pieces = re.split(r"Exception when calling (jax_plugins\.[\w.]+)\.initialize", errors)
    plugin_names = pieces[::2]
    plugin_logs = pieces[1::2]
    troubles: list[Trouble] = []
    for name, log in zip(plugin_names, plugin_logs, strict=True):
        match = re.search(r"^\w[\w.]*(?:Error|Exception)\b.*", log, re.M)
        reason = match[0] if match else "it does not say why"
        problem = f"JAX's plugin {name} does not start ({reason})"
        troubles.append(Trouble(problem, "install it again, or uninstall it", fatal=False))
    return troubles


def _failure(now: Circumstances) -> Trouble:
    """Returns the reason why JAX has no devices at all."""
    ending, errors = now.ending, now.ending.errors
    if ending.code is None:
        return Trouble(
            f"JAX did not find its devices within {_MAX_SECONDS} seconds",
            "on several TPU hosts, start this command on all of them at once; else end the process "
            "that uses the accelerator, or compute on the CPU meanwhile (JAX_PLATFORMS=cpu)",
        )
    if _is_locked(errors):
        return _locked(now)
    if missing := re.search(r"No module named '([\w.]+)'", ending.last_error):
        package = missing[1].split(".")[0]
        return Trouble(f"{package} is not installed", 'pip install "lora_jax[train]"')
    if re.search(r"jaxlib (version )?[\d.]+ is .*incompatible|requires? jaxlib", errors):
        return Trouble(ending.last_error, "pip install -U jax jaxlib")
    if now.asked:
        return Trouble(
            f"JAX_PLATFORMS={now.asked} allows JAX no other devices, but JAX finds none of these "
            f"({ending.last_error})",
            f"{_install_hint(now)}or unset JAX_PLATFORMS",
        )
    return Trouble(
        f"JAX finds no devices ({ending.last_error})",
        f"{_install_hint(now)}or compute on the CPU meanwhile (JAX_PLATFORMS=cpu)",
    )


def _missed_gpu(now: Circumstances) -> Trouble:
    """Returns the reason why JAX does not see a GPU that the system has."""
    driver = now.hardware.driver
    shown = f"NVIDIA's driver {driver}" if driver else "NVIDIA's driver"
    if driver and int(driver.split(".")[0]) < min(_DRIVERS.values()):
        remedy = f"update the driver to {min(_DRIVERS.values())} or newer"
        return Trouble(f"{shown} is older than each of JAX's plugins", remedy)
    if now.plugin is None:
        return Trouble(
            "there is an NVIDIA GPU, but JAX's plugin for it is not installed", _install(driver)
        )
    if driver and int(driver.split(".")[0]) < _DRIVERS[now.plugin]:
        return Trouble(
            f"{shown} is older than JAX's plugin for {now.plugin} needs, {_DRIVERS[now.plugin]}",
            f"pip uninstall jax-{now.plugin}-plugin jax-{now.plugin}-pjrt, and {_install(driver)}; "
            "or update the driver",
        )
    if now.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Trouble("CUDA_VISIBLE_DEVICES hides all GPUs", "unset it")
    remedy = _install(driver, "-U ")
    if "LD_LIBRARY_PATH" in now.variables:
        remedy = f"unset LD_LIBRARY_PATH, which may name another CUDA; else {remedy}"
    return Trouble(f"JAX's plugin finds no GPU ({_reason(now.ending.errors)})", remedy)


def _missed_tpu(now: Circumstances) -> Trouble:
    """Returns the reason why JAX does not see a TPU that the system has."""
    if "libtpu" not in now.versions:
        what = "there is a TPU, but libtpu, its driver in Python, is not installed"
        return Trouble(what, 'pip install "jax[tpu]"')
    if _is_locked(now.ending.errors) or now.hardware.tpu_holders:
        return _locked(now)
    remedy = 'pip install -U "jax[tpu]", of which libtpu is a part'
    return Trouble(f"libtpu finds no TPU ({_reason(now.ending.errors)})", remedy)


def _is_locked(errors: str) -> bool:
    return bool(re.search(r"libtpu_lockfile|TPU is already in use|libtpu.*in use", errors))


def _locked(now: Circumstances) -> Trouble:
    """Returns the trouble that another process holds the TPU."""
    if holders := now.hardware.tpu_holders:
        numbers = " and ".join(map(str, holders))
        return Trouble(f"process {numbers} holds the TPU", f"wait for it, or kill {numbers}")
    return Trouble(
        "another process holds the TPU",
        "wait for it, or end it (sudo lsof -w /dev/accel* /dev/vfio/* tells its number); if there "
        "is none, sudo rm /tmp/libtpu_lockfile",
    )


def _install_hint(now: Circumstances) -> str:
    if now.hardware.tpus:
        return 'pip install "jax[tpu]", '
    if now.hardware.nvidia or now.hardware.cards:
        return f"{_install(now.hardware.driver)}, "
    return ""


def _install(driver: str | None, update: str = "") -> str:
    """Returns the command that installs JAX for a version of NVIDIA's driver."""
    version = int(driver.split(".")[0]) if driver else max(_DRIVERS.values())
    extra = next((name for name, oldest in _DRIVERS.items() if version >= oldest), "cuda12")
    return f'pip install {update}"lora_jax[{extra}]"'


def _reason(errors: str) -> str:
    """Returns the line of JAX's log that most likely names the reason of a failure."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    pattern = re.compile(r"unable to init|error|fail|incompatible|not (found|supported)", re.I)
    telling = [line for line in lines if pattern.search(line)]
    return (telling or lines or ["it does not say why"])[-1][-300:]
