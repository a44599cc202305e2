"""The policy of rematerialisation of a run: --remat auto, and what a resumed run began with."""

from collections.abc import Sequence

from lora_jax.training.layout import Layout
from lora_jax.training.memory.ladder import RematChoice, choose_remat, rungs_for
from train.options.common import AUTO, Options
from train.options.file import replace_options
from train.plan.local import LocalStep, capacity_of
from train.processes import hosts
from train.run.output import saved_options


def settle_remat(config: Options, platform: str) -> Options:
    """Returns the options with --remat as a resumed run has it, or as this platform has it.

    What is left to be chosen is "auto": for a new run on an accelerator, or where it is asked for.

    Raises:
      UserError: --resume, and there is no run to go on with.
    """
    asked = config.optim.remat
    if asked not in (None, AUTO):
        return config
    if saved := saved_options(config):
        return replace_options(config, {"remat": saved.get("remat", "none")})
    default = "none" if platform == "cpu" else AUTO
    return replace_options(config, {"remat": asked or default})


def choose_for(steps: Sequence[LocalStep], attention: str) -> RematChoice:
    """Returns the policy of runs that share a base, predicted from their steps' programs.

    Runs side by side take the sum of what each takes beside the base. All processes have to call
    this: they go by the smallest device of all.

    Args:
      steps: the steps of the runs.
      attention: the name of the implementation of attention.
    """
    layout = steps[0].layout
    base = steps[0].base_bytes

    def predict(remat: str) -> int:
        return base + sum(step.predict(remat) - step.base_bytes for step in steps)

    return choose_remat(rungs_for(layout.platform, attention), predict, smallest_device(layout))


def smallest_device(layout: Layout) -> int | None:
    """Returns the memory of the smallest device of all processes; None if one does not say."""
    own = [capacity_of(device) for device in layout.mesh.local_devices]
    every = [size for sizes in hosts.gather(own) for size in sizes]
    known = [size for size in every if size is not None]
    return min(known) if every and len(known) == len(every) else None
