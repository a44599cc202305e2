"""Measures of a run on its way: held-out loss, the score of its task, and sampled answers."""

from collections.abc import Callable, Iterator
from typing import Any

from lora_jax.training.errors import Dropped
from lora_jax.training.loop import PeriodicMeasure
from lora_jax.training.losses import SCORE
from lora_jax.training.processes import Agreement
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State
from train.live.prompts import PromptFeed
from train.reporters.contract import Sample
from train.run.complete import answer_prompts
from train.run.log import SAMPLED, QuietLog, RunLog
from train.run.task import EvaluatedModel, Evaluation
from train.stages.types import OpenedRun

_COMPLETIONS = 2  # that are shown, of those for steps after which a checkpoint is written


class _Cut(Exception):
    """A signal came."""


def score(evaluation: Evaluation, evaluated: EvaluatedModel, stop: Stop) -> dict[str, float] | None:
    """Returns a task's score; None after a signal, which cuts the measurement short.

    Args:
      evaluation: scores the model.
      evaluated: the model, with an adapted tree.
      stop: tells of a signal.
    """
    agreement = Agreement()

    def progress(done: int, total: int) -> None:
        if stop.agreed(agreement):
            raise _Cut

    try:
        return evaluation.score(evaluated, progress)
    except (_Cut, Dropped):
        return None


def make_measures(
    run: OpenedRun,
    evaluation: Evaluation | None,
    trained_model: Callable[[State], EvaluatedModel],
    held_out: Callable[..., PeriodicMeasure],
    log: RunLog | QuietLog,
) -> Iterator[PeriodicMeasure]:
    """Yields the measures of a run: the held-out loss, the task's score, sampled answers.

    Args:
      run: the run.
      evaluation: scores the model; None for a task without one.
      trained_model: returns the model as a state has trained it.
      held_out: `held_out_loss`, with its arguments up to the examples.
      log: the log that sampled answers go to.
    """
    inputs = run.inputs
    options: Any = run.config.run
    if options.eval_every and inputs.read.data.measured_on is not None:
        examples = inputs.read.data.measured_on
        yield held_out(examples, every=options.eval_every, stop=run.stop)

    if options.score_every and evaluation:

        def scored(state: State) -> dict[str, float] | None:
            return score(evaluation, trained_model(state), run.stop)

        yield PeriodicMeasure(every=options.score_every, prefix=SCORE, take=scored)
    if isinstance(inputs.feed, PromptFeed):
        feed = inputs.feed
        n_updates = getattr(run.config.optim, "updates", 1)

        def completed(state: State) -> dict[str, float]:
            step = int(state.step)
            last_step = step + n_updates - 1  # the last step that new completions are for
            saves_checkpoint = last_step % options.save_every < n_updates
            is_shown = step == 1 or last_step >= run.end or saves_checkpoint
            log.sampled(step, feed.fresh(), shown=_COMPLETIONS if is_shown else 0)
            return {}

        yield PeriodicMeasure(every=1, prefix=SAMPLED, take=completed)
    if inputs.prompts:
        prompts = inputs.prompts
        outline = inputs.read.outline

        def sampled(state: State) -> dict[str, float]:
            answers = answer_prompts(
                trained_model(state), outline, prompts.tokens, new_tokens=options.sample_tokens
            )
            samples = [Sample(*pair) for pair in zip(prompts.texts, answers, strict=True)]
            log.sampled(int(state.step), samples)
            return {}

        yield PeriodicMeasure(every=options.sample_every, prefix=SAMPLED, take=sampled)
