"""The option --generation-config, and the sampling that a generation_config.json recommends."""

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
    """The sampling that a model's authors recommend."""

    generation_config: str | None = None
    """Sample with the settings of a generation_config.json: auto for the model's own file, or the
    path of another file or its folder. Options and requests override the file. By default its
    temperature, top_p and top_k are printed but not used. Its end-of-text tokens always apply."""


def apply_generation_config(
    outline: ModelInfo, given: str | None, asked: Mapping[str, Any] | None = None
) -> tuple[ModelInfo, dict[str, Any]]:
    """Applies --generation-config, and prints the settings of the sampling.

    Args:
      outline: the model's outline.
      given: the value of the option.
      asked: the other options that the user passed, by name. Options of sampling take precedence.

    Returns:
      The outline, with the end tokens of another file; and the file's temperature, top_p and top_k
      that replace a script's defaults.

    Raises:
      UserError: the file cannot be read, or would not change the sampling.
    """
    option = f"--generation-config {given}"
    if given not in (None, AUTO):
        with as_user_errors(ConfigError, prefix=f"{option}: "):
            given_config = read_generation_config(Path(str(given)).expanduser())
        config: Any = dataclasses.replace(outline.config, generation=given_config)  # type: ignore[arg-type]
        outline = dataclasses.replace(outline, config=config)
    generation: Generation | None = getattr(outline.config, "generation", None)
    sampling = {} if generation is None else generation.sampling
    # Without the option, only tell the user about the model's own settings.
    if given is None:
        is_greedy = sampling.get("temperature") == 0
        if sampling and not is_greedy:
            fields = _format_fields(sampling)
            say(
                f"{GENERATION_FILE} recommends {fields}; --generation-config auto samples with "
                "these values"
            )
        return outline, {}
    if generation is None or not sampling:
        problem = "the model has no such file"
        if generation is not None:
            problem = "the file contains no settings of sampling"
        raise UserError(
            f"{option} has no effect, because {problem}. Remove the option, or pass the path of "
            f"another {GENERATION_FILE}."
        )
    with as_user_errors(ConfigError, prefix=f"{option}: {GENERATION_FILE}: "):
        generation.check_sampling()
    options = asked or {}
    overrides = {name: options[name] for name in _SAMPLING_FIELDS if name in options}
    flags = ", ".join(map(flag, overrides))
    if sampling.keys() <= overrides.keys() and given == AUTO:
        raise UserError(
            f"{option} has no effect, because {flags} override all of its settings. Remove "
            "--generation-config."
        )
    sentence = f"sampling with the settings of {GENERATION_FILE}"
    if overrides:
        sentence += f" except {flags}"
    sentence += f": {_format_fields(sampling | overrides)}"
    if generation.others:
        sentence += f"; not applied: {_format_fields(generation.others)}"
    say(sentence)
    return outline, sampling


def _format_fields(fields: dict[str, Any]) -> str:
    """Returns names and values as one text."""
    return ", ".join(f"{name} {value}" for name, value in fields.items())
