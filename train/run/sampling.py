"""The sampling that a generation_config.json advises, and the option --generation-config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.generation import GENERATION_FILE, Generation, read_generation_config
from train.console.errors import UserError, as_user_errors, flag
from train.console.output import say
from train.run.pretrained import ModelInfo

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
AUTO = "auto"  # the model's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOption:
    """The sampling that the makers of a model advise."""

    generation_config: str | None = None
    """Sample as a generation_config.json says, where no option or request says otherwise: auto for
    the model's own, or another folder or file. By default its temperature, top_p and top_k are
    shown, and not used. The tokens in it that end an answer count in any case."""


def apply_generation_config(
    outline: ModelInfo, given: str | None, asked: Mapping[str, Any] | None = None
) -> tuple[ModelInfo, dict[str, Any]]:
    """Applies --generation-config, and says how answers are sampled.

    Args:
      outline: the model's.
      given: the option.
      asked: further options that were given, by name; those of sampling take precedence.

    Returns:
      The outline, with the tokens of another file that end an answer; and the temperature, top_p
      and top_k to use in the place of a script's defaults, where the file gives them.

    Raises:
      UserError: the file cannot be read, or says nothing of sampling that `asked` leaves open.
    """
    option = f"--generation-config {given}"
    if given not in (None, AUTO):
        with as_user_errors(ConfigError, prefix=f"{option}: "):
            advised = read_generation_config(Path(str(given)).expanduser())
        config: Any = dataclasses.replace(outline.config, generation=advised)  # type: ignore[arg-type]
        outline = dataclasses.replace(outline, config=config)
    generation: Generation | None = getattr(outline.config, "generation", None)
    sampling = {} if generation is None else generation.sampling
    if given is None:
        is_greedy = sampling.get("temperature") == 0
        if sampling and not is_greedy:
            fields = _fields_text(sampling)
            say(f"{GENERATION_FILE} samples with {fields}: --generation-config auto does so, too")
        return outline, {}
    if generation is None or not sampling:
        problem = "the model has none" if generation is None else "it says nothing of sampling"
        raise UserError(f"{option}: {problem}: leave it out, or name another {GENERATION_FILE}")
    with as_user_errors(ConfigError, prefix=f"{option}: {GENERATION_FILE}: "):
        generation.check_sampling()
    options = asked or {}
    overrides = {name: options[name] for name in _SAMPLING_FIELDS if name in options}
    flags = ", ".join(map(flag, overrides))
    if sampling.keys() <= overrides.keys() and given == AUTO:
        raise UserError(
            f"{option} has no effect beside {flags}: it says nothing else of sampling; leave it out"
        )
    sentence = f"sampling as {GENERATION_FILE} says"
    if overrides:
        sentence += f" but for {flags}"
    sentence += f": {_fields_text(sampling | overrides)}"
    if generation.others:
        sentence += f"; not applied: {_fields_text(generation.others)}"
    say(sentence)
    return outline, sampling


def _fields_text(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
