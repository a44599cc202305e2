"""Says which pages and notebooks hold figures that are older than the code that makes them.

    python -m tests.figures                         # a line for each page
    python -m tests.figures --made PAGE [PAGE ...]  # records that its figures were just made again

`SOURCES` names the code that makes the figures of a page: the code that measures, counts and prints
them. The record, figures.json, holds a digest of that code for each page. The digest leaves out
comments, docstrings and white space.
"""

import argparse
import ast
import hashlib
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "figures.json"
TODAY, OLDER, UNKNOWN = "of today's code", "older than the code", "never recorded"

_RUNS = ("lora_jax/training/loop.py", "lora_jax/training/step.py")
_COMPARISON = ("train/compare",)
_FINDINGS = ("train/findings/making", "train/findings/reporting", "train/findings/catalog.py")
_PLANS = ("train/plan", "lora_jax/training/remat.py")
_REWARDS = (*_FINDINGS, "train/rewards", "train/live", "lora_jax/training/losses/online.py")
SOURCES: dict[str, tuple[str, ...]] = {
    "README.md": ("train/environments/sql", "train/tasks/chats.py", *_RUNS),
    **{
        f"train/findings/{name}.md": _FINDINGS
        for name in (
            *("alphas", "batches", "dimension", "forgetting", "habit", "moe", "rates", "sizes"),
            *("targets", "variants", "vocabulary"),
        )
    },
    **{
        f"train/findings/rl-{name}.md": _REWARDS
        for name in ("batches", "forgetting", "numbers", "rank")
    },
    "train/compare/README.md": _COMPARISON,
    "train/memory.md": ("lora_jax/training/remat.py", "train/stages/remat.py"),
    "train/gpu.md": _PLANS,
    "train/plan/figures.md": _PLANS,
    "train/plan/recipes.md": _PLANS,
    "train/plan/time.md": ("train/plan/clock", "train/plan/hlo", "lora_jax/training/step.py"),
    "tests/benchmarks/estimates.md": ("train/plan/clock", "train/plan/hlo", "tests/benchmarks"),
    "lora_jax/torch/tried.md": ("lora_jax/torch",),
    "notebooks/1_lora_from_scratch.ipynb": ("lora_jax/core",),
    "notebooks/2_smollm2_learns_sql.ipynb": ("train/environments/sql", *_RUNS),
    "notebooks/3_a_mesh_of_devices.ipynb": _PLANS,
    "notebooks/4_bring_your_own_model.ipynb": ("lora_jax/adapt",),
    "notebooks/5_many_adapters.ipynb": ("lora_jax/bank", "lora_jax/training/data/chats.py"),
    "notebooks/6_lora_or_full.ipynb": _COMPARISON,
    "notebooks/7_preferences_and_rewards.ipynb": ("train/live", "lora_jax/training/losses"),
    "notebooks/8_one_base_many_tenants.ipynb": ("train/serve/engine",),
    "notebooks/9_your_machine_a_real_model.ipynb": ("train/run/costs.py", *_RUNS),
    "notebooks/10_a_style_from_forty_pictures.ipynb": ("lora_jax/training/losses/denoising.py",),
}


def main() -> int:
    """Prints a line for each page, or records pages; returns 1 if not all are of today's code."""
    summary = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--made", nargs="+", default=[], metavar="PAGE", help="pages to record")
    pages = parser.parse_args().made
    unknown = [page for page in pages if page not in SOURCES]
    if unknown:
        parser.error(f"{unknown[0]} is no page of SOURCES in tests/figures.py: add it there first")
    record = json.loads(RECORD.read_text())
    if pages:
        record |= {page: digest(page) for page in pages}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return 0
    states = [_state(page, record.get(page)) for page in SOURCES]
    for page, state in zip(SOURCES, states, strict=True):
        print(f"{state:20} {page}")
    counts = ", ".join(f"{states.count(state)} {state}" for state in (TODAY, OLDER, UNKNOWN))
    print(f"{len(SOURCES)} pages: {counts}")
    return 0 if states.count(TODAY) == len(SOURCES) else 1


def _state(page: str, recorded: str | None) -> str:
    """Returns the state of a page's figures, in words."""
    if recorded is None:
        return UNKNOWN
    return TODAY if recorded == digest(page) else OLDER


def digest(page: str, root: Path = ROOT) -> str:
    """Returns the digest of the code that makes a page's figures."""
    digest_of_code = hashlib.sha256()
    for name in SOURCES[page]:
        path = root / name
        if not path.exists():
            raise FileNotFoundError(f"{page}: SOURCES names {name}, which does not exist")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest_of_code.update(file.relative_to(root).as_posix().encode())
            digest_of_code.update(code_of(file.read_text(encoding="utf-8")).encode())
    return digest_of_code.hexdigest()[:16]


def code_of(text: str) -> str:
    """Returns a module's text without comments, docstrings and white space."""
    lines = [[*line] for line in text.splitlines(keepends=True)]
    for begin, end in _left_out(text):
        for row in range(begin[0], end[0] + 1):
            first = begin[1] if row == begin[0] else 0
            last = end[1] if row == end[0] else len(lines[row - 1])
            lines[row - 1][first:last] = " " * (last - first)
    return "".join("".join("".join(line) for line in lines).split())


Position = tuple[int, int]  # line, from 1, and column


def _left_out(text: str) -> Iterator[tuple[Position, Position]]:
    """Yields the positions of comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start, token.end
    owners = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            # Columns of `ast` count bytes; a docstring's line holds nothing before it but spaces.
            last_line = text.splitlines()[docstring.end_lineno - 1]
            end = len(last_line.encode()[: docstring.end_col_offset].decode())
            yield (docstring.lineno, docstring.col_offset), (docstring.end_lineno, end)


if __name__ == "__main__":
    sys.exit(main())
