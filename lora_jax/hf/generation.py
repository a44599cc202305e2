"""Reads generation_config.json: the end tokens and the sampling settings."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, read_eos, read_json_fields
from lora_jax.hf.format import AnyConfig

GENERATION_FILE = "generation_config.json"
_IS_VALID_SAMPLING_VALUE: dict[str, Callable[[float], bool]] = {
    "temperature": lambda x: 0 <= x < math.inf,
    "top_p": lambda x: 0 < x <= 1,
    "top_k": lambda x: x >= 1 and x == int(x),
}
# Further fields that change the drawn tokens, with their values without an effect, besides null.
_VALUES_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("sequence_bias", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "top_h"), (0,)),
    **dict.fromkeys(("num_beams", "guidance_scale"), (1,)),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """The fields of a generation_config.json. Hashable, as part of a configuration.

    Attributes:
      text: the file's text, which `lora_jax.models.save_pretrained` writes again.

    Raises:
      ConfigError: eos_token_id is no token id, and no list of such.

    >>> from lora_jax.hf.generation import Generation
    >>> found = Generation('{"eos_token_id": [2, 5], "do_sample": true, "temperature": 0.6}')
    >>> found.eos_token_ids, found.sampling
    ((2, 5), {'temperature': 0.6})
    """

    text: str

    def __post_init__(self) -> None:
        for token in self.eos_token_ids:
            is_token_id = isinstance(token, int) and not isinstance(token, bool)
            if not is_token_id:
                eos = self.fields["eos_token_id"]
                raise ConfigError(
                    f"eos_token_id={eos!r} is not a token id or a list of them. Correct the file."
                )

    @cached_property
    def fields(self) -> Fields:
        """The fields as written in the file."""
        fields: Fields = json.loads(self.text)
        return fields

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return read_eos(self.fields)

    @property
    def sampling(self) -> dict[str, Any]:
        """The temperature, top_p and top_k of the file; temperature 0 for greedy decoding.

        A file with ``"do_sample": false`` asks for that, whatever its temperature. Without the
        field, a temperature counts. A top_k of 0 or -1 keeps all tokens, and is left out.
        """
        if self.fields.get("do_sample") is False:
            return {"temperature": 0.0}
        settings = {name: self.fields.get(name) for name in _IS_VALID_SAMPLING_VALUE}
        if self.fields.get("do_sample") and settings["temperature"] is None:
            settings["temperature"] = 1.0
        if settings["top_k"] in (0, -1):
            settings["top_k"] = None
        return {name: value for name, value in settings.items() if value is not None}

    def check_sampling(self) -> None:
        """Raises a ConfigError for invalid values of `sampling`."""
        for name, value in self.sampling.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and _IS_VALID_SAMPLING_VALUE[name](value)):
                raise ConfigError(
                    f"{name}={value!r} is not a valid value for sampling. Correct the file."
                )

    @property
    def others(self) -> dict[str, object]:
        """The other fields that change sampling, but are not applied here."""
        effective = {}
        for name, neutral_values in _VALUES_WITHOUT_EFFECT.items():
            value = self.fields.get(name)
            if value is not None and value not in neutral_values:
                effective[name] = value
        return effective


def end_token_ids(config: AnyConfig) -> tuple[int, ...]:
    """Returns the end tokens from config.json or generation_config.json.

    In some models, only one of the two files names the end of a turn.

    Args:
      config: a configuration of any family. One without such fields has no end tokens.
    """
    generation: Generation | None = getattr(config, "generation", None)
    tokens = list(getattr(config, "eos_token_ids", ()))
    if generation is not None:
        tokens += generation.eos_token_ids
    return tuple(dict.fromkeys(tokens))


def read_generation_config(path: Path) -> Generation:
    """Reads a generation_config.json.

    Args:
      path: the file, or the folder that holds it.

    Raises:
      ConfigError: the file is missing, cannot be read, or has a field of the wrong kind.
    """
    file = path / GENERATION_FILE if path.is_dir() else path
    read_json_fields(file, "a model", ConfigError)  # raises, if it cannot be read
    try:
        return Generation(file.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def add_generation_config(config: AnyConfig, folder: Path) -> AnyConfig:
    """Adds a folder's generation_config.json to the configuration of its model.

    The configuration stays as it is if the folder lacks the file, or if the model does not generate
    text and so has no such field.

    Raises:
      ConfigError: see `read_generation_config`.
    """
    continues_texts = hasattr(config, "generation")
    if not continues_texts or not (folder / GENERATION_FILE).is_file():
        return config
    return dataclasses.replace(config, generation=read_generation_config(folder))
