"""Compares lora_jax, on this machine, with what people would use in its place.

    python -m tests.benchmarks --list
    python -m tests.benchmarks --cases 4x128 minilm --json results.json --png results.png

Contenders (PEFT on torch, qwix, quax, naive merging, full fine-tuning) run in a process each, with
the same weights, tokens, adapter and optimiser. Each takes turns with lora_jax; the table has the
median ratio of times over the rounds, with the least and the largest. A contender whose losses
differ from lora_jax's is refused, and the exit code is 1. Ctrl-C keeps what was measured. Weights
are written to a temporary folder: 0.6 GB for SmolLM2-135M, 16 GB for the largest case on a GPU.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import machine, measure, table
from tests.benchmarks.peers.cases import CASES, CPU_CASES, GPU_CASES, Case, shrunk
from tests.benchmarks.peers.contenders import CONTENDERS
from tests.benchmarks.peers.inputs import adapter_folder, base_folder
from tests.benchmarks.peers.processes import ROOT, Failed, write_inputs

README = ROOT / "tests" / "benchmarks" / "README.md"
Results = dict[str, Any]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="list cases and contenders, and run nothing")
    add("--cases", nargs="+", metavar="CASE", help="by default all of the device")
    add("--contenders", nargs="+", metavar="NAME", help="by default all that are installed")
    add("--rounds", type=int, default=5, help="turns of each pair; 0 compiles, and times nothing")
    add("--device", choices=("cpu", "gpu"), help="by default the GPU, if there is one")
    add(
        "--attention",
        choices=("auto", "dense", "blockwise"),
        default="auto",
        help="attention of the JAX models",
    )
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    add("--readme", action="store_true", help="write the table into tests/benchmarks/README.md")
    add(
        "--from",
        dest="earlier",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="show the results of earlier runs (--json), and measure nothing",
    )
    add("--tiny", action="store_true", help="tiny models: shows that everything runs, no more")
    add("--spoil", metavar="NAME", help="double this contender's alpha, to see it refused")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fills in defaults, and ends on what cannot be done before anything is measured."""
    options.device = options.device or ("gpu" if machine.has_gpu() else "cpu")
    own = CPU_CASES if options.device == "cpu" else GPU_CASES
    options.cases = options.cases or [case.name for case in own]
    _known(parser, "--cases", options.cases, list(CASES))
    _known(parser, "--contenders", options.contenders or [], list(CONTENDERS))
    taking_part = [name for case in options.cases for name in CASES[case].contenders]
    _known(parser, "--contenders", options.contenders or [], taking_part)
    taking_part = options.contenders or taking_part
    _known(parser, "--spoil", [options.spoil] if options.spoil else [], taking_part)
    if options.rounds < 0:
        parser.error(f"--rounds is 0 or more, not {options.rounds}")
    for option in ("json", "png"):
        file = getattr(options, option)
        if file and not file.absolute().parent.is_dir():
            parser.error(f"--{option} {file}: the folder {file.absolute().parent} does not exist")
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error('--png needs matplotlib: pip install -e ".[train]"')
    if options.readme and options.tiny:
        parser.error("--readme takes no figures of tiny models: leave out --tiny")
    if options.readme and table.BEGIN not in README.read_text():
        parser.error(f"--readme: {README} has no line {table.BEGIN}")


def _known(
    parser: argparse.ArgumentParser, option: str, names: list[str], known: list[str]
) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        there = ", ".join(dict.fromkeys(known))
        parser.error(f"{option} {unknown[0]}: there are {there}")


def run(options: argparse.Namespace, results: Results) -> None:
    """Measures all cases; fills ``results`` as it goes."""
    cases = [CASES[name] for name in options.cases]
    cases = [shrunk(case) if options.tiny else case for case in cases]
    cases = [dataclasses.replace(case, attention=options.attention) for case in cases]
    with tempfile.TemporaryDirectory(prefix="lora-benchmarks-") as folder:
        for i, case in enumerate(cases):
            say = functools.partial(_say, f"[{i + 1}/{len(cases)}] {case.name}")
            found: dict[str, Any] = {}
            result = {
                "case": dataclasses.asdict(case),
                "reference": case.contenders[0],
                "contenders": found,
            }
            results["cases"].append(result)
            names = _present(case, options, found)
            try:
                if names:
                    _run_case(case, names, options, Path(folder), say, found)
            except Failed as error:
                found[names[0]] = {"status": measure.FAILED, "reason": str(error)}
            finally:
                keep(results, options.json)


def keep(results: Results, file: Path | None) -> None:
    """Writes all results so far."""
    if file:
        file.write_text(json.dumps(results, indent=1))


def _present(case: Case, options: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Returns the contenders that can take part, the reference first; notes the others."""
    reference, *others = case.contenders
    asked = options.contenders or case.contenders
    names = []
    for name in [reference, *(name for name in others if name in asked)]:
        contender = CONTENDERS[name]
        reason = contender.missing()
        if options.device not in contender.devices:
            found[name] = {"status": measure.FAILED, "reason": f"it needs a {contender.devices[0]}"}
        elif reason:
            found[name] = {"status": measure.MISSING, "reason": reason}
        else:
            names.append(name)
    return names if reference in names else []


def _run_case(
    case: Case,
    names: list[str],
    options: argparse.Namespace,
    folder: Path,
    say: Any,
    found: dict[str, Any],
) -> None:
    spoiled = dataclasses.replace(case, alpha=2 * case.alpha)
    if case.kind != "import":
        say("writing the weights that all contenders read")
        write_inputs([case, spoiled] if options.spoil else [case], folder)

    def folders(name: str) -> dict[str, str]:
        read = spoiled if name == options.spoil else case
        return {
            "base": str(base_folder(case, folder)),
            "adapter": str(adapter_folder(read, folder)),
        }

    turn_s = 0.0 if options.tiny else 0.5
    settings = measure.Options(options.rounds, turn_s, options.device, folders, say)
    measure.measure(case, names, settings, found)


def _say(where: str, what: str) -> None:
    print(f"{where}: {what}", file=sys.stderr, flush=True)


def read_results(files: list[Path]) -> Results:
    """Reads results of several runs as one: a case measured twice counts as the last file has it.

    Raises:
      SystemExit: they are of different machines or versions.
    """
    read = [json.loads(file.read_text()) for file in files]
    for other in read[1:]:
        for key in ("cpu", "cores", "versions"):
            if other["machine"][key] != read[0]["machine"][key]:
                sys.exit(f"error: the files are of different machines or versions ({key})")
    cases = {result["case"]["name"]: result for one in read for result in one["cases"]}
    merged = [warning for one in read for warning in one["warnings"]]
    return read[-1] | {"cases": list(cases.values()), "warnings": list(dict.fromkeys(merged))}


def show(results: Results, options: argparse.Namespace) -> None:
    """Prints the table, and writes what was asked for."""
    print(table.text(results))
    print("\n" + table.provenance(results))
    keep(results, options.json)
    if options.readme:
        table.write_block(README, table.markdown(results))
    if options.png:
        from tests.benchmarks.peers.picture import draw  # matplotlib is needed for this alone

        try:
            draw(results, options.png)
        except ValueError as error:
            print(f"--png: {error}", file=sys.stderr)


def list_all() -> None:
    """Prints the cases and the contenders."""
    for case in CASES.values():
        print(f"{case.name:16s} {case.title}\n{'':18s}{' '.join(case.contenders)}")
    print()
    for name, contender in CONTENDERS.items():
        print(f"{name:16s} {contender.title:20s} {contender.missing() or 'installed'}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse(arguments)
    if options.list:
        list_all()
        return 0
    if options.earlier:
        show(read_results(options.earlier), options)
        return 0
    described = machine.describe()
    results: Results = {
        "machine": described,
        "rounds": options.rounds,
        "device": options.device,
        "tiny": options.tiny,
        "warnings": machine.warnings(described),
        "interrupted": False,
        "cases": [],
    }
    for warning in results["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        run(options, results)
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("interrupted: what was measured is kept", file=sys.stderr)
    show(results, options)
    if results["interrupted"]:
        return 130
    entries = [entry for result in results["cases"] for entry in result["contenders"].values()]
    return int(any(entry["status"] == measure.REFUSED for entry in entries))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
