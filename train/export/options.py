"""The options of `train.export`, and which of them make no sense together."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_jax.peft.config import FILE as PEFT_CONFIG
from lora_jax.peft.serving import MAX_RANK
from train.console.errors import UserError
from train.console.help import HelpPage
from train.options.command import parse_options
from train.options.paths import Words
from train.options.tokenizer import TokenizerOption
from train.reporters.files import read_json

MODEL_CONFIG = "config.json"
_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(TokenizerOption):
    """Write an adapter in PEFT's format or merged into its base; check whether it can be served."""

    HELP = HelpPage(
        "adapter output model merged dtype for_serving check_serving push_to_hub private overwrite",
        "--adapter runs/mine --output served --for-serving",
    )

    adapter: str
    """The adapter: the folder of a run, of this library or of PEFT, or the hub name of a PEFT
    adapter."""
    output: str | None = None
    """The folder to write. Only --check-serving and --push-to-hub work without it."""
    model: str | None = None
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
    if options.merged and options.output is None and options.push_to_hub is None:
        raise UserError("--merged writes a model: name its folder with --output")
    if options.output is None and not options.check_serving and options.push_to_hub is None:
        raise UserError("nothing to do: give --output, --push-to-hub or --check-serving")
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
