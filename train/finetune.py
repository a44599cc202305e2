"""One run of fine-tuning, from a task and options to a report: `train.sft` and `train.classify`.

It reads from top to bottom: check, load, adapt, train, save, measure.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.training.held_out import FormedTree, held_out_loss
from lora_jax.training.layout import Layout
from lora_jax.training.loop import PeriodicMeasure, train
from lora_jax.training.losses import SCORE
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.processes import is_first, write_json
from lora_jax.training.ready import (
    TrainingStart,
    adapted_tree,
    compile_step,
    final_tree,
    make_hooks,
    open_log,
)
from lora_jax.training.run.log import duration
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State
from train.console.output import tell
from train.dry_run import rehearse
from train.inputs import InputReader, Inputs, RunData, make_inputs
from train.processes import hosts
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.progress import sample, score
from train.reporters.registry import check_packages
from train.run.intrinsic import about_space, merge_trained, model_in, moves_weights, space_of
from train.run.lifecycle import (
    Run,
    adapt_base,
    begin_run,
    keep_adapter,
    make_report,
    open_run_log,
    resume_hint,
)
from train.run.log import SAMPLED, QuietLog, RunLog, doing
from train.run.output import ADAPTER, REPORT, locked_output
from train.run.pretrained import ModelInfo, check_weights, read_model
from train.run.report import (
    ask_words,
    compiled_bytes,
    print_adapter,
    print_commands,
    print_costs,
    tree_bytes,
)
from train.run.rules import rules
from train.run.task import Evaluation, EvaluationContext, ModelContext, RolloutFeed, Task

_COMPLETIONS = 2  # that are shown, of those for steps after which a checkpoint is written


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPart:
    """Says how far runs train now, and what they share with others over the same base.

    Attributes:
      until: returns the step to pause after, from the number of all steps and the run's options. A
        run that pauses is saved, not evaluated; --resume goes on with it. None trains to the end.
      on_trained: gets each run that came to its end, the adapted tree, and the function that runs
        it.
      hint: tells an interrupted user how to go on; None for this command line with --resume.
      measured: the evaluations of the base so far. What one of them measured is not measured again;
        new ones are added.
      reader: reads rows once for all runs of the same data.
    """

    until: Callable[[int, Any], int] | None = None
    on_trained: Callable[[Run, Any, Callable[..., Any]], object] | None = None
    hint: str | None = None
    measured: list[Evaluation] = dataclasses.field(default_factory=list)
    reader: InputReader = dataclasses.field(default_factory=InputReader)

    def evaluate_base(self, evaluation: Evaluation, model: Any, plain: Any, forward: Any) -> None:
        """Measures the base, unless an earlier evaluation has; notes the one that measures."""
        if not any(map(evaluation.reuse_base_scores, self.measured)):
            evaluation.before(model, plain, forward)
            self.measured.append(evaluation)


def finetune(
    script: str, config: Any, task: Task, session: Session, part: RunPart | None = None
) -> dict[str, float]:
    """Fine-tunes a model.

    Args:
      script: the command, for the hint how to go on: "train.sft".
      config: its options, checked, with the task's defaults.
      task: says what to train on, and how to measure it.
      session: tells of signals, and ends all processes of a run together.
      part: how far it trains now; None for a run on its own.

    Returns:
      The scores of the trained model by name; {} where nothing was evaluated.

    Raises:
      TrainingError: something that was asked for cannot be done.
      Interrupted: after a signal, once the last step is saved.

    With --dry-run, nothing is trained or written; see `train.dry_run`.
    """
    began = time.monotonic()
    part = part or RunPart()
    hosts.join_hosts(config.run)
    console = hosts.console()
    session.join(console, config.run.coordinator)

    # Cheap checks come first: options and output folder, then rows, then examples and targets
    # against the model's configuration. Only then are weights read.
    with hosts.raise_in_every_process():
        dry = config.run.dry_run
        if is_first() and not dry:
            check_packages(config.run.report_to)
        cached = None if dry else keep_compiled(config.run.compilation_cache)
        mesh = make_mesh(config.run.mesh, config.optim.batch_size)
        config = task.completed(config)
        optim = config.optim
        rules(config.adapter)
        folder = None if dry else locked_output(config, session.release, console)
        read = part.reader(config, task)
        session.release.callback(read.data.close)
        inputs = make_inputs(config, mesh, read)
    outline, data, layout = inputs.read.outline, inputs.read.data, inputs.layout
    for line in [*([cached] if cached else []), *inputs.lines]:
        tell(console, line)
    if folder is None:
        loss = task.loss(config, layout)
        rehearse(config, inputs, loss, console)
        return {}
    run = make_run(script, config, task, session.stop, folder, console, inputs, part)
    space = space_of(config, outline.params)

    # The model and its adapter.
    with hosts.raise_in_every_process(), doing(console, f"reading the weights of {outline.name}"):
        model, plain = load_model(config, outline, layout)
    base_bytes = tree_bytes(plain)
    key = jax.random.key(optim.seed)
    params = adapt_base(config, outline, plain, folder, jax.random.fold_in(key, 0))
    ready = begin_run(run, params, jax.random.fold_in(key, 1), data.facts)
    inputs, ready = prepare(run, inputs, task, model, plain, params, ready)
    del params

    # The base, for comparison.
    is_quantized = outline.in_codes
    running = model_in(space, model)
    answering = lj.adapt(running.apply)  # as the model itself answers, not laid out for a step
    evaluated = answering if is_quantized else model.apply
    evaluation = make_evaluation(run, inputs, task)
    if evaluation and not run.pauses:
        part.evaluate_base(evaluation, model, plain, evaluated)
    del plain

    # Training. It leaves the adapter on its own, the loss curve, and a report of its costs.
    forward, loss = ready.setup.forward(running), task.loss(config, layout)
    measured, formed = answering, None
    if space is not None:  # its weights are formed once for each measurement, not in each batch
        measured = model.apply
        formed = FormedTree(
            functools.partial(merge_trained, space), layout.constrained(model).apply
        )

    def tree_of_state(state: State) -> Any:
        tree = adapted_tree(ready, state)
        return tree if formed is None else formed.form(tree)

    held_out = functools.partial(held_out_loss, ready, forward, loss, formed=formed)
    with open_run_log(run, ready, int(ready.state.step)) as log:
        with doing(console, "compiling the step"):
            compiling = time.perf_counter()
            step = compile_step(ready, forward, loss)
            compile_seconds = time.perf_counter() - compiling
        to_measure = make_measures(
            run, inputs, evaluation, model, tree_of_state, measured, held_out, log
        )
        run.stop.remedy = run.hint
        hooks = make_hooks(ready, loss, [*to_measure], run.hint)
        with open_log(log, ready):
            state, step_seconds = train(
                step, ready.state, ready.base, run.last, config.run, hooks, log, run.stop
            )
        trained = final_tree(ready, state)
        if not run.pauses:
            keep_adapter(run, ready, trained)
    if run.pauses:
        tell(console, f"paused after step {run.last} of {run.steps}")
        return {}
    report = make_report(run, ready, trained, loss, step_seconds)
    report |= {"compile_seconds": compile_seconds, "compiled_bytes": compiled_bytes(step)}
    run.stop.remedy = f"The adapter is in {folder / ADAPTER}"
    run.stop.check()
    report["base_bytes"] = base_bytes
    write_json(folder / REPORT, report)
    print_adapter(console, folder / ADAPTER, report)

    # The trained model.
    scores: dict[str, float] = {}
    if part.on_trained:
        part.on_trained(run, trained, answering)
    if evaluation:
        # Codes stay codes: merged, they would be the float model.
        tree = trained if is_quantized else merge_trained(space, trained)
        del trained, ready, state, hooks, held_out, to_measure, tree_of_state
        scores = evaluation.after(model, tree, evaluated)
    print_costs(console, report)
    tell(console, report["summary"])
    took = duration(time.monotonic() - began)
    console.print(f"the whole run took {took}; its files are in {folder}")
    merged_only = config.adapter.full or space is not None
    print_commands(console, folder / ADAPTER, ask_words(outline), merged=merged_only)
    return scores


def make_run(
    script: str,
    config: Any,
    task: Task,
    stop: Stop,
    folder: Path,
    console: Console,
    inputs: Inputs,
    part: RunPart,
) -> Run:
    """Returns the options, folder and data of a run."""
    _, outline, data = inputs.read
    kept = {k: v for k, v in data.facts.items() if k in ("labels", "seq_len")}
    steps = inputs.steps
    last = steps if part.until is None else part.until(steps, config)
    return Run(
        script=script,
        config=config,
        folder=folder,
        console=console,
        stop=stop,
        feed=inputs.feed,
        steps=steps,
        last=last,
        rate=inputs.rate,
        layout=inputs.layout,
        about=outline.about | about_space(space_of(config, outline.params)) | kept,
        hint=part.hint or resume_hint(script),
        score=task.score,
    )


def prepare(
    run: Run, inputs: Inputs, task: Task, model: Any, plain: Any, params: Any, ready: TrainingStart
) -> tuple[Inputs, TrainingStart]:
    """Returns inputs and state of a run as its task prepares them; see `Task.prepare`."""
    rows, outline, data = inputs.read
    of = ModelContext(
        config=run.config,
        folder=run.folder,
        console=run.console,
        outline=outline,
        data=data,
        stop=run.stop,
        layout=run.layout,
        model=model,
        plain=plain,
        ready=ready,
        takes_from_base=takes_from_base(params),
    )
    ready, data = task.prepare(of)
    return dataclasses.replace(inputs, read=RunData(rows, outline, data)), ready


def make_evaluation(run: Run, inputs: Inputs, task: Task) -> Evaluation | None:
    """Returns the task's evaluation of a run; None for none."""
    rows, outline, data = inputs.read
    context = EvaluationContext(
        config=run.config,
        folder=run.folder,
        console=run.console,
        rows=rows,
        data=data,
        outline=outline,
        stop=run.stop,
    )
    return task.evaluation(context)


def load_model(config: Any, outline: ModelInfo, layout: Layout) -> tuple[Any, Any]:
    """Reads the model and its weights, as the options say.

    Full fine-tuning, and that of a subspace, keeps its weights in fp32, whatever computes.
    """
    optim = config.optim
    model, plain = read_model(
        outline.name,
        dtype=optim.dtype,
        param_dtype="float32" if moves_weights(config.adapter) else optim.dtype,
        remat=optim.remat_policy,
        attention=optim.attention,
        experts=optim.experts,
        sharding=layout.of_parameter,
        **outline.head,
    )
    check_weights(outline, plain)
    return model, plain


def make_measures(
    run: Run,
    inputs: Inputs,
    evaluation: Evaluation | None,
    model: Any,
    adapted_tree: Callable[[State], Any],
    forward: Callable[..., Any],
    held_out: Callable[..., PeriodicMeasure],
    log: RunLog | QuietLog,
) -> Iterator[PeriodicMeasure]:
    """Yields the measures of a run: the held-out loss, the task's score, sampled answers.

    Args:
      run: options, data and folder.
      inputs: rows, examples and prompts.
      evaluation: the task's; None for none.
      model: the model that answers.
      tree_of: returns the adapted tree of a state.
      forward: the model's ``apply``, for an adapted tree.
      held_out: `held_out_loss`, with its arguments up to the examples.
      log: the log that sampled answers go to.
    """
    config: Any = run.config
    asked = config.run
    if asked.eval_every and inputs.read.data.on_the_way is not None:
        examples = inputs.read.data.on_the_way
        yield held_out(examples, every=asked.eval_every, stop=run.stop)

    if asked.score_every and evaluation:

        def scored(state: State) -> dict[str, float] | None:
            return score(evaluation, model, adapted_tree(state), forward, run.stop)

        yield PeriodicMeasure(every=asked.score_every, prefix=SCORE, take=scored)
    if isinstance(inputs.feed, RolloutFeed):
        rolling, updates = inputs.feed, config.optim.updates

        def completed(state: State) -> dict[str, float]:
            step = int(state.step)
            until = step + updates - 1  # the last step that new completions are for
            some = step == 1 or until >= run.last or until % asked.save_every < updates
            log.sampled(step, rolling.fresh(), shown=_COMPLETIONS if some else 0)
            return {}

        yield PeriodicMeasure(every=1, prefix=SAMPLED, take=completed)
    if prompts := inputs.prompts:
        tokens, outline = asked.sample_tokens, inputs.read.outline

        def sampled(state: State) -> dict[str, float]:
            answers = sample(prompts, tokens, outline, model, adapted_tree(state), forward)
            log.sampled(int(state.step), answers)
            return {}

        yield PeriodicMeasure(every=asked.sample_every, prefix=SAMPLED, take=sampled)
