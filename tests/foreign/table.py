"""Prints the table of `lora_jax/adapt/what_was_run.md`: what `adapt` runs of other people's code.

``python -m tests.foreign.table [--only keras gemma] [--output FILE] [--cache DIR]``, from a
checkout with the extra 'foreign'. Libraries that do not install beside the extra get virtual
environments of their own, in the cache.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.foreign.case import Case
from tests.foreign.environments import results_of
from tests.foreign.registry import ENVIRONMENTS, all_cases, cases_of

CACHE = Path.home() / ".cache" / "lora_jax" / "foreign"
HEAD = ("library", "model", "what is run", "weights", "merges", "under jit", "eagerly")


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def row(case: Case, result: dict[str, Any]) -> list[Any]:
    """Returns a case's row; one that failed has the reason in the place of its figures."""
    named = [case.library, case.model, case.run]
    if "errors" not in result:
        return [*named, case.weights, case.merges, f"failed: {result['error'][:200]}", ""]
    errors = result["errors"]
    figures = [f"{errors[f'{how} outputs']:.0e}, {errors[f'{how} gradients']:.0e}" for how in HOWS]
    return [*named, result["weights"], result["merges"], *figures]


HOWS = ("jit", "eager")


def parsed(text: str) -> list[list[str]]:
    """Returns the rows of the table of cases in a Markdown document."""
    return parsed_table(text, HEAD)


def parsed_table(text: str, head: Sequence[str]) -> list[list[str]]:
    """Returns the rows of the table with this head in a Markdown document."""
    lines = text.splitlines()
    start = lines.index("| " + " | ".join(head) + " |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("| "):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def main() -> int:
    """Prints the two tables; returns 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.foreign.table", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="LIBRARY")
    parser.add_argument("--output", type=Path, help="a file, instead of the terminal")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of virtual environments")
    options = parser.parse_args()
    known = {case.library for case in all_cases()}
    if unknown := set(options.only) - known:
        parser.error(f"no case of {sorted(unknown)}; there are {', '.join(sorted(known))}")
    about, rows = [], []
    for environment in ENVIRONMENTS:
        cases = [c for c in cases_of(environment) if not options.only or c.library in options.only]
        if not cases:
            continue
        print(f"{environment.name}: {len(cases)} cases", file=sys.stderr, flush=True)
        versions, *results = results_of(environment, options.only, options.cache)
        packages = ", ".join(f"{n} {versions.get(n, 'unknown')}" for n in environment.shown)
        core = [versions.get(name, "unknown") for name in ("Python", "jax", "flax")]
        about.append([environment.name, *core, packages])
        rows += [row(case, result) for case, result in zip(cases, results, strict=True)]
    tables = [
        markdown(("environment", "Python", "JAX", "Flax", "packages"), about),
        markdown(HEAD, rows),
    ]
    text = "\n\n".join(tables) + "\n"
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    return int(any("failed: " in str(r[5]) for r in rows))


if __name__ == "__main__":
    sys.exit(main())
