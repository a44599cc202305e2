"""Ways to train a model that fit on the devices here, by `train.plan` in a process of its own."""

import json
from collections.abc import Mapping
from typing import Any

from train.console.program import program
from train.doctor.child import run_module
from train.doctor.report import Trouble
from train.doctor.storage import gib_text

_SECONDS = 900
_SHAPE = ("--batch-size", "8", "--seq-len", "1024")
_WAYS = {"LoRA on bfloat16": (), "LoRA on nf4": ("--quantize", "nf4")}


def examine_fits(
    model: str, found: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[Trouble]]:
    """Returns the memory that ways to train a model take, and what is wrong.

    Args:
      model: the value of --model.
      found: the devices that JAX found; None for none.
    """
    topology = found["topology"] if found else "cpu:1"
    facts: dict[str, Any] = {"of": model}
    if topology is None:
        remedy = program("train.plan", "--model", model, "--topology", "NEAREST")
        what = f"there is no plan for {found and found['kind']}"
        return facts, [Trouble(what, f"{remedy} --capacity-gib GIB", fatal=False)]
    fitting = []
    for name, options in _WAYS.items():
        line = ["--model", model, "--topology", topology, *_SHAPE, *options, "--alone"]
        ended = run_module("train.plan.__main__", [*line, "--json"], _SECONDS)
        if ended.code != 0:
            if ended.code is None:
                what = f"the plan took more than {_SECONDS} seconds"
            else:
                what = ended.last_error.removeprefix("error: ")
            facts[name] = "no plan"
            remedy = f"the whole message: {program('train.plan', *line)}"
            return facts, [Trouble(f"--model {model} cannot be planned: {what}", remedy)]
        made = json.loads(ended.output)
        total, capacity = (made["per_chip_bytes"][part] for part in ("total", "capacity"))
        needs = f"{gib_text(total)} of {gib_text(capacity)}" if total else "refused by the compiler"
        facts[name] = f"{'fits' if made['fits'] else 'does not fit'} ({needs})"
        fitting += [name] * made["fits"]
    facts["rows"] = "8 of 1,024 tokens a step"
    if fitting:
        return facts, []
    what = f"{model} does not fit on {topology} in any of these ways"
    plan = program("train.plan", "--model", model, "--topology", topology, "--quantize", "nf4")
    return facts, [Trouble(what, f"{plan} --largest-batch --seq-len 512 finds what does")]
