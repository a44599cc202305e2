"""The options of `train.export`, and which of them make no sense together.

`ExportJob` is what they ask for: an adapter, its base and a repository.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_jax.peft.config import FILE as PEFT_CONFIG
from lora_jax.peft.serving import MAX_RANK
from train.adapters.source import AdapterSource
from train.adapters.template import read_template
from train.console.errors import UserError
from train.console.help import HelpPage
from train.console.output import tell
from train.export.hub import Repository
from train.options.command import parse_options
from train.options.paths import Place, Words
from train.options.tokenizer import TokenizerOption
from train.reporters.files import read_json

MODEL_CONFIG = "config.json"
# Options that say nothing of a GGUF file, and what to do instead.
_NOT_WITH_GGUF = {
    "output": "it is the file to write, and there is no folder: run the command twice for both",
    "push_to_hub": "upload the file with `hf upload NAME FILE`",
    "dtype": "--gguf-type is the type of its matrices",
    "max_shard_size": "it is one file, which llama.cpp's llama-gguf-split cuts into parts",
    "base_name": "a GGUF adapter names no base",
    "for_serving": "that is vLLM's layout",
    "check_serving": "what llama.cpp cannot run is refused anyway",
}
_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(TokenizerOption):
    """Write an adapter in PEFT's format, as GGUF or merged; check whether it can be served."""

    HELP = HelpPage(
        "adapter output model merged dtype gguf for_serving check_serving push_to_hub overwrite",
        "--adapter runs/mine --output served --for-serving",
    )

    adapter: Place
    """The adapter: the folder of a run, of this library or of PEFT, or the hub name of a PEFT
    adapter."""
    output: Place | None = None
    """The folder to write. Only --check-serving and --push-to-hub work without it."""
    model: Place | None = None
    """The base: a hub name, a folder or a GGUF file. By default the base that the adapter names."""
    base_name: str | None = None
    """The base's name on the hub, for adapter_config.json. By default the base's own name, unless
    it is a local folder."""
    merged: bool = False
    """Write a whole model with the adapter merged into it, instead of the adapter."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of a merged model; by default that of the base's files. Weights are merged in
    float32 and rounded once."""
    quantize: Literal["none"] | None = None
    """With --merged, none writes arrays in the place of all codes of the base's files. By default
    the kernels that the adapter leaves alone stay in them, where readers allow it."""
    gguf: str | None = None
    """The GGUF file to write in the place of a folder: the adapter, for llama.cpp, or, with
    --merged, the whole model with its tokenizer, for Ollama and LM Studio, too. A Modelfile for
    Ollama is written beside it."""
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """The type of the matrices in the GGUF file. By default f32 for an adapter, which has no codes,
    and for a model the dtype of the base's files, or f16. For K-quants such as Q4_K_M, run
    llama.cpp's llama-quantize on an f16 file."""
    max_shard_size: str = "5GB"
    """The maximum size of one file of a merged model, in MB or GB."""
    for_serving: bool = False
    """Write the adapter in the layout that vLLM reads: one rank, scales in B, every projection of
    experts."""
    check_serving: bool = False
    """List the parts of the adapter that a serving engine (vLLM) would refuse or misread. If there
    are any, exit with code 1 and write nothing; leave this option out to write anyway."""
    max_rank: int = MAX_RANK
    """With --check-serving, the highest rank that the engine accepts (vLLM's --max-lora-rank)."""
    num_labels: int | None = None
    """The number of classes of the adapter's head, if the base has no head. By default the number
    of the adapter's run, or of PEFT's saved head."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    overwrite: bool = False
    """Replace an earlier export in the output folder and on the hub."""
    push_to_hub: str | None = None
    """Upload the export to the Hugging Face hub under this name, such as owner/name."""
    private: bool = False
    """Make the repository on the hub private."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def parse(args: Sequence[str] | None) -> ExportOptions:
    """Returns the options of a command line; raises a UserError for a path with a scheme."""
    return parse_options(ExportOptions, args, "train.export")


def check(options: ExportOptions) -> int:
    """Checks the options.

    Returns:
      The maximum size of a shard, in bytes.

    Raises:
      UserError: an option makes no sense, or the output folder is taken.
    """
    check_gguf_options(options)
    is_written = any((options.output, options.push_to_hub, options.gguf))
    if options.merged and not is_written:
        raise UserError("--merged writes a model: name its folder with --output, or a --gguf file")
    if not is_written and not options.check_serving:
        raise UserError("nothing to do: give --output, --gguf, --push-to-hub or --check-serving")
    if options.private and options.push_to_hub is None:
        raise UserError("--private is about a repository on the hub: name it with --push-to-hub")
    for name in ("check_serving", "for_serving"):
        if options.merged and getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is about adapters, and --merged writes none: a merged "
                "model is served like any other model"
            )
    if options.for_serving and options.output is None and options.push_to_hub is None:
        raise UserError("--for-serving writes an adapter: name its folder with --output")
    if options.base_name and options.merged:
        raise UserError(
            "--base-name is for adapter_config.json, and a merged model (--merged) has none"
        )
    if options.dtype and not options.merged:
        raise UserError(
            "--dtype needs --merged: it is the dtype of a merged model, adapters keep theirs"
        )
    if options.tokenizer and not options.merged:
        raise UserError("--tokenizer needs --merged: it goes into a merged model's folder")
    if options.quantize and not options.merged:
        raise UserError("--quantize needs --merged: it is about the kernels of a merged model")
    if options.max_rank < 1:
        raise UserError(f"--max-rank {options.max_rank}: at least 1 is needed")
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", options.max_shard_size.upper())
    shard = round(float(size[1]) * _UNITS[size[2]]) if size else 0
    if shard < 1:
        raise UserError(
            f"--max-shard-size {options.max_shard_size}: a size such as 500MB or 5GB is needed"
        )
    if options.output is not None:
        check_output(options, Path(options.output).expanduser())
    return shard


def check_gguf_options(options: ExportOptions) -> None:
    """Raises a UserError for options that do not go with a GGUF file, or a file that is taken."""
    if options.gguf is None:
        if options.gguf_type is not None:
            raise UserError("--gguf-type is about a GGUF file: name it with --gguf")
        return
    defaults = ExportOptions(adapter="")
    for name, remedy in _NOT_WITH_GGUF.items():
        if getattr(options, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --gguf: {remedy}")
    if options.gguf_type in ("q8_0", "q4_0") and not options.merged:
        raise UserError(
            f"--gguf-type {options.gguf_type} needs --merged: an adapter's matrices have the "
            "rank's few columns, which fill no block of 32; f32, f16 and bf16 are for adapters"
        )
    file = Path(options.gguf).expanduser()
    if file.suffix != ".gguf":
        raise UserError(
            f"--gguf {options.gguf}: end the file's name in .gguf, by which it is known"
        )
    for path, begin in ((file, b"GGUF"), (modelfile_of(file), b"FROM ")):
        if not path.exists():
            continue
        if not options.overwrite:
            raise UserError(f"{path} exists: name another --gguf file, or replace it (--overwrite)")
        if not path.is_file() or begin not in _beginning(path):
            raise UserError(
                f"{path} is something other than an earlier export, and --overwrite would delete "
                "it: name another --gguf file"
            )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def modelfile_of(file: Path) -> Path:
    """Returns the path of Ollama's Modelfile that goes with a GGUF file."""
    return file.with_suffix(".Modelfile")


def check_output(options: ExportOptions, output: Path) -> None:
    """Raises a UserError if the output folder holds something that must not be replaced."""
    if not output.exists():
        return
    if not options.overwrite:
        raise UserError(
            f"--output {output} exists: name another folder, or replace it with --overwrite"
        )
    file, known, what = PEFT_CONFIG, "peft_type", "PEFT adapter"
    if options.merged:
        file, known, what = MODEL_CONFIG, "model_type", "model"
    if output.is_dir() and (not any(output.iterdir()) or known in read_json(output / file)):
        return
    raise UserError(
        f"--output {output} holds something other than a {what}, and --overwrite would "
        "delete it: name another folder"
    )


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """The subject of an export: options, adapter, base, and the hub's repository."""

    options: ExportOptions
    console: Console
    adapter: AdapterSource
    base: str
    hub: Repository | None

    @property
    def output(self) -> Path:
        """The folder to write."""
        assert self.options.output is not None
        return Path(self.options.output).expanduser()

    @property
    def template(self) -> str | None:
        """The chat template that the adapter was trained with; None for the base's own."""
        file = self.adapter.chat_template
        return None if file is None else read_template(str(file), self.adapter.given)

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        tell(self.console, text)
