"""Shows a run without running it: `--dry-run` of the scripts that train."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from lora_jax.models.layers.placement import platform_of
from lora_jax.training.data.batches import Examples, HostBatch
from lora_jax.training.data.order import Feed
from lora_jax.training.data.preferences import Preferences
from lora_jax.training.data.rows import Row
from lora_jax.training.data.vision.images import Images
from lora_jax.training.losses import Loss
from lora_jax.training.remat import step_bytes
from lora_jax.training.run.log import duration
from train.console.errors import as_user_errors
from train.console.output import tell
from train.data.preview import PreviewRow, lengths, preview_rows
from train.live.external.sampler import lines_of_server
from train.live.prompts import PromptFeed
from train.live.reference import is_live
from train.options.common import Options
from train.options.file import replace_options
from train.plan.local import LocalNeeds, local_needs, local_step, measured_rate
from train.processes import hosts
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.rewards.ask import columns_of
from train.rewards.reward import RewardBatch
from train.run.costs import byte_size
from train.run.log import doing
from train.run.output import state_of
from train.run.rules import rules
from train.stages.inputs import Inputs, make_inputs
from train.stages.remat import settle_remat, settle_step
from train.stages.types import AskedRun, RunContext
from train.tools.contract import EpisodeHost

_ROWS = 3  # that are shown
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_UTILISATION = 0.5  # the share of a matrix product's FLOP/s that a whole step is assumed to reach
_REFUSAL = jax.errors.JaxRuntimeError
_REFUSED = "the compiler refuses the step (--remat or a smaller --batch-size need less memory): "
Say = Callable[[str], None]
COMPLETION = "Hello! The answer is 4."  # that rewards are asked about
OPEN, CLOSE = "[[", "]]"  # around what the loss counts, where there are no colours


def rehearse(asked: AskedRun, session: Session, context: RunContext, console: Console) -> None:
    """Shows a run that is asked for without running it; reads its rows without a lock.

    Args:
      asked: the run.
      session: closes what the rows need in the end.
      context: the rows that are read already.
      console: console to print to.

    Raises:
      UserError: something that was asked for cannot be done.
    """
    with hosts.raise_in_every_process():
        run, task = asked.options.run, asked.task
        mesh = make_mesh(run.mesh, asked.options.optim.batch_size, slice_axis=run.slice_axis)
        platform = platform_of(mesh.devices.flat[0])
        config = settle_remat(task.completed(asked.options), platform)
        rules(config.adapter)
        read = context.reader(config, task)
        session.release.callback(read.data.close)
        inputs = make_inputs(config, mesh, read)
    for line in inputs.lines:
        tell(console, line)
    show(config, inputs, task.loss(config, inputs.layout), console)


def show(config: Options, inputs: Inputs, loss: Loss, console: Console) -> None:
    """Prints the first rows, the lengths, and the steps, memory and time of a run.

    Args:
      config: the options of the run, checked.
      inputs: its rows, examples and batches, and the model without its weights.
      loss: the function to minimise.
      console: console to print to.
    """
    _, outline, data = inputs.read
    feed, layout = inputs.feed, inputs.layout
    say = functools.partial(tell, console)
    say("")
    coloured = console.is_terminal and not console.no_color
    labels = data.facts.get("labels", ())
    marked = "in green" if coloured else f"in {OPEN} {CLOSE}"
    if isinstance(feed, PromptFeed):
        say("the first prompts, as the model sees them; the loss counts what it draws after them:")
    else:
        counted = "" if labels else f"; the loss counts what is {marked}"
        say(f"the first rows, as the model sees them{counted}:")
    for row in preview_rows(data.train, outline.tokenizer, _ROWS, labels, data.row):
        say(f"--- {row.title}")
        console.print(as_text(row, coloured=coloured), soft_wrap=True)
    say("---")
    if isinstance(feed, PromptFeed) and feed.rewards is not None:
        _print_reward(say, feed)
    if isinstance(feed, PromptFeed) and feed.server is not None:
        for line in lines_of_server(feed.server, feed):
            say(line)
    if isinstance(feed, PromptFeed) and feed.tools is not None:
        for line in episode_lines(feed.tools.host, feed.prompts.rows[0]):
            say(line)
    sizes = lengths(data.train)
    percentiles = np.percentile(sizes, _PERCENTILES, method="higher").astype(int).tolist()
    shares = ", ".join(f"{n} ({p}%)" for p, n in zip(_PERCENTILES, percentiles, strict=True))
    what = _a_sequence(inputs)
    say(f"tokens of {what}, by percentiles: {shares}; {sizes.mean():,.1f} on average")
    first = feed.first()
    _print_steps(say, config, inputs, first)
    step = local_step(config, outline, layout, loss, first)

    def compile_rung(remat: str) -> tuple[jax.stages.Compiled, int | None]:
        with jax.set_mesh(layout.mesh):
            compiled = step.trace(remat).lower().compile()
        return compiled, step_bytes(compiled)

    with doing(console, "compiling"), as_user_errors(_REFUSAL, prefix=_REFUSED):
        remat, compiled = settle_step(
            config, inputs, [first], step.base, [step.state], compile_rung, say
        )
        config = replace_options(config, {"remat": remat})
        needed = local_needs(dataclasses.replace(step, config=config), compiled)
    _print_memory(say, needed)
    if teacher := getattr(config.data, "teacher_model", None):
        say(f"the teacher, {teacher}, needs memory besides")
    _print_time(say, config, inputs, needed)
    say(f"{config.run.output}: {state_of(config.run.output)}")
    say("nothing was trained, and nothing was written: leave out --dry-run to train")


def _print_reward(say: Say, feed: PromptFeed) -> None:
    """Asks the rewards about a fixed completion of the first prompt; prints what they answer."""
    assert feed.rewards is not None
    if feed.tools is not None and not feed.config.data.reward:
        return say(f"{feed.tools.host.name} alone rewards completions: none is judged here")
    row, group = feed.prompts.rows[0], feed.config.data.group
    chat = [{"role": "assistant", "content": COMPLETION}]
    ids = feed.outline.tokenizer(COMPLETION, add_special_tokens=False)["input_ids"]
    batch = RewardBatch(
        prompts=[feed.prompts.asked(0)] * group,
        completions=[COMPLETION] * group,
        completion_ids=[ids] * group,
        columns=columns_of([row] * group, feed.prompts.columns),
        group=group,
        state=feed.progress(0),
        chats=() if feed.tools is None else [chat] * group,
    )
    began = time.perf_counter()
    totals = feed.rewards(batch)
    took = time.perf_counter() - began
    say(f"the rewards of {COMPLETION!r} after the first prompt, in {duration(took)}:")
    for name, values in totals.by_name.items():
        known = dict.fromkeys("none" if np.isnan(x) else f"{x:.4g}" for x in values)
        say(f"  {name}: {', '.join(known)}")
    for line in totals.said:
        say(f"warning: {line}")


def as_text(row: PreviewRow, *, coloured: bool) -> Text:
    """Returns a sequence with what the loss counts in green, or in brackets."""
    if coloured:
        return Text.assemble(*((s.text, "green" if s.counted else "") for s in row.spans))
    return Text("".join(f"{OPEN}{s.text}{CLOSE}" if s.counted else s.text for s in row.spans))


def _a_sequence(inputs: Inputs) -> str:
    """Returns the name of a sequence of the examples."""
    if isinstance(inputs.feed, PromptFeed):
        return "a prompt"
    if isinstance(inputs.read.data.train, Preferences):
        return "a prompt with its completion"
    return "a row" if inputs.read.data.feed is None else "a row of the sample"


def _print_steps(say: Say, config: Options, inputs: Inputs, first: HostBatch) -> None:
    optim, run, feed, steps = config.optim, config.run, inputs.feed, inputs.steps
    examples, rolling = inputs.read.data.train, isinstance(feed, PromptFeed)
    unit = "completions" if rolling else "sequences"
    if isinstance(examples, Preferences) and len(examples) == examples.n_units:
        unit = "pairs" if examples.a_unit == 2 else "rows"
    n = optim.batch_size * optim.grad_accum
    of_step = f"{n} {unit} a step" + (
        f" ({optim.grad_accum} batches of {optim.batch_size})" if optim.grad_accum > 1 else ""
    )
    shape = " × ".join(map(str, _largest(first, examples)))
    epochs, taken = "", steps / getattr(optim, "updates", 1)  # steps that take rows of their own
    if isinstance(feed, Feed | PromptFeed):
        epochs = f", {taken * feed.order.rows_a_step / feed.order.n_rows:.2f} epochs"
    say(f"steps: {steps:,}{epochs}; {of_step}; the largest batch is {shape} tokens")
    if isinstance(feed, PromptFeed):
        prompts = n // config.data.group if feed.share_prompt else n  # that the step reads
        new, asked = n * first["targets"].shape[-1], prompts * lengths(examples).mean()
        say(f"tokens a step: about {asked:,.0f} of prompts, and at most {new:,} that are drawn")
    else:
        some = [feed.tokens(feed.batch(number)) for number in range(min(steps, 16))]
        a_step = float(np.mean(some))
        say(
            f"tokens without padding: {a_step:,.0f} a step (of the first {len(some)}), about "
            f"{a_step * steps:,.0f} in all"
        )
    if run.eval_every:
        say(f"held-out loss: {steps // run.eval_every + bool(steps % run.eval_every)} times")


def _largest(first: HostBatch, examples: Examples) -> tuple[int, ...]:
    """Returns the rows and tokens of the largest batch."""
    if isinstance(examples, Images):
        return first["labels"].shape[1], examples.length
    return first["ids"].shape[1:]


def _print_memory(say: Say, needed: LocalNeeds) -> None:
    parts = {
        "base": needed.base,
        "adapter": needed.adapter,
        "optimiser": needed.optimizer,
        "temporaries of the step" if needed.between else "temporaries": needed.temporaries,
        **{f"of the {name}": n for name, n in needed.between.items()},
    }
    known = ", ".join(f"{name} {byte_size(n)}" for name, n in parts.items() if n is not None)
    if needed.total is None:
        say(f"memory of a device: {known}; this compiler does not report a step's temporaries")
    else:
        of = "" if needed.capacity is None else f" of {byte_size(needed.capacity)}"
        fits = needed.capacity is None or needed.total < needed.capacity
        say(
            f"memory of a device, by the compiler: {byte_size(needed.total)}{of} ({known}"
            f"{', one at a time' * bool(needed.between)}). The process itself, its rows and "
            "programs come on top"
        )
        if not fits:
            say("warning: this does not fit: use --remat, a smaller --batch-size or --seq-len")
    say(f"a checkpoint on disk: {byte_size(needed.checkpoint)}")


def _print_time(say: Say, config: Options, inputs: Inputs, needed: LocalNeeds) -> None:
    if needed.flops is None or needed.scored is None:
        return
    feed, steps = inputs.feed, inputs.steps
    rate = measured_rate(config.optim.dtype, list(inputs.layout.mesh.devices.flat))
    live = is_live(config)
    flops = needed.flops + live * needed.scored
    a_step = flops / (rate * _UTILISATION)
    say(
        f"time, an estimate: {a_step:,.2f} s a step and {duration(a_step * steps)} in all, if a "
        f"step of {flops / 1e12:,.3f} TFLOP reaches {100 * _UTILISATION:.0f}% of the "
        f"{rate / 1e9:,.0f} GFLOP/s that a product of matrices reached here just now; the largest "
        "batches are assumed throughout"
    )
    if not live and isinstance(feed, Feed):
        once = needed.scored * feed.n_examples / feed.order.rows_a_step / (rate * _UTILISATION)
        say(f"before that, the reference reads all rows once: {duration(once)}")
    if isinstance(feed, PromptFeed):
        say("drawing the completions takes time besides, a token after the other")


def episode_lines(host: EpisodeHost, row: Row) -> Iterator[str]:
    """Yields lines about the tools, and about an episode that is opened for a row and closed."""
    yield "the tools that a completion may call:"
    for tool in host.tools:
        yield f"  {_signature(tool['function'])}"
    if not host.name:
        return
    (opening,) = host.open([row], rehearsed=True)
    episode = opening.result()
    try:
        if episode.lost is not None:
            yield f"warning: no episode of the first prompt: {episode.lost}"
        elif episode.opening:
            yield f"{host.name} opens an episode of the first prompt with {episode.opening!r}"
        else:
            yield f"{host.name} opens an episode of the first prompt without a text of its own"
        if episode.changed:
            yield (
                f"warning: an episode changes {', '.join(episode.changed)}. Other episodes do not "
                "see the change, since each begins with the values of the import. Keep the state "
                "of an episode in the environment, and what differs between episodes in their rows"
            )
    finally:
        episode.close()


def _signature(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    arguments = ", ".join(
        f"{name}: {schema.get('type', 'any')}{'' if name in required else ' = …'}"
        for name, schema in (parameters.get("properties") or {}).items()
    )
    about = " ".join(str(function.get("description", "")).split())
    return f"{function['name']}({arguments}): {about[:100]}"
