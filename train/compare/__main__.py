"""LoRA or full fine-tuning? `python -m train.compare sft` measures both, and says which.

    python -m train.compare sft --quick
    python -m train.compare grpo --ranks 1 16
    python -m train.compare classify --methods lora full --ranks 1 8 64 --seeds 0 1 2

All settings of adapters train side by side over one base, full fine-tuning runs one after the
other; hopeless settings are stopped early by a stated rule. The output folder gets a report
(report.html, report.md and pictures), the measurements (compare.json), and a folder for each run.
`python -m train.compare sft --help` lists the options: those of the comparison, and those of the
script that it does not set itself.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from rich.console import Console

import lora_jax as lj
from lora_jax.core.types import Forward, Tokenizer, Tree
from lora_jax.training.arguments import delete_run_files
from lora_jax.training.processes import write_text
from lora_jax.training.run.lock import FolderLock, RunLock
from lora_jax.training.run.log import duration
from train import prior
from train.compare import measure, outside, result
from train.compare.divergence import BaseDivergence
from train.compare.intruders import MatrixIndex, mean_intruders
from train.compare.options import OF_CLASSIFIER, OF_EXAMPLES, CompareConfig, check_options
from train.compare.reporting import dimension, pages, recommend
from train.compare.scripts import NOT_OF, SCRIPTS, CompareOptions
from train.compare.supervised import HeldOutPrompts, supervised_options, supervised_script
from train.compare.sweep import PROGRESS, Sweep, read_progress
from train.compare.trials import RUNS, ComparedScript, make_trials
from train.console.errors import UserError, flag
from train.console.help import asks_for_help
from train.console.output import tell
from train.console.program import about, program, resume_hint
from train.live.turns.use import tokenize_with_tools
from train.options.field import check_effects
from train.options.file import replace_options
from train.options.scripts import grpo as grpo_options
from train.processes import hosts
from train.processes.session import Session
from train.run.intrinsic import merge_trained, moves_weights, space_of
from train.run.log import doing
from train.run.output import CONFIG, remove_empty
from train.settings.command import read_line
from train.settings.files import check_same_run, options_file, read_options_file
from train.settings.tasks import dataset_facts
from train.stages.begin import load_base
from train.stages.inputs import InputReader, Inputs
from train.stages.types import OpenedRun, RunContext

_PROG = "train.compare"
_COMPARISON_FILES = (  # of a comparison, in its folder
    CONFIG,
    PROGRESS,
    result.JSON,
    RUNS,
    measure.COSTS,
    pages.HTML,
    pages.MARKDOWN,
    pages.PICTURES,
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
    arguments = list(sys.argv[1:] if args is None else args)
    session = Session()
    with session.running():
        script, config = parse(arguments)
        command = program(_PROG, *arguments)
        compare(script, config, session, command)


def parse(args: Sequence[str]) -> tuple[ComparedScript, CompareOptions]:
    """Parses a command line.

    Returns:
      The script, and the options with those of a first look filled in.

    Raises:
      UserError: options make no sense.
    """
    if not args or args[0] not in SCRIPTS:
        _show_help_or_raise(args)
    script = SCRIPTS[args[0]]
    line: Any = read_line(script.compared, args[1:], f"{_PROG} {args[0]}")
    config, line_options, file_options = line
    set_options = {*line_options, *file_options}
    if script.kind == "grpo":
        config = grpo_options.fill_dataset(config, set_options)
    check_options(config.compare, config, set_options)
    # --methods tells of variants.
    check_effects(config, dataset_facts(config), line_options, file_options)
    if config.compare.quick:
        config = _fill_quick_options(script, config, set_options)
    _check_methods(script, config.compare)
    for name, reason in NOT_OF[script.kind].items():
        if name in set_options:
            raise UserError(
                f"{flag(name)} has no effect here, because {reason}. Remove {flag(name)}."
            )
    return script, config


def _show_help_or_raise(args: Sequence[str]) -> NoReturn:
    """Prints the help if it is requested; otherwise raises a UserError for a missing script."""
    if asks_for_help(args):
        usage = f"usage: {program(_PROG)} {{{','.join(SCRIPTS)}}} [options]"
        print(f"{about(__doc__, _PROG)}\n{usage}")
        sys.exit(0)
    problem = f"cannot compare runs of {args[0]!r}" if args else "needs the name of a script"
    scripts = list(SCRIPTS)
    names = f"{', '.join(scripts[:-1])} or {scripts[-1]}"
    raise UserError(f"train.compare {problem}. Pass {names} as the first argument.")


def _fill_quick_options(
    script: ComparedScript, config: CompareOptions, set_options: set[str]
) -> CompareOptions:
    """Returns the options with the values of --quick for options that the user did not set.

    Args:
      script: the training script.
      config: the options.
      set_options: names of options that the command line or a file sets.
    """
    length_options = {"steps", "epochs"}  # either says how long to train
    fixed_options = set_options
    if set_options & length_options:
        fixed_options = set_options | length_options
    changes = {name: value for name, value in script.quick.items() if name not in fixed_options}
    return replace_options(config, changes)


def _check_methods(script: ComparedScript, compare_config: CompareConfig) -> None:
    """Raises a UserError for methods that the script does not support."""
    for method in compare_config.methods:
        if method in OF_CLASSIFIER and script.kind != "classify":
            raise UserError(
                f"{flag('methods', method)} only trains classifiers. Use train.compare classify, "
                "or remove this method."
            )
    for method in compare_config.methods:
        if method in OF_EXAMPLES and script.kind != "grpo":
            raise UserError(
                f"{flag('methods', method)} only applies to a comparison by rewards. Use "
                "train.compare grpo, or remove this method."
            )


def compare(
    script: ComparedScript,
    config: CompareOptions,
    session: Session,
    command: str,
    prog: str = "train.compare",
) -> result.Comparison:
    """Compares methods on a task; writes the report.

    Args:
      script: the training script.
      config: its options and those of the comparison, checked.
      session: tells of signals.
      command: the command line, for the report.
      prog: the module that was called, for the hint how to go on.

    Returns:
      What was measured.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once what is on its way is saved.
    """
    start_time = time.monotonic()
    console = hosts.console()
    folder = _open_output_folder(config, session, console)
    compare_config = config.compare
    _check_demonstrations(compare_config)
    outside_text: tuple[str, str] | None = None
    if script.kind != "classify":
        outside_text = outside.read_text(compare_config.outside)
    options = _options_with_base(script, config, session)
    reader = InputReader()
    scripts = _RewardMeasures.read(script, options, compare_config, session)
    script = scripts.script
    trials, inputs = make_trials(script, options, compare_config, folder, reader, scripts.examples)
    scripts.read_base(inputs, console)
    tokenizer = inputs.read.outline.tokenizer
    outside_loss = _make_outside_loss(outside_text, compare_config, tokenizer, console)
    if not config.run.resume:
        delete_run_files(folder, _COMPARISON_FILES)
    write_text(folder / CONFIG, options_file(config, f"train.compare {script.kind}"))
    record = read_progress(folder, datetime.now().astimezone().isoformat(timespec="seconds"))
    n_settings = len({trial.arm for trial in trials})
    tell(
        console,
        f"{len(trials)} runs of {n_settings} settings; what they come to will be in {folder}",
    )
    session.stop.remedy = resume_hint(prog)
    intruders = (
        functools.partial(_count_intruders_of_run, inputs, {}) if compare_config.intruders else None
    )
    sweep = Sweep(
        kind=script.kind,
        folder=folder,
        trials=trials,
        record=record,
        context=RunContext(reader=reader, hint=session.stop.remedy),
        config=compare_config,
        outside=outside_loss,
        intruders=intruders,
        session=session,
        console=console,
    )
    sweep.run()
    outside_name = outside_text[1] if outside_text and outside_loss else None
    comparison = measure.collect_measurements(sweep, inputs, command, outside_name)
    comparison = scripts.with_prompts(comparison)
    result.write(comparison, folder)
    advice = pages.write_report(comparison, folder)
    _print_recommendation(comparison, advice, console)
    run_seconds = sum(progress.seconds for progress in record.runs.values())
    tell(
        console,
        f"this call took {duration(time.monotonic() - start_time)}, and all runs so far "
        f"{duration(run_seconds)}; the report is {folder / pages.HTML}",
    )
    return comparison


def _make_outside_loss(
    outside_text: tuple[str, str] | None,
    compare_config: CompareConfig,
    tokenizer: Tokenizer,
    console: Console,
) -> Callable[[Tree, Forward], float] | None:
    """Returns a function that computes a model's loss on text outside the task, or None.

    Args:
      outside_text: the text and its name; None for none.
      compare_config: tells whether the user chose the text.
      tokenizer: the model's.
      console: is told if the tokenizer does not know the text.
    """
    if outside_text is None:
        return None
    text, name = outside_text
    is_default = compare_config.outside is None
    if is_default and not outside.knows(tokenizer, text):
        tell(console, f"what is forgotten is not measured: {outside.unknown(name)}")
        return None
    return functools.partial(outside.mean_loss, outside.make_token_rows(text, tokenizer, name))


def _print_recommendation(
    comparison: result.Comparison, advice: recommend.Recommendation, console: Console
) -> None:
    """Prints the verdict of a comparison, with its reasons."""
    lines = [f"verdict: {advice.verdict}. {advice.headline}"]
    lines += [*advice.reasons, *advice.undecided]
    if advice.command:
        lines.append(advice.command)
    score_name = comparison.facts.score or "score"
    for intrinsic_dimension in dimension.dimensions(comparison):
        lines.append(dimension.sentence(intrinsic_dimension, score_name))
    for line in lines:
        tell(console, line)


def _options_with_base(script: ComparedScript, config: CompareOptions, session: Session) -> Any:
    """Returns the options of the script, with the model that the task trains first if it has one.

    A task that makes a model does so now. An adapter to begin with is not made: all methods begin
    at the base.
    """
    options: Any = script.options_of(config)
    if script.kind != "grpo":
        return options
    sizes = config.compare.batch_sizes or (options.optim.batch_size,)
    # Whether a run is resumed, its own folder tells.
    options = replace_options(options, {"resume": False, "batch_size": sizes[0]})
    script.check(script.completed(options))  # before anything is made
    full_options = script.completed(options, full=True)
    base_options = script.task_of(options).begin(full_options, session, prior)
    return replace_options(options, {"model": base_options.data.model})


def _check_demonstrations(compare_config: CompareConfig) -> None:
    """Raises a UserError for methods of sft without --demonstrations."""
    if compare_config.demonstrations is not None:
        return
    for method in compare_config.methods:
        if method in OF_EXAMPLES:
            raise UserError(
                f"{flag('methods', method)} needs rows with right answers to learn from. Pass them "
                "with --demonstrations."
            )


class _RewardMeasures(NamedTuple):
    """The scripts of a comparison, with measures that only a comparison by rewards has.

    Attributes:
      script: the script that is compared.
      examples: the script and options of runs on --demonstrations; None for none.
      divergence: what the base completes; None where it is not asked for.
      prompts: the held-out prompts; None where nothing needs them.
    """

    script: ComparedScript
    examples: tuple[ComparedScript, Any] | None = None
    divergence: BaseDivergence | None = None
    prompts: HeldOutPrompts | None = None

    @classmethod
    def read(
        cls, script: ComparedScript, options: Any, compare_config: CompareConfig, session: Session
    ) -> "_RewardMeasures":
        """Reads the held-out prompts if --kl or --demonstrations needs them."""
        demonstrations = compare_config.demonstrations
        if not compare_config.kl and demonstrations is None:
            return cls(script)
        held_out_seed = options.data.held_out_seed
        if held_out_seed is None:
            held_out_seed = compare_config.seeds[0]
        config = script.completed(options, held_out_seed=held_out_seed)
        prompts = HeldOutPrompts(config, script.task_of(config))
        session.release.callback(prompts.read.data.close)
        divergence = BaseDivergence() if compare_config.kl else None
        measured_in = divergence.measured_in if divergence else lambda task: task
        examples: tuple[ComparedScript, Any] | None = None
        if demonstrations is not None:
            example_options = supervised_options(config, demonstrations)
            example_script = supervised_script(demonstrations, prompts, measured_in)
            examples = (example_script, example_options)
        task = measured_in(script.task_of(config))
        return cls(
            script=script._replace(task_of=lambda _: task),
            examples=examples,
            divergence=divergence,
            prompts=prompts,
        )

    def read_base(self, inputs: Inputs, console: Console) -> None:
        """Generates the base's completions of the held-out prompts if --kl is given.

        Raises:
          UserError: there are none.
        """
        if self.divergence is None or self.prompts is None:
            return
        rows = self.prompts.read.rows.held_out
        if not rows:
            raise UserError(
                "--kl needs held-out prompts, but no prompt of --dataset is held out. Pass rows of "
                "your own with --eval-dataset."
            )
        outline = inputs.read.outline
        config = self.prompts.config
        prompts = tokenize_with_tools(rows, (), outline, "the held-out rows")
        with doing(console, f"the base completes {len(prompts)} held-out prompts"):
            base = load_base(config, inputs)
            self.divergence.read(base, outline, prompts, config.data.max_new_tokens)
        tell(console, f"--kl is measured on completions of {self.divergence.measured_on}")

    def with_prompts(self, comparison: result.Comparison) -> result.Comparison:
        """Returns the comparison with the name of the prompts whose divergence was measured."""
        prompts_name = None if self.divergence is None else self.divergence.measured_on
        facts = dataclasses.replace(comparison.facts, diverging_on=prompts_name)
        return dataclasses.replace(comparison, facts=facts)


def _count_intruders_of_run(
    inputs: Inputs, base_vectors: dict[MatrixIndex, np.ndarray], run: OpenedRun, tree: Tree
) -> float:
    """Returns the intruder dimensions of a run's tree.

    Args:
      inputs: the inputs of a run.
      base_vectors: singular vectors of the base by matrix, which are added when first needed.
      run: the run.
      tree: its tree after training.
    """
    outline = inputs.read.outline
    if moves_weights(run.config.adapter):  # the tree holds no base, or one that a subspace moves
        base_params = load_base(run.config, inputs).params
    else:
        base_params = lj.strip(tree)
    trained_params = merge_trained(space_of(run.config, outline.params), tree)
    return mean_intruders(base_params, trained_params, outline.kinds, base_vectors)


def _open_output_folder(config: CompareOptions, session: Session, console: Console) -> Path:
    """Returns the output folder after checking and locking it.

    Raises:
      UserError: it holds another comparison, or cannot be written.
      TrainingError: another comparison writes to it.
    """
    folder = Path(config.run.output).expanduser()
    missing_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    session.release.callback(remove_empty, missing_folders)  # if the comparison is refused later
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(FolderLock(folder), notice=lambda line: console.print(line))
        session.release.enter_context(lock)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}. Pass another folder with "
            "--output."
        ) from error
    has_files = any((folder / name).exists() for name in _COMPARISON_FILES)
    if config.run.resume:
        if not (folder / CONFIG).exists():
            raise UserError(
                f"--resume needs a comparison to continue, but {folder} has none. Remove --resume."
            )
        check_same_run(config, read_options_file(folder / CONFIG, config), folder)
    elif has_files and not config.run.overwrite:
        raise UserError(
            f"{folder} holds another comparison or a run. Continue it with --resume, delete it "
            "with --overwrite, or pass another folder with --output."
        )
    return folder


if __name__ == "__main__":
    main()
