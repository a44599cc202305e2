"""Shows a run without running it: `--dry-run` of `train.sft` and `train.classify`."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from lora_jax.training.batches import HostBatch
from lora_jax.training.data.order import Batches, Feed
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.run.log import duration
from train.console.errors import as_user_errors
from train.console.output import tell
from train.data.shown import Shown, lengths, shown
from train.inputs import Inputs
from train.options.common import Options
from train.plan.local import Needs, measured_rate, needs
from train.run.log import doing
from train.run.output import state_of
from train.run.report import megabytes

_ROWS = 3  # that are shown
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_UTILISATION = 0.5  # the share of a matrix product's FLOP/s that a whole step is assumed to reach
_REFUSAL = jax.errors.JaxRuntimeError
_REFUSED = "the compiler refuses the step (--remat or a smaller --batch-size need less memory): "
Say = Callable[[str], None]
OPEN, CLOSE = "[[", "]]"  # around what the loss counts, where there are no colours


def rehearse(config: Options, inputs: Inputs, loss: Loss, console: Console) -> None:
    """Prints the first rows, the lengths, and the steps, memory and time of a run.

    Args:
      config: the options of the run, checked.
      inputs: its rows, examples and batches, and the model without its weights.
      loss: the function to minimise.
      console: console to print to.
    """
    _, outline, data = inputs.read
    feed, layout, steps = inputs.feed, inputs.layout, inputs.steps
    say = functools.partial(tell, console)
    say("")
    coloured = console.is_terminal and not console.no_color
    labels = data.facts.get("labels", ())
    marked = "in green" if coloured else f"in {OPEN} {CLOSE}"
    counted = "" if labels else f"; the loss counts what is {marked}"
    say(f"the first rows, as the model sees them{counted}:")
    for one in shown(data.train, outline.tokenizer, _ROWS, labels, data.row):
        say(f"--- {one.title}")
        console.print(as_text(one, coloured=coloured), soft_wrap=True)
    say("---")
    sizes = lengths(data.train)
    found = np.percentile(sizes, _PERCENTILES, method="higher").astype(int).tolist()
    shares = ", ".join(f"{n} ({p}%)" for p, n in zip(_PERCENTILES, found, strict=True))
    of = "a row" if data.feed is None else "a row of the sample"
    say(f"tokens of {of}, by percentiles: {shares}; {sizes.mean():,.1f} on average")
    first = feed.first()
    _print_steps(say, config, feed, steps, first)
    with doing(console, "compiling the step"), as_user_errors(_REFUSAL, prefix=_REFUSED):
        needed = needs(config, outline, layout, loss, first)
    _print_memory(say, needed)
    _print_time(say, config, layout, needed, steps)
    say(f"{config.run.output}: {state_of(Path(config.run.output).expanduser())}")
    say("nothing was trained, and nothing was written: leave out --dry-run to train")


def as_text(one: Shown, *, coloured: bool) -> Text:
    """Returns a sequence with what the loss counts in green, or in brackets."""
    if coloured:
        return Text.assemble(*((one.text, "green" if one.counted else "") for one in one.spans))
    return Text("".join(f"{OPEN}{s.text}{CLOSE}" if s.counted else s.text for s in one.spans))


def _print_steps(say: Say, config: Options, feed: Batches, steps: int, first: HostBatch) -> None:
    optim, run = config.optim, config.run
    of_step = f"{optim.batch_size * optim.grad_accum} sequences a step" + (
        f" ({optim.grad_accum} batches of {optim.batch_size})" if optim.grad_accum > 1 else ""
    )
    shape = " × ".join(map(str, first["ids"].shape[1:]))
    epochs = ""
    if isinstance(feed, Feed):
        epochs = f", {steps * feed.order.rows_a_step / feed.order.n_rows:.2f} epochs"
    say(f"steps: {steps:,}{epochs}; {of_step}; the largest batch is {shape} tokens")
    some = [feed.tokens(feed.batch(number)) for number in range(min(steps, 16))]
    a_step = float(np.mean(some))
    say(
        f"tokens without padding: {a_step:,.0f} a step (of the first {len(some)}), about "
        f"{a_step * steps:,.0f} in all"
    )
    if run.eval_every:
        say(f"held-out loss: {steps // run.eval_every + bool(steps % run.eval_every)} times")


def _print_memory(say: Say, needed: Needs) -> None:
    parts = {
        "base": needed.base,
        "adapter": needed.adapter,
        "optimiser": needed.optimizer,
        "temporaries": needed.temporaries,
    }
    known = ", ".join(f"{name} {megabytes(n)}" for name, n in parts.items() if n is not None)
    if needed.total is None:
        say(f"memory of a device: {known}; this compiler does not report a step's temporaries")
    else:
        of = "" if needed.capacity is None else f" of {megabytes(needed.capacity)}"
        fits = needed.capacity is None or needed.total < needed.capacity
        say(
            f"memory of a device, by the compiler: {megabytes(needed.total)}{of} ({known}). The "
            "process itself, its rows and programs come on top"
        )
        if not fits:
            say("warning: this does not fit: use --remat, a smaller --batch-size or --seq-len")
    say(f"a checkpoint on disk: {megabytes(needed.checkpoint)}")


def _print_time(say: Say, config: Options, layout: Layout, needed: Needs, steps: int) -> None:
    if needed.flops is None:
        return
    rate = measured_rate(config.optim.dtype, list(layout.mesh.devices.flat))
    a_step = needed.flops / (rate * _UTILISATION)
    say(
        f"time, an estimate: {a_step:,.2f} s a step and {duration(a_step * steps)} in all, if a "
        f"step of {needed.flops / 1e12:,.3f} TFLOP reaches {100 * _UTILISATION:.0f}% of the "
        f"{rate / 1e9:,.0f} GFLOP/s that a product of matrices reached here just now; the largest "
        "batches are assumed throughout. Compiling the step took "
        f"{duration(needed.compile_seconds)}"
    )
