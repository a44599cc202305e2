"""Exports for llama.cpp, Ollama and LM Studio: a GGUF file, and a Modelfile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.core.types import Model, Tokenizer, Tree
from lora_jax.hf.generation import end_token_ids
from lora_jax.hf.gguf.vocabulary import model_name_for_llama_cpp, tokenizer_metadata
from lora_jax.hf.hub import find_model
from lora_jax.models import load_tokenizer, save_gguf
from lora_jax.models.decoder.gguf_form import check_form
from lora_jax.quantized import dequantize
from train.adapters.source import AdapterSource
from train.console.errors import as_user_errors
from train.export.base import dtype_of_files
from train.export.modelfile import write_modelfile
from train.export.options import ExportJob, ExportOptions, modelfile_of
from train.export.terms import codes_notice
from train.run.costs import byte_size
from train.run.pretrained import read_tokenizer

_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def check_gguf(options: ExportOptions, adapter: AdapterSource, base: str, config: Any) -> None:
    """Checks that llama.cpp has a form for a model and its tokenizer; reads no weights.

    Raises:
      UserError: it has none.
    """
    with as_user_errors(ValueError, OSError, prefix="--gguf: "):
        check_form(config)
        if options.merged:
            tokenizer = _tokenizer_to_write(options, adapter, base, config)
            if tokenizer is not None:
                words = tokenizer_metadata(tokenizer, config.vocab_size, end_token_ids(config))
                model_name_for_llama_cpp(config.model_type, tokenizer, words)


def write_gguf_adapter(work: ExportJob, model: Model, params: Tree) -> None:
    """Writes the adapter alone, as llama.cpp's --lora takes it."""
    file, options = _file(work), work.options
    base = find_model(work.base).path
    with as_user_errors(ValueError, OSError, ImportError, prefix="--gguf: "):
        kind = options.gguf_type or "f32"
        notes = lp.save_gguf(file, model, params, gguf_type=kind, overwrite=options.overwrite)
        parts = {"FROM": base, "ADAPTER": Path(file.name)}
        notes += write_modelfile(modelfile_of(file), parts, _tokenizer_of(base), work.template)
    _report(work, file, f"{options.adapter} as a GGUF adapter of {work.base}", notes)
    work.say(f"with Ollama before 0.34.1: {_create(file)}; later ones take whole models (--merged)")
    is_gguf = base.suffix == ".gguf"
    work.say(f"run it with: llama-server -m {base if is_gguf else 'BASE.gguf'} --lora {file}")
    if not is_gguf:
        work.say(
            f"BASE.gguf is {work.base} as a GGUF file: a published one, or by llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    for remark in _remarks(work, model):
        work.say(remark)


def write_gguf_model(work: ExportJob, model: Model, params: Tree) -> None:
    """Writes the whole model, with the adapter merged into it."""
    file, options = _file(work), work.options
    path = find_model(work.base).path
    own = path if path.suffix == ".gguf" else None
    with as_user_errors(ValueError, OSError, ImportError, prefix="--merged --gguf: "):
        tokenizer = _tokenizer_to_write(options, work.adapter, work.base, model.config)
        kind = options.gguf_type or ("f16" if own else _TYPES[dtype_of_files(work.base)])
        with _progress(work, f"writing {file}") as progress:
            notes = save_gguf(
                file,
                model,
                dequantize(lj.merge(params)),
                gguf_type=kind,
                tokenizer=tokenizer,
                chat_template=work.template,
                codes_from=None if options.quantize else own,
                overwrite=options.overwrite,
                progress=progress,
            )
        parts, tokenizer = {"FROM": Path(file.name)}, tokenizer or _tokenizer_of(path)
        notes += write_modelfile(modelfile_of(file), parts, tokenizer, work.template)
    _report(work, file, f"{options.adapter} merged into {work.base}, in {kind}", notes)
    work.say(f"with Ollama: {_create(file)}")
    work.say(f"run it with: llama-server -m {file}")


def _remarks(work: ExportJob, model: Model) -> Iterator[str]:
    """Yields remarks on settings of the adapter's run that its file alone lacks."""
    adapter, merge = work.adapter, "write the whole model with --merged"
    if work.template is not None:
        yield (
            "it was trained with a chat template of its own, which an adapter's file lacks: add "
            f"--chat-template-file {adapter.chat_template}"
        )
    if adapter.tokenizer is not None:
        yield f"it was trained with the tokenizer {adapter.tokenizer}, not its base's: {merge}"
    if adapter.rope_scaling is not None:
        kind = model.config.rope_scaling.kind
        yield f"it was trained with RoPE scaled by {kind}, which an adapter's file lacks: {merge}"
    if adapter.codes:
        yield codes_notice(adapter.codes, work.base)


def _file(work: ExportJob) -> Path:
    assert work.options.gguf is not None
    return Path(work.options.gguf).expanduser()


@contextmanager
def _progress(work: ExportJob, title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on a terminal; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    is_hidden = not work.console.is_terminal
    with Progress(*columns, console=work.console, transient=True, disable=is_hidden) as bar:
        task = bar.add_task(title, total=None)

        def update(n_done: int, total: int) -> None:
            bar.update(task, completed=n_done, total=total)

        yield update


def _tokenizer_to_write(
    options: ExportOptions, adapter: AdapterSource, base: str, config: Any
) -> Tokenizer | None:
    """Returns the tokenizer of a whole model's file; None for the one in the base's GGUF file."""
    name = options.tokenizer or adapter.tokenizer
    if name:
        return read_tokenizer(base, name, config)
    is_gguf = find_model(base).path.suffix == ".gguf"
    has_own_tokenizer = is_gguf and not options.quantize
    return None if has_own_tokenizer else load_tokenizer(base)


def _tokenizer_of(path: Path) -> Tokenizer | None:
    """Returns the tokenizer in a base's folder or file; None if it has none that can be read."""
    try:
        return load_tokenizer(path)
    except (ValueError, OSError):
        return None


def _report(work: ExportJob, file: Path, title: str, notes: Sequence[str]) -> None:
    """Prints a file with its size, and notes on it."""
    work.say(f"{title}: {file} ({byte_size(file.stat().st_size)})")
    for note in notes:
        work.say(note)


def _create(file: Path) -> str:
    return f"ollama create {file.stem} -f {modelfile_of(file)}"
