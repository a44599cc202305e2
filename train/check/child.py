"""Runs a group of checks in a process of its own, and reports row by row.

A line on standard output that begins with `MARK` is a message in JSON: {"names": …} first, then
{"begin": name} and {"row": …} for each row. A kernel may hang, or end this process.
"""

import json
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from train.check.rows import (
    CheckRow,
    attention_rows,
    expert_rows,
    memory_rows,
    mesh_rows,
    product_rows,
)
from train.check.steps import StepCheck
from train.check.table import FAILS, NOT_REACHED, RowResult
from train.processes.hosts import join_hosts

MARK = "@check "
_LONGEST_TEXT = 300  # of an error


def _step_rows(request: Mapping[str, Any]) -> list[CheckRow]:
    return StepCheck(request["model"], request["seq"], request["plan"]).rows()


# The groups, in the order of importance.
GROUPS: dict[str, Callable[[Mapping[str, Any]], list[CheckRow]]] = {
    "attention": lambda _: attention_rows(),
    "steps": _step_rows,
    "products": lambda _: product_rows(),
    "experts": lambda _: expert_rows(),
    "devices": lambda _: mesh_rows(),
    "memory": lambda _: memory_rows(),
    "longest": _step_rows,
}


def main() -> None:
    """Runs the rows of a group; the request is JSON on the command line."""
    request = json.loads(sys.argv[1])
    join_hosts(types.SimpleNamespace(**request["launch"]))
    rows = GROUPS[request["group"]](request)
    send({"names": [row.name for row in rows], "process": jax.process_index()})
    for row in rows:
        if row.name in request["skip"]:
            continue
        send({"begin": row.name})
        send({"row": run_row(row)._asdict()})


def run_row(row: CheckRow) -> RowResult:
    """Returns the result of a row; an error is a failure."""
    try:
        return row.run()
    except LookupError as error:
        return RowResult(row.name, NOT_REACHED, str(error))
    except Exception as error:  # whatever a compiler or a device raises
        lines = str(error).strip().splitlines() or [""]
        return RowResult(row.name, FAILS, f"{type(error).__name__}: {lines[0]}"[:_LONGEST_TEXT])


def send(message: Mapping[str, Any]) -> None:
    """Prints a message for the process that started this one."""
    sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()
