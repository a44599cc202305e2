"""Declares and checks the options of `train.export`.

`ExportJob` holds the subject of an export: the options, the adapter, its base and a repository.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_jax.peft.config import CONFIG_FILE as PEFT_CONFIG
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
# Options without an effect on a GGUF file, and what to do instead.
_REMEDY_OF_OPTION_WITHOUT_GGUF = {
    "output": "To write both the GGUF file and a folder, run the command twice.",
    "push_to_hub": "Upload the file with `hf upload NAME FILE`.",
    "dtype": "Use --gguf-type to set the type of the matrices.",
    "max_shard_size": "Split the file with llama.cpp's llama-gguf-split.",
    "base_name": "A GGUF adapter names no base. Remove --base-name.",
    "for_serving": "It selects vLLM's layout. Remove --for-serving.",
    "check_serving": "The export checks that llama.cpp can run the file. Remove --check-serving.",
}
# Options without an effect on a file of diffusers, and what to do instead.
_REMEDY_OF_OPTION_WITH_DIFFUSERS = {
    "merged": "To write a merged module, run the command with --merged --output FOLDER.",
    "output": "To write both a file and a folder, run the command twice.",
    "gguf": "Remove one of them.",
    "push_to_hub": "Upload the file with `hf upload NAME FILE`.",
    "dtype": "Adapters keep their dtype. Remove --dtype.",
    "quantize": "Remove --quantize.",
    "tokenizer": "Remove --tokenizer.",
    "max_shard_size": "Remove --max-shard-size.",
    "base_name": "A file of diffusers names no base. Remove --base-name.",
    "for_serving": "It selects vLLM's layout. Remove --for-serving.",
    "check_serving": "It checks an adapter for vLLM. Remove --check-serving.",
}
_BYTES_OF_UNIT = {"MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(TokenizerOption):
    """Write an adapter in PEFT's format, as GGUF or merged; check whether it can be served."""

    HELP = HelpPage(
        "adapter output model merged dtype gguf for_serving check_serving push_to_hub overwrite",
        "--adapter runs/mine --output served --for-serving",
    )

    adapter: Place
    """The adapter to export. The value is the folder of a run, the folder of an adapter of this
    library or of PEFT, or the hub name of a PEFT adapter."""
    output: Place | None = None
    """The folder to write. You can omit it with --gguf, --check-serving or --push-to-hub."""
    model: Place | None = None
    """The base model: a hub name, a folder or a GGUF file. The default is the base that the adapter
    names."""
    base_name: str | None = None
    """The base's name on the hub, which is written to adapter_config.json. The default is the name
    of the base, unless the base is a local folder."""
    merged: bool = False
    """Merge the adapter into its base, and write the whole model instead of the adapter."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the merged model. The default is the dtype of the base's files. Weights are
    merged in float32 and rounded once."""
    quantize: Literal["none"] | None = None
    """With --merged, none dequantizes all kernels of a quantized base. By default, kernels that the
    adapter does not change stay quantized where the file format allows it."""
    gguf: str | None = None
    """The GGUF file to write instead of a folder. It holds the adapter, for llama.cpp. With
    --merged it holds the whole model with its tokenizer, for llama.cpp, Ollama and LM Studio. A
    Modelfile for Ollama is written beside the file."""
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """The type of the matrices in the GGUF file. The default is f32 for an adapter. For a merged
    model it is the dtype of the base's files, or f16 if the base is a GGUF file. For K-quants such
    as Q4_K_M, run llama.cpp's llama-quantize on an f16 file."""
    diffusers: str | None = None
    """The safetensors file to write instead of a folder, for load_lora_weights of diffusers and for
    ComfyUI. The base is an image model."""
    subfolder: str | None = None
    """The part of a pipeline of diffusers that is adapted, such as transformer. The default is the
    one that the adapter names."""
    max_shard_size: str = "5GB"
    """The maximum size of one weights file of a merged model, such as 500MB or 5GB."""
    for_serving: bool = False
    """Write the adapter in the layout that vLLM reads: all modules have one rank, B contains the
    scale, and every projection of experts is present."""
    check_serving: bool = False
    """List the parts of the adapter that a serving engine (vLLM) would refuse or misread. If there
    are any, the command exits with code 1 and writes nothing. To write the adapter anyway, remove
    this option."""
    max_rank: int = MAX_RANK
    """The highest rank that the engine accepts, for --check-serving (vLLM's --max-lora-rank)."""
    num_labels: int | None = None
    """The number of classes of the adapter's head, if the base has no head. The default is the
    number of the adapter's run, or of PEFT's saved head."""
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


def parse_export_options(args: Sequence[str] | None) -> ExportOptions:
    """Parses a command line; raises a UserError for a path with an unknown scheme."""
    return parse_options(ExportOptions, args, "train.export")


def check_options(options: ExportOptions) -> int:
    """Checks the options.

    Returns:
      The maximum size of a shard, in bytes.

    Raises:
      UserError: options contradict each other, or the output folder must not be replaced.
    """
    check_gguf_options(options)
    _check_diffusers_options(options)
    is_written = any((options.output, options.push_to_hub, options.gguf, options.diffusers))
    if options.merged and not is_written:
        raise UserError(
            "--merged writes a model, but no place for it is given. Name a folder with --output, "
            "or a file with --gguf."
        )
    if not is_written and not options.check_serving:
        raise UserError(
            "There is nothing to do. Add --output, --gguf, --diffusers, --push-to-hub or "
            "--check-serving."
        )
    if options.private and options.push_to_hub is None:
        raise UserError(
            "--private needs a repository on the hub. Name it with --push-to-hub, or remove "
            "--private."
        )
    for name in ("check_serving", "for_serving"):
        if options.merged and getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is for adapters, but --merged writes a whole model, which is served like "
                f"any other model. Remove {flag}."
            )
    if options.for_serving and options.output is None and options.push_to_hub is None:
        raise UserError(
            "--for-serving writes an adapter, but no folder for it is given. Name it with --output."
        )
    if options.base_name and options.merged:
        raise UserError(
            "--base-name is written to adapter_config.json, which a merged model (--merged) does "
            "not have. Remove --base-name."
        )
    if options.dtype and not options.merged:
        raise UserError(
            "--dtype needs --merged, because adapters keep their dtype. Remove --dtype, or add "
            "--merged."
        )
    if options.tokenizer and not options.merged:
        raise UserError(
            "--tokenizer needs --merged, because only a merged model's folder holds a tokenizer. "
            "Remove --tokenizer, or add --merged."
        )
    if options.quantize and not options.merged:
        raise UserError(
            "--quantize needs --merged, because it sets the kernels of a merged model. Remove "
            "--quantize, or add --merged."
        )
    if options.max_rank < 1:
        raise UserError(f"--max-rank is {options.max_rank}. Use a rank of at least 1.")
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", options.max_shard_size.upper())
    shard_bytes = round(float(match[1]) * _BYTES_OF_UNIT[match[2]]) if match else 0
    if shard_bytes < 1:
        raise UserError(
            f"--max-shard-size {options.max_shard_size} is not a size. Use a size such as 500MB or "
            "5GB."
        )
    if options.output is not None:
        check_output(options, Path(options.output).expanduser())
    return shard_bytes


def check_gguf_options(options: ExportOptions) -> None:
    """Raises a UserError for options that do not go with a GGUF file, or a file that is taken."""
    if options.gguf is None:
        if options.gguf_type is not None:
            raise UserError(
                "--gguf-type needs a GGUF file. Name the file with --gguf, or remove --gguf-type."
            )
        return
    defaults = ExportOptions(adapter="")
    for name, remedy in _REMEDY_OF_OPTION_WITHOUT_GGUF.items():
        if getattr(options, name) != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} cannot be used with --gguf. {remedy}")
    if options.gguf_type in ("q8_0", "q4_0") and not options.merged:
        raise UserError(
            f"--gguf-type {options.gguf_type} needs --merged, because the rows of an adapter's "
            "matrices are shorter than a block of 32. Use f32, f16 or bf16 for an adapter."
        )
    file = Path(options.gguf).expanduser()
    if file.suffix != ".gguf":
        raise UserError(
            f"--gguf {options.gguf}: Programs recognize GGUF files by their names. Choose a name "
            "that ends in .gguf."
        )
    # Both files that the export writes: the GGUF file, and the Modelfile for Ollama.
    for path, marker in ((file, b"GGUF"), (modelfile_path(file), b"FROM ")):
        if not path.exists():
            continue
        if not options.overwrite:
            raise UserError(
                f"{path} already exists. Name another --gguf file, or replace it with --overwrite."
            )
        if not path.is_file() or marker not in _read_beginning(path):
            raise UserError(
                f"{path} is something other than an earlier export, and --overwrite would delete "
                "it. Name another --gguf file."
            )


def _check_diffusers_options(options: ExportOptions) -> None:
    """Raises a UserError for options that do not go with --diffusers, or a file that is taken."""
    if options.diffusers is None:
        return
    defaults = ExportOptions(adapter="")
    for name, remedy in _REMEDY_OF_OPTION_WITH_DIFFUSERS.items():
        if getattr(options, name) != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} cannot be used with --diffusers. {remedy}")
    file = Path(options.diffusers).expanduser()
    if file.suffix != ".safetensors":
        raise UserError(
            f"--diffusers {options.diffusers}: diffusers reads adapters from safetensors files. "
            "Choose a name that ends in .safetensors."
        )
    if file.exists() and not (options.overwrite and file.is_file()):
        raise UserError(
            f"--diffusers {file} already exists. Name another file, or replace it with --overwrite."
        )


def _read_beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def modelfile_path(file: Path) -> Path:
    """Returns the path of Ollama's Modelfile that goes with a GGUF file."""
    return file.with_suffix(".Modelfile")


def check_output(options: ExportOptions, output: Path) -> None:
    """Raises a UserError if the output folder holds something that must not be replaced."""
    if not output.exists():
        return
    if not options.overwrite:
        raise UserError(
            f"--output {output} already exists. Name another folder, or replace it with "
            "--overwrite."
        )
    config_file = PEFT_CONFIG
    required_field = "peft_type"
    content = "PEFT adapter"
    if options.merged:
        config_file = MODEL_CONFIG
        required_field = "model_type"
        content = "model"
    # An empty folder, or one that holds an earlier export, may be replaced.
    if output.is_dir():
        is_empty = not any(output.iterdir())
        if is_empty or required_field in read_json(output / config_file):
            return
    raise UserError(
        f"--output {output} holds something other than a {content}, and --overwrite would "
        "delete it. Name another folder."
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
        return None if file is None else read_template(str(file), self.adapter.option)

    def say(self, text: str) -> None:
        """Prints a line without wrapping or markup."""
        tell(self.console, text)
