"""A report on this machine, and remedies for what is wrong with it: `python -m train.doctor`.

It imports neither JAX nor packages that need it: processes of its own do, so that it also works
where they fail, hang, or are not installed.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.console.help import HelpPage, show_help
from train.console.pipe import closed_pipe
from train.console.program import OneLineParser, program
from train.doctor import devices, hub, packages, storage
from train.doctor.devices import run_module
from train.doctor.hardware import find_hardware
from train.doctor.storage import gib_text
from train.doctor.troubles import DoctorReport, Trouble

_SCRIPT = "train.doctor"
_PLAN_SECONDS = 900
_PLAN_SHAPE = ("--batch-size", "8", "--seq-len", "1024")
_PLANNED_OPTIONS = {"LoRA on bfloat16": (), "LoRA on nf4": ("--quantize", "nf4")}


def examine_fits(
    model: str, jax_devices: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[Trouble]]:
    """Returns the memory of each way to train a model, and the troubles.

    Args:
      model: the value of --model.
      jax_devices: the devices that JAX found; None for none.
    """
    topology = jax_devices["topology"] if jax_devices else "cpu:1"
    facts: dict[str, Any] = {"of": model}
    if topology is None:
        remedy = program("train.plan", "--model", model, "--topology", "NEAREST")
        problem = f"there is no plan for {jax_devices and jax_devices['kind']}"
        return facts, [Trouble(problem, f"{remedy} --capacity-gib GIB", fatal=False)]
    fits_any = False
    for name, options in _PLANNED_OPTIONS.items():
        arguments = ["--model", model, "--topology", topology, *_PLAN_SHAPE, *options, "--alone"]
        process = run_module("train.plan.__main__", [*arguments, "--json"], _PLAN_SECONDS)
        if process.code != 0:
            if process.code is None:
                reason = f"the plan took more than {_PLAN_SECONDS} seconds"
            else:
                reason = process.last_error.removeprefix("error: ")
            facts[name] = "no plan"
            problem = f"--model {model} cannot be planned: {reason}"
            remedy = f"see the whole message with {program('train.plan', *arguments)}"
            return facts, [Trouble(problem, remedy)]
        plan = json.loads(process.output)
        total = plan["per_chip_bytes"]["total"]
        capacity = plan["per_chip_bytes"]["capacity"]
        memory = (
            f"{gib_text(total)} of {gib_text(capacity)}" if total else "refused by the compiler"
        )
        facts[name] = f"{'fits' if plan['fits'] else 'does not fit'} ({memory})"
        fits_any = fits_any or plan["fits"]
    facts["rows"] = "8 of 1,024 tokens per step"
    if fits_any:
        return facts, []
    problem = f"{model} does not fit on {topology} in any of these ways"
    command = program("train.plan", "--model", model, "--topology", topology, "--quantize", "nf4")
    remedy = f"find what fits with {command} --largest-batch --seq-len 512"
    return facts, [Trouble(problem, remedy)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look at versions, devices, memory, disks, caches and the hub, and say what is wrong and what
    to do. Exit with code 1 if something that you ask for cannot work."""

    HELP = HelpPage("model output json", "--model Qwen/Qwen3-8B")

    model: str | None = None
    """A config.json, a folder with one, a GGUF file, or a name on the hub. The report says which
    ways to train this model fit here. Each is compiled, which takes from seconds to minutes."""
    output: str = "runs"
    """The folder for runs. The report says whether it has room."""
    json: bool = False
    """Print JSON, for a report. It contains no token, and no name of a user or a host."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 1 if something that the user asked for cannot work."""
    with closed_pipe():
        options = parse(sys.argv[1:] if args is None else args)
        report = examine(options)
        print(report.json() if options.json else report.text())
    sys.exit(report.exit_code)


def parse(args: Sequence[str]) -> DoctorOptions:
    """Parses a command line with argparse."""
    show_help(DoctorOptions, args, _SCRIPT)
    parser = OneLineParser(prog=program(_SCRIPT), add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(DoctorOptions):
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", default=field.default)
    return DoctorOptions(**vars(parser.parse_args(args)))


def examine(options: DoctorOptions) -> DoctorReport:
    """Examines the machine, beginning with the quick checks."""
    report = DoctorReport()
    versions, troubles = packages.examine_packages()
    report.add("versions", versions, troubles)
    circumstances = devices.Circumstances(find_hardware(), versions, os.environ, devices.ask_jax())
    report.add("devices", devices.describe(circumstances), devices.diagnose(circumstances))
    report.add("attention", devices.describe_kernels(circumstances), [])
    jax_devices = circumstances.found or {}
    report.add("memory", storage.describe_memory(jax_devices.get("memory")), [])
    caches = storage.cache_folders(os.environ)
    output = Path(options.output).expanduser().absolute()
    folders = {"output": output, "caches": caches["tokens"].parent}
    report.add("disks", *storage.examine_disks(folders))
    sizes = {
        name: f"{folder} ({storage.describe_folder_size(folder)})"
        for name, folder in caches.items()
    }
    report.add("caches", sizes, [])
    report.add("hub", *hub.examine_hub(os.environ))
    if options.model is not None:
        report.add("fits", *examine_fits(options.model, circumstances.found))
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
