"""Prints the page `lora_jax/adapt/repos.md`: what `adapt` does to models of known repositories.

``python -m tests.foreign.repos DIR [--only octo openpi] [--output FILE] [--cache DIR]``, from a
checkout with the extra 'foreign'. DIR has a checkout of each repository, in a folder of its name.
What a repository imports is installed into a virtual environment of its own, in the cache.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.foreign.environments import ROOT, EnvironmentFailed, python_of, run_command
from tests.foreign.repositories import REPOSITORIES
from tests.foreign.repository import Repository, typed
from tests.foreign.table import CACHE, markdown

HEAD = ("repository", "model", "kernels", "outputs", "gradients", "merges", "left out")
VERSIONS = ("repository", "commit", "it asks for", "it ran on")
# Runs the module whatever else is called `tests`: what levanter imports installs such a package.
START = """\
import runpy, sys, types
tests = types.ModuleType("tests")
tests.__path__ = [sys.argv.pop(1)]
sys.modules["tests"] = tests
runpy.run_module("tests.foreign.run_repository", run_name="__main__", alter_sys=True)
"""
PREFACE = """\
# Repositories of others

The page says what to expect when you adapt a model of a known repository. Each model was made
small by the repository's own code, with random weights. `"all-linear"` and `trace=` chose the
kernels, which were adapted at rank 2 with random factors. `adapt(fn)(tree, x)` was compared with
`fn(merge(tree), x)` under jit, in fp32 on a CPU.

- `kernels` counts the arrays that are adapted. A stack of layers is one array.
- `outputs` and `gradients` are the largest max|Δ| / max(1, max|ref|). The gradients are those of
  the adapter and of the inputs.
- `merges` counts the places where W + s·AB of a kernel is formed, with a warning.
- `left out` counts the arrays that `lj.left_out` names.

This command prints the page from your checkouts, one folder each in `DIR`:

```sh
python -m tests.foreign.repos DIR --output repos.md     # some of it: --only octo openpi
```
"""


class Result(NamedTuple):
    """The figures of a checkout.

    Attributes:
      commit: the commit and the day of the checkout.
      versions: releases, by distribution.
      rows: a dictionary for each model; one that failed has "error".
    """

    commit: str
    versions: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]


def result_of(repository: Repository, checkout: Path, cache: Path) -> Result:
    """Runs a repository's models in a process, and returns their figures."""
    if not repository.models:
        return Result(commit_of(checkout), {}, [])
    cache.mkdir(parents=True, exist_ok=True)
    output = cache / f"{repository.name}.jsonl"
    output.unlink(missing_ok=True)
    why = "its process ended before it"
    try:
        python = python_of(repository.environment, cache)
        arguments = [ROOT / "tests", output, repository.name, checkout.resolve()]
        run_command([python, "-c", START, *arguments])
    except EnvironmentFailed as error:
        why = str(error)
    lines = output.read_text().splitlines() if output.exists() else []
    versions, *rows = map(json.loads, lines or ["{}"])
    done = {row["model"]: row for row in rows}
    all_rows = [done.get(m.name, {"model": m.name, "error": why}) for m in repository.models]
    return Result(commit_of(checkout), versions, all_rows)


def commit_of(checkout: Path) -> str:
    """Returns the commit and the day of a checkout, or "unknown"."""
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %cs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def summary_row(repository: Repository, row: Mapping[str, Any]) -> list[Any]:
    """Returns a line of the first table."""
    named = [f"[{repository.title}](#{repository.name})", row["model"]]
    if "error" in row:
        return [*named, f"failed: {row['error'][:200]}", "", "", "", ""]
    errors = [f"{row['errors'][f'jit {what}']:.0e}" for what in ("outputs", "gradients")]
    return [*named, len(row["kernels"]), *errors, len(row["merges"]), len(row["left_out"])]


def section(repository: Repository, result: Result) -> str:
    """Returns the section of the page about a repository."""
    parts = [f"## {repository.name}", f"[{repository.title}]({repository.address})"]
    parts[-1] += f" asks for {repository.pins}."
    if repository.not_run:
        return "\n\n".join([*parts, f"It is not on JAX 0.10: {repository.not_run}"])
    parts += repository.notes
    if repository.absent:
        names = ", ".join(f"`{name}`" for name in repository.absent)
        parts.append(f"These imports were replaced by empty packages: {names}.")
    parts += _lines_to_type(repository)
    for title, lines in (
        ("Merged, with a warning:", _merges(result.rows)),
        ('Left out of `"all-linear"`:', _left_out(result.rows)),
    ):
        if lines:
            parts.append(f"{title}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def _lines_to_type(repository: Repository) -> list[str]:
    """Returns the code that a user types, one block for the models that share it."""
    models_of_code: dict[str, list[str]] = {}
    for model in repository.models:
        models_of_code.setdefault(typed(model.lines), []).append(model.name)
    blocks = []
    for code, names in models_of_code.items():
        title = f"{', '.join(names)}:\n\n" if len(models_of_code) > 1 else ""
        blocks.append(f"{title}```py\n{code}```")
    return blocks


def _merges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each place where the models merge; a number in a path becomes `*`."""
    places = (merge.rsplit(" at ", 1) for row in rows for merge in row.get("merges", ()))
    return sorted({f"`{_pattern(path)}` at `{primitive}`" for path, primitive in places})


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each kernel that the models leave out, with the kind of the reason."""
    reasons = (pair for row in rows for pair in row.get("left_out", {}).items())
    return sorted({f"`{_pattern(path)}`: {reason.split(':')[0]}" for path, reason in reasons})


def _pattern(path: str) -> str:
    """Returns a path with `*` in the place of numbers."""
    return re.sub("[0-9]+", "*", path)


def page(results: Mapping[str, Result]) -> str:
    """Returns the page about the repositories that were found."""
    found = [r for r in REPOSITORIES if r.name in results]
    rows = [summary_row(r, row) for r in found for row in results[r.name].rows]
    about = []
    for repository in found:
        commit, versions, _ = results[repository.name]
        core = ("Python", "jax", "flax", *repository.shown)
        ran_on = ", ".join(f"{n} {versions[n]}" for n in core if n in versions)
        about.append([repository.title, commit, repository.pins, ran_on or "not on JAX 0.10"])
    tables = [markdown(HEAD, rows), markdown(VERSIONS, about)]
    sections = [section(r, results[r.name]) for r in found]
    return "\n\n".join([PREFACE.rstrip(), *tables, *sections]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page; returns 1 where a model failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.foreign.repos", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="has the checkouts")
    parser.add_argument("--only", nargs="+", default=[], metavar="REPOSITORY")
    parser.add_argument("--output", type=Path, help="a file, instead of the terminal")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of virtual environments")
    options = parser.parse_args(arguments)
    known = [r.name for r in REPOSITORIES]
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        parser.error(f"--only {' '.join(unknown)} is not known. Choose from {', '.join(known)}.")
    if not options.directory.is_dir():
        parser.error(f"{options.directory} is not a folder. Pass the folder of the checkouts.")
    folders = {path.name for path in options.directory.iterdir() if path.is_dir()}
    chosen = [r for r in REPOSITORIES if r.name in (options.only or folders)]
    missing = [r.name for r in chosen if r.name not in folders]
    if missing or not chosen:
        wanted = ", ".join(missing or known)
        parser.error(f"{options.directory} lacks a folder of this name: {wanted}. Check the path.")
    results = {}
    for repository in chosen:
        print(f"{repository.name}: {len(repository.models)} models", file=sys.stderr, flush=True)
        checkout = options.directory / repository.name
        results[repository.name] = result_of(repository, checkout, options.cache)
    text = page(results)
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    return int(any("error" in row for result in results.values() for row in result.rows))


if __name__ == "__main__":
    sys.exit(main())
