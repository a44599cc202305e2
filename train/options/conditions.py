"""The conditions in which options have no effect beside others, each with its reason."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.variants import VARIANTS
from train.console.errors import flag
from train.options.paths import kind_of
from train.reporters.registry import trackers

NO_ADAPTER = ("none",)  # the value of --targets
_FALLING = ("linear", "cosine", "wsd")  # the schedules that end at --min-lr
_STREAM = "--stream reads rows while training, neither counts nor keeps them"


class DatasetFacts(NamedTuple):
    """Facts about the data sets that options name, from a look at the tasks and at the files.

    Attributes:
      names: the data sets.
      has_own_rows: True if the first one is a task with rows and a test of its own.
      holds_images: True if its rows hold images in the place of texts.
      calls_tools: True if it is a task whose completions call tools without being asked to.
    """

    names: list[str]
    has_own_rows: bool
    holds_images: bool
    calls_tools: bool


class _GivenOptions:
    """All options of a script by their names; those of other scripts are None."""

    def __init__(self, options: Any, facts: DatasetFacts) -> None:
        for group in vars(options).values():
            vars(self).update(vars(group))
        self.averages = OPTIMIZERS[self.optimizer].averages
        self.datasets = facts.names
        self.is_named = facts.has_own_rows
        self.holds_images = facts.holds_images
        self.calls_tools = facts.calls_tools
        # Why --report-project has no effect on each tracker; None where it has one.
        project_reasons = [tracker.no_project for tracker in trackers(self.report_to).values()]
        if not project_reasons:
            self.no_project = "nothing is reported"
        elif all(project_reasons):
            self.no_project = str(project_reasons[0])
        self.again = " (--resume needs it again, if the run began with it)" if self.resume else ""
        exclusive = [
            variant for variant in VARIANTS if variant.alone and getattr(self, variant.option)
        ]
        if len(exclusive) == 1:  # else they exclude each other
            self.alone = f"{flag(exclusive[0].option)} {exclusive[0].alone_in_scripts}"
        is_test_file = self.test is None or kind_of(self.test)
        self.from_files = all(map(kind_of, self.datasets)) and is_test_file

    def __getattr__(self, name: str) -> Any:
        return None


class NoEffect(enum.Enum):
    """A condition in which options have no effect; of several that hold, the first is told.

    Attributes:
      why: the reason, with the options that it names in braces.
      holds: returns whether the condition holds for the options given.
    """

    AVERAGES = "--optimizer {o.optimizer} averages in the place of a schedule", lambda o: o.averages
    FLAT = (
        "--schedule {o.schedule} does not fall to a final learning rate",
        lambda o: not o.averages and o.schedule not in _FALLING,
    )
    NEVER_STABLE = (
        "--schedule {o.schedule} has no stable part before it falls (wsd has)",
        lambda o: not o.averages and o.schedule != "wsd",
    )
    WARMUP_RATIO = (
        "--warmup-ratio says how long the warmup is",
        lambda o: not o.averages and o.warmup_ratio is not None,
    )
    FULL = "--full trains every parameter, without an adapter", lambda o: o.full
    INIT_ADAPTER = (
        "--init-adapter goes on with an adapter, and its own targets, rank and alpha",
        lambda o: o.init_adapter is not None,
    )
    NO_INIT_ADAPTER = (
        "no adapter is read without --init-adapter",
        lambda o: o.init_adapter is None and not o.resume,
    )
    PEFT_CONFIG = "--peft-config describes the whole adapter", lambda o: o.peft_config is not None
    HEAD_ONLY = (
        "--head-only trains only the head, without an adapter",
        lambda o: o.head_only and not o.full,
    )
    INTRINSIC = (
        "--intrinsic trains a subspace of all parameters, without an adapter",
        lambda o: o.intrinsic is not None,
    )
    NO_INTRINSIC = "there is no subspace without --intrinsic", lambda o: o.intrinsic is None
    NO_TOOLS = (
        "no tool is called without --tools or --environment",
        lambda o: not o.tools and o.environment is None and not o.calls_tools,
    )
    NO_SAMPLER = "this run draws itself, without --sampler{o.again}", lambda o: o.sampler is None
    ALONE = "{o.alone}", lambda o: o.alone is not None
    NO_TINYLORA = (
        "no vector trains between A and B without --tinylora",
        lambda o: not o.tinylora and "tinylora" not in (o.methods or ()),
    )
    NO_TARGETS = "--targets none makes no adapter", lambda o: o.targets == NO_ADAPTER
    PREFERENCES = (
        "--labels pairs reads the fields prompt, chosen and rejected",
        lambda o: o.labels == "pairs",
    )
    IMAGES = "the rows hold images, not texts", lambda o: o.holds_images
    FILES = "the rows come from a file, not from the hub", lambda o: o.from_files
    HAS_ROWS = "--dataset {o.datasets[0]} has rows and a test of its own", lambda o: o.is_named
    TEST = "--test names the rows to test on", lambda o: o.test is not None
    NO_PROJECT = "{o.no_project}", lambda o: o.no_project is not None
    NO_PROMPTS = "nothing is sampled without --sample-prompts", lambda o: not o.sample_prompts
    NONE_HELD_OUT = (
        "rows are held out for --eval-every alone",
        lambda o: not (o.is_named or o.eval_every or o.group),
    )
    NONE_DRAWN = (
        "no rows are drawn to be held out",
        lambda o: (
            o.is_named or o.eval_dataset or o.stream or not (o.eval_every or o.eval_questions)
        ),
    )
    EVAL_DATASET = (
        "--eval-dataset names the rows to measure on, and all of them count",
        lambda o: o.eval_dataset is not None and not o.is_named,
    )
    NONE_MEASURED = "nothing is measured without --eval-every", lambda o: not o.eval_every
    STREAM = _STREAM, lambda o: o.stream
    ONLY_STREAM = _STREAM, lambda o: o.stream and o.eval_dataset is None
    ONE_PROCESS = (
        "one process has no other to hear of",
        lambda o: not o.distributed and (o.num_processes or 1) == 1,
    )
    DRY_RUN = "--dry-run trains nothing, in one process", lambda o: o.dry_run

    def __init__(self, why: str, holds: Callable[[Any], bool]) -> None:
        self.why = why
        self.holds = holds


def reasons(options: Any, facts: DatasetFacts) -> dict[NoEffect, str]:
    """Returns the conditions that hold for all options of a script, with their reasons."""
    given = _GivenOptions(options, facts)
    return {
        condition: condition.why.format(o=given) for condition in NoEffect if condition.holds(given)
    }
