"""Loads transformers' fast tokenizers, from a folder's files or a GGUF file's metadata."""

import importlib
import logging
from pathlib import Path
from types import ModuleType

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.folder import describe_lfs_pointer
from lora_jax.hf.gguf import open_gguf
from lora_jax.hf.gguf.tokenizer import CoreTokenizer, build_tokenizer
from lora_jax.hf.hub import check_hub_name, find_model, find_snapshot
from lora_jax.hf.packaged import BUNDLES

# The files of a tokenizer in a model's folder.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "vocab.*",
    "*.model",
)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Loads the tokenizer for ``from_pretrained(name_or_path)``.

    Args:
      name_or_path: folder, GGUF file or hub name.

    Returns:
      A transformers fast tokenizer, with the model's chat template if it has one.

    Raises:
      ModelNotFound: if there is no such path, or the hub does not answer; says what to do.
      ConfigError: for a GGUF file whose tokenizer is of an unknown kind; for a folder whose
        tokenizer is damaged, or needs code of its own.

    >>> from lora_jax import models
    >>> tokenizer = models.load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    path = _tokenizer_folder(name_or_path) or find_model(name_or_path).path
    if path.is_dir():
        return _load_from_folder(path)
    try:
        return tokenizer_from_gguf(open_gguf(path).metadata)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_tokenizer(name_or_path: str | Path) -> Path:
    """Finds a tokenizer's files; downloads only these from the hub.

    Args:
      name_or_path: folder, GGUF file or hub name.

    Raises:
      ModelNotFound: if there is no such path, or the hub does not answer; says what to do.
    """
    name = str(name_or_path)
    if Path(name).expanduser().exists() or name in BUNDLES:
        return _tokenizer_folder(name) or find_model(name).path
    return find_snapshot(
        check_hub_name(name), [*TOKENIZER_FILES, "config.json"], needed="tokenizer*.json"
    )


def _tokenizer_folder(name_or_path: str | Path) -> Path | None:
    """Returns a folder with a tokenizer, such as that of a GGUF file; None otherwise."""
    folder = Path(name_or_path).expanduser()
    return folder if (folder / "tokenizer.json").is_file() else None


def _load_from_folder(path: Path) -> Tokenizer:
    """Returns the tokenizer of a folder; raises a ConfigError if it is damaged."""
    auto_tokenizer = import_transformers().AutoTokenizer
    try:
        return auto_tokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of a damaged folder, anything
        file = path / "tokenizer.json"
        pointer = describe_lfs_pointer(file) if file.is_file() else None
        if pointer is not None:
            raise ConfigError(pointer) from None
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ConfigError(
                f"{path}: the tokenizer needs the model's own Python code (`auto_map`), and "
                "lora_jax does not run code from model folders. If tokenizer.json describes the "
                'whole tokenizer, set "tokenizer_class" to "PreTrainedTokenizerFast" in '
                "tokenizer_config.json and remove `auto_map`. Otherwise use another model."
            ) from None
        raise ConfigError(
            f"{path}: the tokenizer cannot be read from tokenizer.json and tokenizer_config.json: "
            f"{reason}. Download these files again."
        ) from error


def tokenizer_from_gguf(metadata: Fields) -> Tokenizer:
    """Builds a tokenizer from ``tokenizer.*`` metadata; see ``load_tokenizer``."""
    import_transformers()  # says what is missing
    core, special_tokens = build_tokenizer(metadata)
    tokenizer = make_fast_tokenizer(core, **special_tokens)
    prefix = "tokenizer.chat_template"
    default_template = metadata.get(prefix)
    names = metadata.get(f"{prefix}s", ())
    templates = {name: metadata[f"{prefix}.{name}"] for name in names}
    if templates and default_template:
        tokenizer.chat_template = {"default": default_template, **templates}
    else:
        tokenizer.chat_template = default_template
    return tokenizer


def make_fast_tokenizer(core: CoreTokenizer, **special: str) -> Tokenizer:
    """Wraps a tokenizer of the package `tokenizers` as a transformers tokenizer.

    Args:
      core: a ``tokenizers.Tokenizer``.
      **special: the special tokens, by role, such as ``eos_token="<end>"``.
    """
    return import_transformers().PreTrainedTokenizerFast(tokenizer_object=core, **special)


def import_transformers(module: str = "transformers", needed_by: str = "a tokenizer") -> ModuleType:
    """Imports a module of transformers without the advice to install torch.

    Args:
      module: the module's whole name.
      needed_by: what needs transformers, for the message.

    Raises:
      ImportError: transformers or one of its dependencies is missing. The message says what to
        install.
    """
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_no_advice_on_torch)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"{needed_by} needs the packages transformers and tokenizers. Run "
            "pip install 'lora_jax[models]'."
        ) from None
    finally:
        logger.removeFilter(_is_no_advice_on_torch)


def _is_no_advice_on_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")
