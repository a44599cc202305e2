"""Measures a run while it trains: held-out loss, the score of its task, and sampled answers."""

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

_N_SHOWN_COMPLETIONS = 2  # in the log, before a checkpoint


class _InterruptedScore(Exception):
    """A signal came during a measurement of the score."""


def score(evaluation: Evaluation, evaluated: EvaluatedModel, stop: Stop) -> dict[str, float] | None:
    """Returns a task's score, or None if a signal interrupted the measurement.

    Args:
      evaluation: scores the model.
      evaluated: the model, with an adapted tree.
      stop: reports a signal.
    """
    agreement = Agreement()

    def progress(done: int, total: int) -> None:
        if stop.agreed(agreement):
            raise _InterruptedScore

    try:
        return evaluation.score(evaluated, progress)
    except (_InterruptedScore, Dropped):
        return None


def make_measures(
    run: OpenedRun,
    evaluation: Evaluation | None,
    trained_model: Callable[[State], EvaluatedModel],
    held_out: Callable[..., PeriodicMeasure],
    log: RunLog | QuietLog,
) -> Iterator[PeriodicMeasure]:
    """Yields the measures of a run: the held-out loss, the task's score, and sampled answers.

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

        def measure_score(state: State) -> dict[str, float] | None:
            return score(evaluation, trained_model(state), run.stop)

        yield PeriodicMeasure(every=options.score_every, prefix=SCORE, take=measure_score)
    # The completions that the run draws for its steps.
    if isinstance(inputs.feed, PromptFeed):
        feed = inputs.feed
        n_updates = getattr(run.config.optim, "updates", 1)

        def log_completions(state: State) -> dict[str, float]:
            """Logs the completions that were drawn since the last step, and returns no metrics."""
            step = int(state.step)
            last_step = step + n_updates - 1  # the last step that uses the new completions
            saves_checkpoint = last_step % options.save_every < n_updates
            is_shown = step == 1 or last_step >= run.end or saves_checkpoint
            log.sampled(step, feed.fresh(), shown=_N_SHOWN_COMPLETIONS if is_shown else 0)
            return {}

        yield PeriodicMeasure(every=1, prefix=SAMPLED, take=log_completions)
    # The answers to --sample-prompts.
    if inputs.prompts:
        prompts = inputs.prompts
        outline = inputs.read.outline

        def log_answers(state: State) -> dict[str, float]:
            """Logs the trained model's answers to the sample prompts, and returns no metrics."""
            answers = answer_prompts(
                trained_model(state), outline, prompts.tokens, new_tokens=options.sample_tokens
            )
            pairs = zip(prompts.texts, answers, strict=True)
            samples = [Sample(prompt, answer) for prompt, answer in pairs]
            log.sampled(int(state.step), samples)
            return {}

        yield PeriodicMeasure(every=options.sample_every, prefix=SAMPLED, take=log_answers)
