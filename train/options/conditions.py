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
_SCHEDULES_TO_MIN_LR = ("linear", "cosine", "wsd")  # they end at --min-lr
_STREAM = "--stream reads rows while training, and neither counts nor keeps them"


class DatasetFacts(NamedTuple):
    """Facts about the data sets that options name, from a look at the tasks and at the files.

    Attributes:
      names: the data sets.
      has_own_rows: True if the first data set is a task with its own rows and test.
      holds_images: True if the rows of the first data set hold images instead of texts.
      calls_tools: True if the first data set is a task whose completions call tools by themselves.
    """

    names: list[str]
    has_own_rows: bool
    holds_images: bool
    calls_tools: bool


class _OptionsByName:
    """All options of a script as attributes; options of other scripts are None."""

    def __init__(self, options: Any, facts: DatasetFacts) -> None:
        """Collects the options of all groups, and the facts that conditions need."""
        for group in vars(options).values():
            vars(self).update(vars(group))
        self.averages = OPTIMIZERS[self.optimizer].averages
        self.datasets = facts.names
        self.is_named = facts.has_own_rows
        self.holds_images = facts.holds_images
        self.calls_tools = facts.calls_tools
        # The reason why --report-project has no effect, if no tracker has projects.
        project_reasons = [tracker.no_project for tracker in trackers(self.report_to).values()]
        if not project_reasons:
            self.no_project = "nothing is reported"
        elif all(project_reasons):
            self.no_project = str(project_reasons[0])
        self.again = ""
        if self.resume:
            self.again = " (a run that began with --sampler needs it again with --resume)"
        # A variant that fixes A and B itself; two of them exclude each other anyway.
        exclusive = [
            variant for variant in VARIANTS if variant.alone and getattr(self, variant.option)
        ]
        if len(exclusive) == 1:
            self.alone = f"{flag(exclusive[0].option)} {exclusive[0].alone_in_scripts}"
        is_test_file = self.test is None or kind_of(self.test)
        self.from_files = all(map(kind_of, self.datasets)) and is_test_file

    def __getattr__(self, name: str) -> Any:
        return None


class NoEffect(enum.Enum):
    """A condition in which options have no effect. Messages name the first one that holds.

    Attributes:
      why: the reason, with the options that it names in braces.
      holds: returns whether the condition holds for given options.
    """

    AVERAGES = (
        "--optimizer {o.optimizer} averages weights instead of following a schedule",
        lambda o: o.averages,
    )
    FLAT = (
        "--schedule {o.schedule} does not fall to a final learning rate",
        lambda o: not o.averages and o.schedule not in _SCHEDULES_TO_MIN_LR,
    )
    NEVER_STABLE = (
        "--schedule {o.schedule} has no stable part before it falls (only wsd has one)",
        lambda o: not o.averages and o.schedule != "wsd",
    )
    WARMUP_RATIO = (
        "--warmup-ratio already sets the length of the warmup",
        lambda o: not o.averages and o.warmup_ratio is not None,
    )
    FULL = "--full trains every parameter, without an adapter", lambda o: o.full
    INIT_ADAPTER = (
        "--init-adapter continues an adapter that has its own targets, rank and alpha",
        lambda o: o.init_adapter is not None,
    )
    NO_INIT_ADAPTER = (
        "without --init-adapter, no adapter is read",
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
    NO_INTRINSIC = "without --intrinsic, there is no subspace", lambda o: o.intrinsic is None
    NO_TOOLS = (
        "without --tools or --environment, no tool is called",
        lambda o: not o.tools and o.environment is None and not o.calls_tools,
    )
    NO_SAMPLER = (
        "without --sampler, this run draws completions itself{o.again}",
        lambda o: o.sampler is None,
    )
    ALONE = "{o.alone}", lambda o: o.alone is not None
    NO_TINYLORA = (
        "without --tinylora, no vector trains between A and B",
        lambda o: not o.tinylora and "tinylora" not in (o.methods or ()),
    )
    NO_TARGETS = "--targets none creates no adapter", lambda o: o.targets == NO_ADAPTER
    PREFERENCES = (
        "--labels pairs always reads the fields prompt, chosen and rejected",
        lambda o: o.labels == "pairs",
    )
    IMAGES = "the rows hold images, not texts", lambda o: o.holds_images
    FILES = "the rows come from a file, not from the hub", lambda o: o.from_files
    HAS_ROWS = "--dataset {o.datasets[0]} has its own rows and its own test", lambda o: o.is_named
    TEST = "--test already names the rows to test on", lambda o: o.test is not None
    NO_PROJECT = "{o.no_project}", lambda o: o.no_project is not None
    NO_PROMPTS = "without --sample-prompts, nothing is sampled", lambda o: not o.sample_prompts
    NONE_HELD_OUT = (
        "rows are held out only for --eval-every",
        lambda o: not (o.is_named or o.eval_every or o.group),
    )
    NONE_DRAWN = (
        "this run draws no rows to hold out",
        lambda o: (
            o.is_named or o.eval_dataset or o.stream or not (o.eval_every or o.eval_questions)
        ),
    )
    EVAL_DATASET = (
        "--eval-dataset names the rows to measure on, and all of them are used",
        lambda o: o.eval_dataset is not None and not o.is_named,
    )
    NONE_MEASURED = "without --eval-every, nothing is measured", lambda o: not o.eval_every
    STREAM = _STREAM, lambda o: o.stream
    ONLY_STREAM = _STREAM, lambda o: o.stream and o.eval_dataset is None
    ONE_PROCESS = (
        "the run has only one process",
        lambda o: not o.distributed and (o.num_processes or 1) == 1,
    )
    DRY_RUN = "--dry-run uses one process and trains nothing", lambda o: o.dry_run

    def __init__(self, why: str, holds: Callable[[Any], bool]) -> None:
        self.why = why
        self.holds = holds


def reasons(options: Any, facts: DatasetFacts) -> dict[NoEffect, str]:
    """Returns the conditions that hold for the options of a script, with their reasons."""
    options_by_name = _OptionsByName(options, facts)
    reason_by_condition = {}
    for condition in NoEffect:
        if condition.holds(options_by_name):
            reason_by_condition[condition] = condition.why.format(o=options_by_name)
    return reason_by_condition
