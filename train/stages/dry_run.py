"""Prints the rows, steps, memory and time of a run without running it: `--dry-run`."""

import dataclasses
import functools
import math
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
from train.plan.local import LocalNeeds, local_needs, local_step, measure_flop_rate
from train.processes import hosts
from train.processes.mesh import make_mesh
from train.processes.session import Session
from train.rewards.ask import collect_columns
from train.rewards.reward import RewardBatch
from train.run.costs import byte_size
from train.run.log import doing
from train.run.output import state_of
from train.run.rules import rules
from train.stages.inputs import Inputs, make_inputs
from train.stages.remat import settle_remat, settle_step
from train.stages.types import RequestedRun, RunContext
from train.tools.contract import EpisodeHost

_N_SHOWN_ROWS = 3
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_UTILISATION = 0.5  # the share of a matrix product's FLOP/s that a whole step is assumed to reach
_REFUSAL = jax.errors.JaxRuntimeError
_REFUSED = (
    "The compiler refuses the step. Use --remat or a smaller --batch-size, which need less memory. "
    "The compiler's message is: "
)
Say = Callable[[str], None]
COMPLETION = "Hello! The answer is 4."  # the completion that the dry run has rewarded
OPEN, CLOSE = "[[", "]]"  # marks around the counted tokens, on consoles without colours


def rehearse(
    requested: RequestedRun, session: Session, context: RunContext, console: Console
) -> None:
    """Prints a requested run without running it. Reads its rows without locking its folder.

    Args:
      requested: the run.
      session: closes the resources of the rows at the end.
      context: contains the rows that are read already.
      console: console to print to.

    Raises:
      UserError: the run is not possible with these options.
    """
    task = requested.task
    with hosts.raise_in_every_process():
        run = requested.options.run
        mesh = make_mesh(run.mesh, requested.options.optim.batch_size, slice_axis=run.slice_axis)
        platform = platform_of(mesh.devices.flat[0])
        config = settle_remat(task.completed(requested.options), platform)
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
      config: the checked options of the run.
      inputs: the run's rows, examples and batches, and the model without its weights.
      loss: the function to minimise.
      console: console to print to.
    """
    say = functools.partial(tell, console)
    say("")
    _print_rows(say, inputs, console)
    _print_lengths(say, inputs)
    largest_batch = inputs.feed.first()
    _print_steps(say, config, inputs, largest_batch)
    # Compile the step, with each policy of --remat auto until one fits.
    layout = inputs.layout
    step = local_step(config, inputs.read.outline, layout, loss, largest_batch)

    def compile_rung(remat: str) -> tuple[jax.stages.Compiled, int | None]:
        with jax.set_mesh(layout.mesh):
            compiled = step.trace(remat).lower().compile()
        return compiled, step_bytes(compiled)

    with doing(console, "compiling"), as_user_errors(_REFUSAL, prefix=_REFUSED):
        remat, compiled = settle_step(
            config, inputs, [largest_batch], step.base, [step.state], compile_rung, say
        )
        config = replace_options(config, {"remat": remat})
        needs = local_needs(dataclasses.replace(step, config=config), compiled)
    _print_memory(say, needs)
    teacher = getattr(config.data, "teacher_model", None)
    if teacher:
        say(f"the teacher, {teacher}, needs additional memory")
    _print_time(say, config, inputs, needs)
    say(f"{config.run.output}: {state_of(config.run.output)}")
    say("nothing was trained, and nothing was written. Remove --dry-run to train")


def _print_rows(say: Say, inputs: Inputs, console: Console) -> None:
    """Prints the first rows, and the rewards, the sampling server and the tools of completions."""
    data = inputs.read.data
    feed = inputs.feed
    has_colours = console.is_terminal and not console.no_color
    labels = data.facts.get("labels", ())
    if isinstance(feed, PromptFeed):
        say("the first prompts, as the model sees them; the loss counts tokens drawn after them:")
    elif labels:
        say("the first rows, as the model sees them:")
    else:
        marking = "in green" if has_colours else f"in {OPEN} {CLOSE}"
        say(f"the first rows, as the model sees them; the loss counts the text {marking}:")
    shown_rows = preview_rows(
        data.train, inputs.read.outline.tokenizer, _N_SHOWN_ROWS, labels, data.row
    )
    for row in shown_rows:
        say(f"--- {row.title}")
        console.print(as_text(row, coloured=has_colours), soft_wrap=True)
    say("---")
    if not isinstance(feed, PromptFeed):
        return
    if feed.rewards is not None:
        _print_reward(say, feed)
    if feed.server is not None:
        for line in lines_of_server(feed.server, feed):
            say(line)
    if feed.tools is not None:
        for line in episode_lines(feed.tools.host, feed.prompts.rows[0]):
            say(line)


def _print_lengths(say: Say, inputs: Inputs) -> None:
    """Prints percentiles and the mean of the rows' lengths."""
    token_counts = lengths(inputs.read.data.train)
    percentiles = np.percentile(token_counts, _PERCENTILES, method="higher").astype(int).tolist()
    percentile_texts = [
        f"{count} ({percent}%)" for percent, count in zip(_PERCENTILES, percentiles, strict=True)
    ]
    say(
        f"tokens per {_sequence_name(inputs)}, by percentiles: {', '.join(percentile_texts)}; "
        f"{token_counts.mean():,.1f} on average"
    )


def _print_reward(say: Say, feed: PromptFeed) -> None:
    """Computes and prints the rewards of a fixed completion of the first prompt."""
    assert feed.rewards is not None
    # Only the environment rewards completions, and here no completion acts in it.
    if feed.tools is not None and not feed.config.data.reward:
        return say(f"only {feed.tools.host.name} rewards completions, so no reward is shown here")
    row = feed.prompts.rows[0]
    group = feed.config.data.group
    chat = [{"role": "assistant", "content": COMPLETION}]
    ids = feed.outline.tokenizer(COMPLETION, add_special_tokens=False)["input_ids"]
    batch = RewardBatch(
        prompts=[feed.prompts.prompt_of(0)] * group,
        completions=[COMPLETION] * group,
        completion_ids=[ids] * group,
        columns=collect_columns([row] * group, feed.prompts.columns),
        group=group,
        state=feed.progress(0),
        chats=() if feed.tools is None else [chat] * group,
    )
    start_time = time.perf_counter()
    rewards = feed.rewards(batch)
    seconds = time.perf_counter() - start_time
    say(f"the rewards of {COMPLETION!r} after the first prompt, in {duration(seconds)}:")
    # All completions of the group are the same, so that equal rewards are printed once.
    for name, values in rewards.by_name.items():
        texts = ["none" if np.isnan(value) else f"{value:.4g}" for value in values]
        say(f"  {name}: {', '.join(dict.fromkeys(texts))}")
    for line in rewards.said:
        say(f"warning: {line}")


def as_text(row: PreviewRow, *, coloured: bool) -> Text:
    """Returns the text of a sequence, with the counted tokens in green or in brackets."""
    text = Text()
    for span in row.spans:
        if not span.counted:
            text.append(span.text)
        elif coloured:
            text.append(span.text, "green")
        else:
            text.append(f"{OPEN}{span.text}{CLOSE}")
    return text


def _sequence_name(inputs: Inputs) -> str:
    """Returns the noun for a sequence of the examples, such as "row"."""
    if isinstance(inputs.feed, PromptFeed):
        return "prompt"
    if isinstance(inputs.read.data.train, Preferences):
        return "prompt with its completion"
    return "row" if inputs.read.data.feed is None else "row of the sample"


def _print_steps(say: Say, config: Options, inputs: Inputs, largest_batch: HostBatch) -> None:
    """Prints the number of steps, and the sequences and tokens of a step."""
    optim = config.optim
    feed = inputs.feed
    examples = inputs.read.data.train
    sequence_noun = "completions" if isinstance(feed, PromptFeed) else "sequences"
    if isinstance(examples, Preferences) and len(examples) == examples.n_units:
        sequence_noun = "pairs" if examples.a_unit == 2 else "rows"
    n_sequences = optim.batch_size * optim.grad_accum
    step_text = f"{n_sequences} {sequence_noun} per step"
    if optim.grad_accum > 1:
        step_text += f" ({optim.grad_accum} batches of {optim.batch_size})"
    epochs = ""
    if isinstance(feed, Feed | PromptFeed):
        # With --updates, several steps train on the same rows.
        steps_with_rows = inputs.steps / getattr(optim, "updates", 1)
        epochs = f", {steps_with_rows * feed.order.rows_a_step / feed.order.n_rows:.2f} epochs"
    shape = " × ".join(map(str, _batch_shape(largest_batch, examples)))
    say(f"steps: {inputs.steps:,}{epochs}; {step_text}; the largest batch is {shape} tokens")
    if isinstance(feed, PromptFeed):
        # The completions are not drawn yet.
        n_prompts = n_sequences // config.data.group if feed.share_prompt else n_sequences
        prompt_tokens = n_prompts * lengths(examples).mean()
        drawn_tokens = n_sequences * largest_batch["targets"].shape[-1]
        say(
            f"tokens per step: about {prompt_tokens:,.0f} of prompts, and at most "
            f"{drawn_tokens:,} drawn tokens"
        )
    else:
        n_counted = min(inputs.steps, 16)
        token_counts = [feed.tokens(feed.batch(number)) for number in range(n_counted)]
        mean_tokens = float(np.mean(token_counts))
        say(
            f"tokens without padding: {mean_tokens:,.0f} per step (mean of the first {n_counted}), "
            f"about {mean_tokens * inputs.steps:,.0f} in total"
        )
    interval = config.run.eval_every
    if interval:
        say(f"the held-out loss is measured {math.ceil(inputs.steps / interval)} times")


def _batch_shape(batch: HostBatch, examples: Examples) -> tuple[int, ...]:
    """Returns the rows and tokens of a batch."""
    if isinstance(examples, Images):
        return batch["labels"].shape[1], examples.length
    return batch["ids"].shape[1:]


def _print_memory(say: Say, needs: LocalNeeds) -> None:
    """Prints the memory of a step by its parts, and the size of a checkpoint."""
    has_several_programs = bool(needs.between)
    sizes = {
        "base": needs.base,
        "adapter": needs.adapter,
        "optimiser": needs.optimizer,
        "temporaries of the step" if has_several_programs else "temporaries": needs.temporaries,
    }
    for name, size in needs.between.items():
        sizes[f"of the {name}"] = size
    size_texts = [f"{name} {byte_size(size)}" for name, size in sizes.items() if size is not None]
    size_list = ", ".join(size_texts)
    if needs.total is None:
        say(f"memory per device: {size_list}; this compiler does not report a step's temporaries")
    else:
        capacity = "" if needs.capacity is None else f" of {byte_size(needs.capacity)}"
        remark = ", one at a time" if has_several_programs else ""
        say(
            f"memory per device, by the compiler: {byte_size(needs.total)}{capacity} ({size_list}"
            f"{remark}). The process itself, its rows and its programs need additional memory"
        )
        if needs.capacity is not None and needs.total >= needs.capacity:
            say(
                "warning: this does not fit into the device's memory. Use --remat, or a smaller "
                "--batch-size or --seq-len"
            )
    say(f"a checkpoint on disk: {byte_size(needs.checkpoint)}")


def _print_time(say: Say, config: Options, inputs: Inputs, needs: LocalNeeds) -> None:
    """Prints an estimate of the time of a run, if its FLOPs are known."""
    if needs.flops is None or needs.scored is None:
        return
    feed = inputs.feed
    rate = measure_flop_rate(config.optim.dtype, list(inputs.layout.mesh.devices.flat))
    step_rate = rate * _UTILISATION
    scores_in_step = is_live(config)
    step_flops = needs.flops + needs.scored if scores_in_step else needs.flops
    step_seconds = step_flops / step_rate
    say(
        f"estimated time: {step_seconds:,.2f} s per step and "
        f"{duration(step_seconds * inputs.steps)} in total. The estimate assumes that a step of "
        f"{step_flops / 1e12:,.3f} TFLOP reaches {100 * _UTILISATION:.0f}% of the "
        f"{rate / 1e9:,.0f} GFLOP/s that a matrix product just reached here, and that all batches "
        "are as large as the largest"
    )
    if not scores_in_step and isinstance(feed, Feed):
        n_batches = feed.n_examples / feed.order.rows_a_step
        reference_seconds = needs.scored * n_batches / step_rate
        say(f"before training, the reference scores all rows: {duration(reference_seconds)}")
    if isinstance(feed, PromptFeed):
        say("drawing the completions, one token after the other, takes additional time")


def episode_lines(host: EpisodeHost, row: Row) -> Iterator[str]:
    """Yields lines about the tools, and about a test episode of a row."""
    yield "the tools that a completion may call:"
    for tool in host.tools:
        yield f"  {_signature(tool['function'])}"
    # Without an environment, there are no episodes.
    if not host.name:
        return
    (opening,) = host.open([row], rehearsed=True)
    episode = opening.result()
    try:
        if episode.lost is not None:
            yield f"warning: the episode of the first prompt failed: {episode.lost}"
        elif episode.opening:
            yield f"{host.name} opens an episode of the first prompt with {episode.opening!r}"
        else:
            yield f"{host.name} opens an episode of the first prompt without a text"
        if episode.changed:
            yield (
                f"warning: an episode changes {', '.join(episode.changed)}. Other episodes do not "
                "see this change, because each episode starts with the values after the import. "
                "Keep the state of an episode in the environment, and differences between episodes "
                "in their rows."
            )
    finally:
        episode.close()


def _signature(function: Mapping[str, Any]) -> str:
    """Returns a tool's name, its parameters with types, and its description as one line."""
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    arguments: list[str] = []
    for name, schema in (parameters.get("properties") or {}).items():
        default = "" if name in required else " = …"
        arguments.append(f"{name}: {schema.get('type', 'any')}{default}")
    description = " ".join(str(function.get("description", "")).split())
    return f"{function['name']}({', '.join(arguments)}): {description[:100]}"
