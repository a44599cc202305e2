"""The recipes by model and machine: their commands are taken, and a run has its plan's options."""

import re
import shlex
from pathlib import Path

import pytest

from train import plan, sft
from train.options.file import value_of
from train.plan import __main__ as command
from train.plan.gpus import CARDS
from train.plan.machines import KINDS

PAGE = (Path(plan.__file__).parent / "recipes.md").read_text()
RECIPES = re.findall(r"^## (.*?)\n\n```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
# Gradients of further parts of a batch take no memory.
SHARED = ("model", "targets", "rank", "divide_rank", "quantize", "dtype", "mesh", "seq_len")


def words_of(block, script):
    """Returns the options of the one command of a block."""
    joined = block.replace("\\\n", " ")
    ((line),) = re.findall(rf"lora-jax {script} (.*?)[\"\n]", joined)
    return shlex.split(line)


def differences(block):
    """Returns the options in which a run differs from its plan."""
    planned = command.parse(words_of(block, "plan"))
    config = sft.SCRIPT.parse([word for word in words_of(block, "sft") if word != "--distributed"])
    run = config[0] if isinstance(config, tuple) else config
    assert planned.plan.topology.partition(":")[0] in {*CARDS, *KINDS}
    pairs = {name: (value_of(planned, name), value_of(run, name)) for name in SHARED}
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


@pytest.mark.parametrize(("title", "block"), RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_runs_what_it_planned(title, block):
    assert differences(block) == []
    wider = block.replace("--rank 16", "--rank 8", 1)
    assert differences(wider) == ["rank"], "the judge sees another rank"


def test_there_are_six():
    assert len(RECIPES) == 6
