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
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import lora_jax as lj
from lora_jax.core.types import Forward, Tokenizer, Tree
from lora_jax.training.arguments import clear
from lora_jax.training.processes import write_text
from lora_jax.training.run.lock import FolderLock, RunLock
from lora_jax.training.run.log import duration
from train import prior
from train.compare import measure, outside, result
from train.compare.divergence import BaseDivergence
from train.compare.intruders import Place, mean_intruders
from train.compare.options import OF_CLASSIFIER, OF_EXAMPLES, CompareConfig, check
from train.compare.reporting import dimension, pages, recommend
from train.compare.scripts import NOT_OF, SCRIPTS, CompareOptions
from train.compare.supervised import HeldOutPrompts, supervised_options, supervised_script
from train.compare.sweep import PROGRESS, Sweep, read_progress
from train.compare.trials import RUNS, ComparedScript, trials_of
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
_OURS = (
    *(CONFIG, PROGRESS, result.JSON, RUNS, measure.COSTS),
    *(pages.HTML, pages.MARKDOWN, pages.PICTURES),
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2, a signal with the signal's code."""
    given = list(sys.argv[1:] if args is None else args)
    session = Session()
    with session.running():
        script, config = parse(given)
        command = program(_PROG, *given)
        compare(script, config, session, command)


def parse(args: Sequence[str]) -> tuple[ComparedScript, CompareOptions]:
    """Parses a command line.

    Returns:
      The script, and the options with those of a first look filled in.

    Raises:
      UserError: options make no sense.
    """
    if not args or args[0] not in SCRIPTS:
        if asks_for_help(args):
            usage = f"usage: {program(_PROG)} {{{','.join(SCRIPTS)}}} [options]"
            print(f"{about(__doc__, _PROG)}\n{usage}")
            sys.exit(0)
        other = f"not {args[0]!r}" if args else "and nothing was given"
        *most, last = SCRIPTS
        names = f"{', '.join(most)} or {last}"
        raise UserError(f"the script to compare runs of is needed first: {names}, {other}")
    script = SCRIPTS[args[0]]
    line: Any = read_line(script.compared, args[1:], f"{_PROG} {args[0]}")
    config, on_line, in_file = line
    given = {*on_line, *in_file}
    if script.kind == "grpo":
        config = grpo_options.fill_dataset(config, given)
    check(config.compare, config, given)
    check_effects(config, dataset_facts(config), on_line, in_file)  # --methods tells of variants
    if config.compare.quick:
        length = {"steps", "epochs"}  # either says how long to train
        kept = given | length if given & length else given
        config = replace_options(config, {k: v for k, v in script.quick.items() if k not in kept})
    wrong = [method for method in config.compare.methods if method in OF_CLASSIFIER]
    if wrong and script.kind != "classify":
        raise UserError(
            f"{flag('methods', wrong[0])} is a way to train a classifier: compare classify"
        )
    supervised = [method for method in config.compare.methods if method in OF_EXAMPLES]
    if supervised and script.kind != "grpo":
        raise UserError(f"{flag('methods', supervised[0])} is for a comparison by rewards: grpo")
    for name, why in NOT_OF[script.kind].items():
        if name in given:
            raise UserError(f"{flag(name)}: {why}")
    return script, config


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
    began = time.monotonic()
    console = hosts.console()
    folder = _open_folder(config, session, console)
    asked = config.compare
    _check_examples(asked)
    text = outside.read_text(asked.outside) if script.kind != "classify" else None
    options, reader = _begun(script, config, session), InputReader()
    scripts = _BesideRewards.read(script, options, asked, session)
    script = scripts.script
    trials, inputs = trials_of(script, options, asked, folder, reader, scripts.examples)
    scripts.read_base(inputs, console)
    on_text = _loss_outside(text, asked, inputs.read.outline.tokenizer, console)
    if not config.run.resume:
        clear(folder, _OURS)
    write_text(folder / CONFIG, options_file(config, f"train.compare {script.kind}"))
    done = read_progress(folder, datetime.now().astimezone().isoformat(timespec="seconds"))
    settings = len({trial.arm for trial in trials})
    tell(
        console, f"{len(trials)} runs of {settings} settings; what they come to will be in {folder}"
    )
    session.stop.remedy = resume_hint(prog)
    sweep = Sweep(
        kind=script.kind,
        folder=folder,
        trials=trials,
        record=done,
        context=RunContext(reader=reader, hint=session.stop.remedy),
        asked=asked,
        outside=on_text,
        intruders=functools.partial(_intruders, inputs, {}) if asked.intruders else None,
        session=session,
        console=console,
    )
    sweep.run()
    comparison = measure.collect(sweep, inputs, command, text[1] if text and on_text else None)
    comparison = scripts.with_prompts(comparison)
    result.write(comparison, folder)
    advice = pages.write_report(comparison, folder)
    _tell_advice(comparison, advice, console)
    tell(
        console,
        f"this call took {duration(time.monotonic() - began)}, and all runs so far "
        f"{duration(sum(each.seconds for each in done.runs.values()))}; the report is "
        f"{folder / pages.HTML}",
    )
    return comparison


def _loss_outside(
    text: tuple[str, str] | None, asked: CompareConfig, tokenizer: Tokenizer, console: Console
) -> Callable[[Tree, Forward], float] | None:
    """Returns the loss on text outside the task, of a tree and its function; None for none."""
    if text is None:
        return None
    if asked.outside is None and not outside.knows(tokenizer, text[0]):
        tell(console, f"what is forgotten is not measured: {outside.unknown(text[1])}")
        return None
    return functools.partial(outside.loss_on, outside.rows_of(text[0], tokenizer, text[1]))


def _tell_advice(
    comparison: result.Comparison, advice: recommend.Recommendation, console: Console
) -> None:
    """Prints the verdict of a comparison, with its reasons."""
    name = comparison.facts.score or "score"
    for line in (
        f"verdict: {advice.verdict}. {advice.headline}",
        *(*advice.reasons, *advice.undecided, *([advice.command] if advice.command else [])),
        *(dimension.sentence(each, name) for each in dimension.dimensions(comparison)),
    ):
        tell(console, line)


def _begun(script: ComparedScript, config: CompareOptions, session: Session) -> Any:
    """Returns the options of a script with the model that its task begins with.

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
    whole = script.completed(options, full=True)
    made = script.task_of(options).begin(whole, session, prior)
    return replace_options(options, {"model": made.data.model})


def _check_examples(asked: CompareConfig) -> None:
    """Raises a UserError where sft has nothing to learn from."""
    supervised = [method for method in asked.methods if method in OF_EXAMPLES]
    if supervised and asked.demonstrations is None:
        raise UserError(
            f"{flag('methods', supervised[0])}: what does it learn from? Name rows with right "
            "answers with --demonstrations"
        )


class _BesideRewards(NamedTuple):
    """The scripts of a comparison, with the measures that only one by rewards has.

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
        cls, script: ComparedScript, options: Any, asked: CompareConfig, session: Session
    ) -> "_BesideRewards":
        """Reads the held-out prompts where --kl or --demonstrations needs them."""
        rows = asked.demonstrations
        if not asked.kl and rows is None:
            return cls(script)
        seed = options.data.held_out_seed
        held_out_seed = asked.seeds[0] if seed is None else seed
        config = script.completed(options, held_out_seed=held_out_seed)
        prompts = HeldOutPrompts(config, script.task_of(config))
        session.release.callback(prompts.read.data.close)
        divergence = BaseDivergence() if asked.kl else None
        measured_in = divergence.measured_in if divergence else lambda task: task
        examples = None
        if rows is not None:
            completed = supervised_options(config, rows)
            examples = supervised_script(rows, prompts, measured_in), completed
        task = measured_in(script.task_of(config))
        return cls(script._replace(task_of=lambda _: task), examples, divergence, prompts)

    def read_base(self, inputs: Inputs, console: Console) -> None:
        """Lets the base complete the held-out prompts, where its divergence is asked for.

        Raises:
          UserError: there are none.
        """
        if self.divergence is None or self.prompts is None:
            return
        outline, config = inputs.read.outline, self.prompts.config
        if not (rows := self.prompts.read.rows.held_out):
            raise UserError("--kl: no prompt of --dataset is held out: give your own rows")
        tokens = tokenize_with_tools(rows, (), outline, "the held-out rows")
        with doing(console, f"the base completes {len(tokens)} held-out prompts"):
            base = load_base(config, inputs)
            self.divergence.read(base, outline, tokens, config.data.max_new_tokens)
        tell(console, f"--kl is measured on completions of {self.divergence.measured_on}")

    def with_prompts(self, comparison: result.Comparison) -> result.Comparison:
        """Returns a comparison whose facts name the prompts of the divergence, if there is one."""
        on = None if self.divergence is None else self.divergence.measured_on
        facts = dataclasses.replace(comparison.facts, diverging_on=on)
        return dataclasses.replace(comparison, facts=facts)


def _intruders(inputs: Inputs, known: dict[Place, np.ndarray], run: OpenedRun, tree: Tree) -> float:
    """Returns the intruder dimensions of a run's tree; keeps what it finds out of the base."""
    outline = inputs.read.outline
    if moves_weights(run.config.adapter):  # the tree holds no base, or one that a subspace moves
        before = load_base(run.config, inputs).params
    else:
        before = lj.strip(tree)
    after = merge_trained(space_of(run.config, outline.params), tree)
    return mean_intruders(before, after, outline.kinds, known)


def _open_folder(config: CompareOptions, session: Session, console: Console) -> Path:
    """Returns the output folder, checked, and with its lock.

    Raises:
      UserError: it holds another comparison, or cannot be written.
      TrainingError: another comparison writes to it.
    """
    folder = Path(config.run.output).expanduser()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    session.release.callback(remove_empty, made)  # where the comparison is refused later on
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(FolderLock(folder), notice=lambda line: console.print(line))
        session.release.enter_context(lock)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}. Name another with --output"
        ) from error
    holds = any((folder / name).exists() for name in _OURS)
    if config.run.resume:
        if not (folder / CONFIG).exists():
            raise UserError(f"--resume: there is no comparison in {folder}: start without --resume")
        check_same_run(config, read_options_file(folder / CONFIG, config), folder)
    elif holds and not config.run.overwrite:
        raise UserError(
            f"{folder} holds another comparison or a run: go on with --resume, delete it with "
            "--overwrite, or name another folder with --output"
        )
    return folder


if __name__ == "__main__":
    main()
