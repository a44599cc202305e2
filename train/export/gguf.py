"""Writes a GGUF file for llama.cpp and LM Studio, and a Modelfile for Ollama."""

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
from train.export.base import find_file_dtype
from train.export.modelfile import write_modelfile
from train.export.options import ExportJob, ExportOptions, modelfile_path
from train.export.terms import codes_notice
from train.run.costs import byte_size
from train.run.pretrained import read_tokenizer

_GGUF_TYPE_OF_DTYPE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def check_gguf(options: ExportOptions, adapter: AdapterSource, base: str, config: Any) -> None:
    """Checks that llama.cpp can run a model and its tokenizer; reads no weights.

    Raises:
      UserError: llama.cpp cannot run them.
    """
    with as_user_errors(ValueError, OSError, prefix="--gguf: "):
        check_form(config)
        if options.merged:
            tokenizer = _tokenizer_to_write(options, adapter, base, config)
            if tokenizer is not None:
                # Both calls raise an error for a tokenizer that llama.cpp does not have.
                metadata = tokenizer_metadata(tokenizer, config.vocab_size, end_token_ids(config))
                model_name_for_llama_cpp(config.model_type, tokenizer, metadata)


def write_gguf_adapter(work: ExportJob, model: Model, params: Tree) -> None:
    """Writes the adapter alone, as llama.cpp's --lora takes it."""
    file = _gguf_path(work)
    options = work.options
    base = find_model(work.base).path
    with as_user_errors(ValueError, OSError, ImportError, prefix="--gguf: "):
        kind = options.gguf_type or "f32"
        notes = lp.save_gguf(file, model, params, gguf_type=kind, overwrite=options.overwrite)
        instructions = {"FROM": base, "ADAPTER": Path(file.name)}
        notes += write_modelfile(
            modelfile_path(file), instructions, _load_tokenizer_if_any(base), work.template
        )
    _print_file(work, file, f"{options.adapter} as a GGUF adapter of {work.base}", notes)
    work.say(
        f"Run it with Ollama before 0.34.1: {_ollama_command(file)}. Later versions take whole "
        "models only (--merged)."
    )
    is_gguf = base.suffix == ".gguf"
    base_file = base if is_gguf else "BASE.gguf"
    work.say(f"Run it with llama.cpp: llama-server -m {base_file} --lora {file}")
    if not is_gguf:
        work.say(
            f"Replace BASE.gguf by a GGUF file of {work.base}: a published one, or one that "
            "llama.cpp's convert_hf_to_gguf.py makes."
        )
    for remark in _list_remarks(work, model):
        work.say(remark)


def write_gguf_model(work: ExportJob, model: Model, params: Tree) -> None:
    """Writes the whole model, with the adapter merged into it."""
    file = _gguf_path(work)
    options = work.options
    base = find_model(work.base).path
    base_gguf = base if base.suffix == ".gguf" else None
    with as_user_errors(ValueError, OSError, ImportError, prefix="--merged --gguf: "):
        tokenizer = _tokenizer_to_write(options, work.adapter, work.base, model.config)
        if options.gguf_type:
            gguf_type: str = options.gguf_type
        elif base_gguf is not None:
            gguf_type = "f16"
        else:
            gguf_type = _GGUF_TYPE_OF_DTYPE[find_file_dtype(work.base)]
        with _show_progress(work, f"writing {file}") as progress:
            notes = save_gguf(
                file,
                model,
                dequantize(lj.merge(params)),
                gguf_type=gguf_type,
                tokenizer=tokenizer,
                chat_template=work.template,
                codes_from=None if options.quantize else base_gguf,
                overwrite=options.overwrite,
                progress=progress,
            )
        chat_tokenizer = tokenizer or _load_tokenizer_if_any(base)
        instructions = {"FROM": Path(file.name)}
        notes += write_modelfile(modelfile_path(file), instructions, chat_tokenizer, work.template)
    _print_file(work, file, f"{options.adapter} merged into {work.base}, in {gguf_type}", notes)
    work.say(f"Run it with Ollama: {_ollama_command(file)}")
    work.say(f"Run it with llama.cpp: llama-server -m {file}")


def _list_remarks(work: ExportJob, model: Model) -> Iterator[str]:
    """Yields remarks on settings of the adapter's run that a GGUF adapter cannot hold."""
    adapter = work.adapter
    remedy = "Write the whole model with --merged."
    if work.template is not None:
        yield (
            "The adapter was trained with another chat template than its base's, which a GGUF "
            "adapter cannot hold. Start llama-server with "
            f"--chat-template-file {adapter.chat_template}."
        )
    if adapter.tokenizer is not None:
        yield (
            f"The adapter was trained with the tokenizer {adapter.tokenizer}, not with its base's. "
            f"A GGUF adapter cannot hold a tokenizer. {remedy}"
        )
    if adapter.rope_scaling is not None:
        kind = model.config.rope_scaling.kind
        yield (
            f"The adapter was trained with RoPE scaled by {kind}, which a GGUF adapter cannot "
            f"hold. {remedy}"
        )
    if adapter.base_codes:
        yield codes_notice(adapter.base_codes, work.base)


def _gguf_path(work: ExportJob) -> Path:
    assert work.options.gguf is not None
    return Path(work.options.gguf).expanduser()


@contextmanager
def _show_progress(work: ExportJob, title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields the function that updates a progress bar, which only a terminal shows."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    is_hidden = not work.console.is_terminal
    with Progress(*columns, console=work.console, transient=True, disable=is_hidden) as bar:
        task = bar.add_task(title, total=None)

        def update(written_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=written_bytes, total=total_bytes)

        yield update


def _tokenizer_to_write(
    options: ExportOptions, adapter: AdapterSource, base: str, config: Any
) -> Tokenizer | None:
    """Returns the tokenizer to write; None to copy the one in the base's GGUF file."""
    name = options.tokenizer or adapter.tokenizer
    if name:
        return read_tokenizer(base, name, config)
    is_gguf = find_model(base).path.suffix == ".gguf"
    is_copied = is_gguf and not options.quantize
    return None if is_copied else load_tokenizer(base)


def _load_tokenizer_if_any(path: Path) -> Tokenizer | None:
    """Returns the tokenizer in a base's folder or file; None if none can be read."""
    try:
        return load_tokenizer(path)
    except (ValueError, OSError):
        return None


def _print_file(work: ExportJob, file: Path, title: str, notes: Sequence[str]) -> None:
    """Prints a file with its size, and notes on it."""
    work.say(f"{title}: {file} ({byte_size(file.stat().st_size)})")
    for note in notes:
        work.say(note)


def _ollama_command(file: Path) -> str:
    return f"ollama create {file.stem} -f {modelfile_path(file)}"
