"""Refuses options that have no effect beside others: a run does all that it is asked to do."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.variants import VARIANTS
from train.console.errors import UserError, flag
from train.data.files import kind_of
from train.data.named import named
from train.options.common import NO_ADAPTER
from train.options.optim import without_effect

_OF_FACTORS = (
    *("layers", "rank", "alpha", "dropout", "scaling", "init", "divide_rank"),
    *(variant.option for variant in VARIANTS),
)
# Options about an A and a B that train, or that are drawn.
_OF_PLAIN = (
    *("init", "lora_plus", "lr_rule"),
    *(variant.option for variant in VARIANTS if not variant.alone),
)
_OF_RULES = ("targets", *_OF_FACTORS, "bias", "train", "train_tokens")
_OF_HUB = ("split", "subset")
# Others may stand beside --dry-run, so that it can be added to any command of one process.
_OF_TRAINING = ("resume", "distributed", "coordinator", "num_processes", "process_id")


class _Case(NamedTuple):
    """Says which options have no effect, and why."""

    holds: bool
    why: str
    without_effect: Sequence[str]


def check_effects(
    options: Any, given: Collection[str], lines: Mapping[str, int] | None = None
) -> None:
    """Raises a UserError for an option that was given and has no effect beside the others.

    Args:
      options: the options as they were given, without a task's defaults.
      given: the options of the command line, by the names of their fields.
      lines: those of the file of --config, with the line of each.
    """
    lines = lines or {}
    for case in _cases(options):
        named = [name for name in case.without_effect if name in given or name in lines]
        if case.holds and named:
            parts = [flag(name) for name in named if name in given]
            if of_file := [name for name in named if name not in given]:
                where = f"line {min(lines[name] for name in of_file)} of {options.run.config}"
                parts.append(f"{', '.join(of_file)} ({where}{' on' * (len(of_file) > 1)})")
            raise UserError(f"{case.why}: leave out {' and '.join(parts)}")


def idle_options(options: Any) -> frozenset[str]:
    """Returns the names of all options that have no effect beside the others."""
    return frozenset(name for case in _cases(options) if case.holds for name in case.without_effect)


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields that a command line sets."""
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return frozenset(name.removeprefix("--").replace("-", "_") for name in flags)


def _cases(options: Any) -> list[_Case]:
    data, adapter, run = options.data, options.adapter, options.run
    evaluated = getattr(data, "eval_dataset", None) is not None
    streamed = getattr(data, "stream", False)
    head_only = getattr(adapter, "head_only", False)
    intrinsic = getattr(adapter, "intrinsic", None)
    factors = (*_OF_FACTORS, "lora_plus")
    one = isinstance(data.dataset, str)
    datasets = [data.dataset] if one else [dataset.name for dataset in named(data.dataset)]
    is_file = all(kind_of(name) for name in datasets)
    test: str | None = getattr(data, "test", None)
    from_hub = not is_file or (test is not None and not kind_of(test))
    return [
        *(_Case(True, why, names) for why, names in without_effect(options.optim)),
        _Case(
            adapter.full,
            "--full trains every parameter, without an adapter",
            (*_OF_RULES, "lora_plus", "peft_config", "quantize"),
        ),
        _Case(
            adapter.init_adapter is not None,
            "--init-adapter goes on with an adapter, and its own targets, rank and alpha",
            (*_OF_RULES, "peft_config"),
        ),
        _Case(
            adapter.init_adapter is None and not run.resume,
            "no adapter is read without --init-adapter",
            ("allow_base_mismatch",),
        ),
        _Case(
            adapter.peft_config is not None, "--peft-config describes the whole adapter", _OF_RULES
        ),
        _Case(
            head_only and not adapter.full,
            "--head-only trains only the head, without an adapter",
            ("targets", *factors),
        ),
        _Case(
            intrinsic is not None,
            "--intrinsic trains a subspace of all parameters, without an adapter",
            (*_OF_RULES, "lora_plus", "quantize"),
        ),
        _Case(intrinsic is None, "there is no subspace without --intrinsic", ("intrinsic_kind",)),
        *(
            _Case(True, f"{flag(variant.option)} {variant.alone_in_scripts}", _OF_PLAIN)
            for variant in adapter.variants
            if variant.alone
        ),
        _Case(adapter.targets == NO_ADAPTER, "--targets none makes no adapter", factors),
        _Case(is_file and not from_hub, "the rows come from a file, not from the hub", _OF_HUB),
        _Case(
            datasets[0] in ("sql", "vader"),
            f"--dataset {datasets[0]} has rows and a test of its own",
            (*_OF_HUB, "test_share", "text", "text_pair", "label"),
        ),
        _Case(test is not None, "--test names the rows to test on", ("test_share",)),
        _Case(
            not {*run.report_to} - {"none", "tensorboard"},
            "TensorBoard's files have no project",
            ("report_project",),
        ),
        _Case(
            not getattr(run, "sample_prompts", ()),
            "nothing is sampled without --sample-prompts",
            ("sample_tokens",),
        ),
        _Case(
            datasets != ["sql"] and not run.eval_every,
            "rows are held out for --eval-every alone",
            ("eval_questions",),
        ),
        _Case(
            datasets == ["sql"] or evaluated or streamed or not run.eval_every,
            "no rows are drawn to be held out",
            ("held_out_seed",),
        ),
        _Case(not run.eval_every, "nothing is measured without --eval-every", ("eval_rows",)),
        _Case(
            streamed,
            "--stream reads rows while training, neither counts nor keeps them",
            ("epochs", "rows", "eval_questions", *(() if evaluated else ("token_cache",))),
        ),
        _Case(run.dry_run, "--dry-run trains nothing, in one process", _OF_TRAINING),
    ]
