"""Chooses the kernels of a run: those of its config, and those that hold on the run's devices."""

import dataclasses

from train.options.common import AUTO, Options
from train.options.file import replace_options
from train.run.kernel_trials import choose_replacements, find_trials
from train.run.output import saved_options
from train.stages.types import OpenedRun

_OPTIONS = ("attention", "experts", "few_rows")


def keep_kernels(config: Options) -> Options:
    """Returns the options with the kernels of a resumed run, where the user names none.

    Raises:
      UserError: --resume was passed, but there is no run to resume.
    """
    saved = saved_options(config)
    kept = {}
    for name in _OPTIONS:
        if getattr(config.optim, name) == AUTO and name in saved:
            kept[name] = saved[name]
    return replace_options(config, kept)


class KernelTries:
    """Tries the kernels of runs over one base, each kernel once."""

    def __init__(self) -> None:
        """Has tried no kernel."""
        self._replacements: dict[tuple[str, str], dict[str, str]] = {}

    def settle(self, run: OpenedRun) -> OpenedRun:
        """Returns a run without the kernels that fail on its devices. All processes must call it.

        The options of the run name what replaces a kernel, so that its config.yaml keeps the
        choice.
        """
        inputs = run.inputs
        config = run.config
        trials = find_trials(
            inputs.read.outline,
            inputs.layout,
            attention=inputs.attention,
            dtype=config.optim.dtype,
            requested={name: getattr(config.optim, name) for name in _OPTIONS},
        )
        devices = inputs.layout.mesh.local_devices
        replacements: dict[str, str] = {}
        for trial in trials:
            key = (trial.option, trial.name)
            if key not in self._replacements:
                self._replacements[key] = choose_replacements([trial], devices, run.console)
            replacements |= self._replacements[key]
        if "attention" in replacements:
            inputs = inputs.with_attention(replacements["attention"])
        return dataclasses.replace(run, config=replace_options(config, replacements), inputs=inputs)
