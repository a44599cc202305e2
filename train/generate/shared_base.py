"""Several adapters over one base: finds, names, checks and loads them."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

import lora_jax as lj
from lora_jax.core.types import Forward, Tree
from lora_jax.models.causal import CausalLM
from lora_jax.models.families import IMAGES
from lora_jax.models.sampling.grammar import CompiledGrammar
from train.adapters.source import ADAPTER, AdapterSource, find_adapter, merge_adapter
from train.console.errors import UserError, as_user_errors, flag
from train.console.output import say
from train.generate.answers import AnswerGenerator
from train.generate.options import BASE, GenerateOptions
from train.options.scripts.sft import DEFAULT_MODEL
from train.run.pretrained import ModelInfo

_NAME_AND_PATH = re.compile(r"([\w.-]+)=(.+)")


class NamedAdapter(NamedTuple):
    """An adapter with its name; `source` is None for the base without an adapter."""

    name: str
    source: AdapterSource | None


def find_adapters(values: Sequence[str]) -> list[NamedAdapter]:
    """Returns the adapters of --adapter, or only the base if there are none.

    One without a name is called after its folder, or by all that was given where two folders have
    the same name.

    Raises:
      UserError: there is no such adapter, or a name is there twice.
    """
    names_and_paths = [_split_name_and_path(value) for value in values or (BASE,)]
    labels = Counter(
        _folder_label(path) if name is None else name for name, path in names_and_paths
    )
    by_name: dict[str, NamedAdapter] = {}
    for name, path in names_and_paths:
        if name is None:
            label = _folder_label(path)
            is_clear = labels[label] == 1 and label != BASE
            name = label if is_clear or path == BASE else path
        if name in by_name:
            raise UserError(
                f"--adapter: Two adapters have the name {name}. Give them different names with "
                "--adapter name=folder."
            )
        by_name[name] = NamedAdapter(name, None if name == BASE else find_adapter(path))
    return list(by_name.values())


def _split_name_and_path(value: str) -> tuple[str | None, str]:
    """Returns the name and the path in a value of --adapter; the name may be None."""
    match = _NAME_AND_PATH.fullmatch(value)
    if match is None or Path(value).expanduser().exists():
        return None, value
    if match[1] == BASE:
        raise UserError(
            f"--adapter {value}: The name {BASE} stands for the base model without an adapter. "
            "Choose another name."
        )
    return match[1], match[2]


def _folder_label(path: str) -> str:
    """Returns the name of an adapter's folder, or the run's folder if that one is `adapter`."""
    parts = Path(os.path.abspath(Path(path).expanduser())).parts
    return parts[-2] if parts[-1] == ADAPTER and len(parts) > 2 else parts[-1]


def choose_base(sources: Sequence[AdapterSource], model: str | None) -> str:
    """Returns the base in --model, or else the base that all adapters name.

    Raises:
      UserError: they state different ones, or one states none.
    """
    if model is not None or not sources:
        return model or DEFAULT_MODEL
    first, *others = sources
    for other in others:
        if other.base() != first.base():
            raise UserError(
                f"{first.option} was trained on {first.base()}, and {other.option} on "
                f"{other.base()}. One command loads one base. Run a command per adapter, "
                "or name the base with --model."
            )
    return first.base()


def choose_tokenizer(sources: Sequence[AdapterSource], tokenizer: str | None) -> str | None:
    """Returns the tokenizer in --tokenizer, or else the one that the adapters name.

    Raises:
      UserError: they were trained with different ones.
    """
    if tokenizer is not None or not sources:
        return tokenizer
    first, *others = sources
    for other in others:
        if other.tokenizer != first.tokenizer:
            raise UserError(
                f"{first.option} was trained with the tokenizer "
                f"{first.tokenizer or 'of its base'}, and {other.option} with "
                f"{other.tokenizer or 'that of its base'}. Run a command per adapter, or name "
                "the tokenizer with --tokenizer."
            )
    return first.tokenizer


def choose_model_code(sources: Sequence[AdapterSource], model_code: str) -> str:
    """Returns the code that runs the base: --model-code, or else the first adapter's."""
    if model_code != "auto":
        return model_code
    for source in sources:
        if source.model_code:
            return source.model_code
    return model_code


def outline_as_trained(outline: ModelInfo, sources: Sequence[AdapterSource]) -> ModelInfo:
    """Returns the base's outline with the RoPE and quantization of the adapters' training.

    Raises:
      UserError: they were trained on it in different ways.
    """
    for setting in ("rope_scaling", "quantize"):
        setting_of_files = outline.head.get(setting)
        for source in sources[1:]:
            first_value = getattr(sources[0], setting) or setting_of_files
            value = getattr(source, setting) or setting_of_files
            if value != first_value:
                option = flag(setting)
                raise UserError(
                    f"{sources[0].option} needs a base with {option} {first_value or 'none'}, but "
                    f"{source.option} needs {option} {value or 'none'}. One command loads one "
                    "base. Run one command for each adapter."
                )
    if any(source.images for source in sources):
        outline = outline.with_images()
    text_sources = [source for source in sources if not (source.images or source.is_peft)]
    if outline.head.get(IMAGES) and text_sources:
        raise UserError(
            f"{text_sources[0].option} was trained on {outline.name} as a model of text only, but "
            "this command loads the model with its image encoder. Run a separate command "
            "for this adapter, without images."
        )
    if not sources:
        return outline
    return outline.scaled(sources[0].rope_scaling).quantized(sources[0].quantize)


def outline_with_template(
    outline: ModelInfo, sources: Sequence[AdapterSource], template: str | None
) -> ModelInfo:
    """Returns the outline with the chat template of --chat-template or of the adapters.

    Raises:
      UserError: it cannot be read, or the adapters were trained with different ones.
    """
    if template is not None or not sources:
        return outline.with_template(template)
    outlines = [outline.with_template(source.chat_template, source.option) for source in sources]
    first = outlines[0]
    for source, other in zip(sources[1:], outlines[1:], strict=True):
        if other.tokenizer.chat_template != first.tokenizer.chat_template:
            raise UserError(
                f"{sources[0].option} and {source.option} were trained with different chat "
                "templates. Run a command per adapter, or name a template with "
                "--chat-template."
            )
    return first


class LoadedAdapters:
    """A base in memory, and several adapters over its arrays.

    Attributes:
      model, outline: the model, and its outline with the tokenizer.
      options: the options.
      names: the names of the adapters; the first one answers first.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Tree,
        adapters: Sequence[NamedAdapter],
        outline: ModelInfo,
        options: GenerateOptions,
        grammar: CompiledGrammar | None = None,
    ):
        """Reads the adapters, and prints how they run; see `GenerateOptions.merge`.

        Args:
          model, params: the base.
          adapters: the adapters that answer.
          outline: the model's.
          options: the options.
          grammar: form of the answers; None for any.

        Raises:
          UserError: an adapter is damaged or of another base, or cannot be merged as asked.
        """
        self.model = model
        self.outline = outline
        self.options = options
        self._grammar = grammar
        self.names = [adapter.name for adapter in adapters]
        self._merge = options.merge
        self._forward = lj.adapt(model.apply)  # one for all: each new function compiles
        self._merged: tuple[str, Tree] = (BASE, None)  # the adapter whose merged tree is kept
        mismatch = options.allow_base_mismatch
        self._trees: dict[str, Tree] = {}
        for name, source in adapters:
            if source is not None:
                tree = source.load(model, params, outline.name, allow_base_mismatch=mismatch)
                self._trees[name] = self._with_shared_structure(tree)
        names = list(self._trees)
        if options.merge:
            for name in names:
                with as_user_errors(
                    UserError, prefix=f"--merge: {name} cannot be merged, because "
                ):
                    jax.eval_shape(merge_adapter, self._trees[name])  # merges nothing yet
        relation = "merged into" if options.merge else "beside"
        has_one_adapter = len(names) == len(self.names) == 1
        if has_one_adapter and not options.interactive and not options.no_merge:
            relation = self._merge_only_adapter(names[0])
        if names:
            say(f"{' and '.join(names)}: {relation} the base")
        if options.interactive and BASE not in self.names:
            self.names.append(BASE)
        if BASE in self.names:
            self._trees[BASE] = params

    def generator(self, name: str) -> AnswerGenerator:
        """Returns the generator of answers with an adapter."""
        params, apply = self.use(name)
        return AnswerGenerator(
            model=self.model,
            params=params,
            apply=apply,
            outline=self.outline,
            options=self.options,
            grammar=self._grammar,
        )

    def use(self, name: str) -> tuple[Tree, Forward | None]:
        """Returns the parameters of an adapter, and the function that replaces `model.apply`."""
        if name == BASE:
            return self._trees[BASE], self._forward if self.outline.has_codes else None
        if not self._merge:
            return self._trees[name], self._forward
        if self._merged[0] != name:
            self._merged = (BASE, None)  # lets go of one before another is made
            self._merged = (name, merge_adapter(self._trees[name]))
        return self._merged[1], None

    def _merge_only_adapter(self, name: str) -> str:
        """Merges the only adapter if possible, and returns the words for how it runs."""
        try:
            self._merged = (name, merge_adapter(self._trees[name]))
        except UserError as error:
            return f"not merged ({error}), beside"
        self._merge = True
        del self._trees[name]
        return "merged into"

    def _with_shared_structure(self, tree: Tree) -> Tree:
        """Returns a tree with an earlier tree's structure, to share compiled functions.

        The two then share what is compiled: their dropout, which does nothing here, may differ.
        """
        for earlier_tree in self._trees.values():
            with contextlib.suppress(ValueError):
                return lj.swap(earlier_tree, tree)
        return tree
