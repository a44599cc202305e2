"""Ship a trained adapter: `python -m train.export --adapter runs/sql/adapter --output out`.

Writes a PEFT adapter for transformers and serving engines or, with --merged, a whole model. Takes
adapters of this library and adapters that PEFT wrote.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.hf.hub import name_for_others, resolve
from lora_jax.hf.save import tokenizer_files
from lora_jax.models import EncoderConfig, save_pretrained
from lora_jax.models.pretrained import open_source
from lora_jax.peft.config import FILE as PEFT_CONFIG
from lora_jax.peft.config import fields_of
from lora_jax.peft.save import contents
from lora_jax.peft.serving import MAX_RANK, problems_of, serving_problems
from train.run.cache import keep_compiled
from train.run.errors import UserError, as_user_errors, reported
from train.run.files import read_json
from train.run.output import ADAPTER, adapter_folder, folder_bytes
from train.run.pretrained import read_model
from train.run.report import megabytes

MODEL_CONFIG = "config.json"
PROBLEMS = 1  # the exit code when --check-serving finds some
_UNITS = {"MB": 10**6, "GB": 10**9}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write an adapter in PEFT's format or merged into its base; check whether it can be served."""

    adapter: str
    """The folder of an adapter, written by a run or by PEFT: runs/mine/adapter or, while a run with
    --keep-best is on its way, runs/mine/best."""
    output: str | None = None
    """The folder to write. Only --check-serving works without it."""
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
    max_shard_size: str = "5GB"
    """The maximum size of one file of a merged model, in MB or GB."""
    check_serving: bool = False
    """List the parts of the adapter that a serving engine (vLLM) would refuse or misread. If there
    are any, exit with code 1 and write nothing; leave this option out to write anyway."""
    max_rank: int = MAX_RANK
    """The highest rank that the engine accepts (vLLM's --max-lora-rank)."""
    num_labels: int | None = None
    """The number of classes of the adapter's head, if the base has no head. By default the number
    of the adapter's run."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    overwrite: bool = False
    """Replace an earlier export in the output folder."""
    compilation_cache: str | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(
        tyro.conf.FlagCreatePairsOff[Options], args=args, prog="python -m train.export"
    )
    with reported():
        run(options)


def run(options: Options) -> None:
    """Checks the options, loads the adapter, and writes it."""
    console = Console()
    adapter, from_peft = found_adapter(options.adapter)
    shard = check(options)

    # PEFT's folder is checked as it is, unless it is also to be written.
    if from_peft and options.output is None:
        with as_user_errors(ValueError):
            report_problems(serving_problems(adapter, max_rank=options.max_rank))
        return

    name = options.model or base_of(adapter, from_peft)
    check_apart(options.output, adapter, name)
    if said := keep_compiled(options.compilation_cache):
        console.print(said, highlight=False, soft_wrap=True)
    with console.status(f"loading {name} and {adapter}"):
        model, params = load(options, adapter, from_peft, name)
    if options.merged:
        write_merged(options, console, model, params, name, shard)
    else:
        write_adapter(options, console, model, params, name)


def write_merged(
    options: Options, console: Console, model: Any, params: Any, name: str, shard: int
) -> None:
    """Writes the whole model, with the adapter merged into it."""
    assert options.output is not None
    output = Path(options.output).expanduser()
    dtype = options.dtype or dtype_of_files(name)
    with (
        as_user_errors(ValueError, OSError, prefix="--merged: "),
        console.status(f"merging and writing {output}"),
    ):
        save_pretrained(
            output,
            model,
            lj.merge(params),
            tokenizer=tokenizer_of(name),
            max_shard_size=shard,
            dtype=jnp.dtype(dtype),
            overwrite=options.overwrite,
        )
    print_files(console, output, f"{options.adapter} merged into {name}, in {dtype}")
    hint(console, f'{auto_class(model)}.from_pretrained("{output}")')


def write_adapter(options: Options, console: Console, model: Any, params: Any, name: str) -> None:
    """Writes PEFT's files; with --check-serving, exits first if there are problems."""
    no_peft = "as a PEFT adapter (--merged writes a whole model instead): "
    with as_user_errors(ValueError, prefix=no_peft):
        fields, tensors = contents(model, params)
    if options.check_serving:
        report_problems(problems_of(fields, tensors, max_rank=options.max_rank))
    if options.output is None:
        return
    output = Path(options.output).expanduser()
    with as_user_errors(ValueError, OSError):
        lp.save(
            output,
            model,
            params,
            base_model=options.base_name or name_for_others(name),
            task_type=task_type(model, fields),
            overwrite=options.overwrite,
        )
    print_files(console, output, f"{options.adapter} as a PEFT adapter of {name}")
    if not options.base_name and name_for_others(name) is None:
        console.print(
            "adapter_config.json names no base, because the base is a local folder: give its name "
            "on the hub with --base-name",
            highlight=False,
            soft_wrap=True,
        )
    base = f'{auto_class(model)}.from_pretrained("{name}")'
    hint(console, f'PeftModel.from_pretrained({base}, "{output}")')


def found_adapter(name: str) -> tuple[Path, bool]:
    """Returns the adapter's folder, and whether PEFT wrote it."""
    folder = adapter_folder(name)
    if not folder.is_dir():
        raise UserError(f"--adapter {name}: there is no such folder")
    from_peft = (folder / PEFT_CONFIG).is_file()
    if not from_peft and not (folder / "lora").is_dir():
        of_run = folder / ADAPTER
        raise UserError(
            f"--adapter {name} is no adapter folder of this library or of PEFT ({PEFT_CONFIG})"
            + (f": did you mean {of_run}?" if of_run.is_dir() else "")
        )
    return folder, from_peft


def check(options: Options) -> int:
    """Checks the options.

    Returns:
      The maximum size of a shard, in bytes.

    Raises:
      UserError: an option makes no sense, or the output folder is taken.
    """
    if options.merged and options.output is None:
        raise UserError("--merged writes a model: name its folder with --output")
    if options.output is None and not options.check_serving:
        raise UserError("nothing to do: give --output, --check-serving, or both")
    if options.merged and options.check_serving:
        raise UserError(
            "--check-serving is about adapters, and --merged writes none: a merged "
            "model is served like any other model"
        )
    if options.base_name and options.merged:
        raise UserError(
            "--base-name is for adapter_config.json, and a merged model (--merged) has none"
        )
    if options.dtype and not options.merged:
        raise UserError(
            "--dtype needs --merged: it is the dtype of a merged model, adapters keep theirs"
        )
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


def check_output(options: Options, output: Path) -> None:
    """Raises a UserError if the output folder holds something that must not be replaced."""
    if not output.exists():
        return
    if not options.overwrite:
        raise UserError(
            f"--output {output} exists: name another folder, or replace it with --overwrite"
        )
    kind = MODEL_CONFIG if options.merged else PEFT_CONFIG
    known = "model_type" if options.merged else "peft_type"
    if output.is_dir() and (not any(output.iterdir()) or known in read_json(output / kind)):
        return
    what = "model" if options.merged else "PEFT adapter"
    raise UserError(
        f"--output {output} holds something other than a {what}, and --overwrite would "
        "delete it: name another folder"
    )


def check_apart(output: str | None, adapter: Path, base: str) -> None:
    """Raises a UserError if replacing the output folder would delete an input."""
    for path in (adapter, Path(base).expanduser()):
        if output is None or not path.exists():
            continue
        if path.resolve().is_relative_to(Path(output).expanduser().resolve()):
            raise UserError(
                f"--output {output} holds {path}, which is an input: name another folder"
            )


def base_of(adapter: Path, from_peft: bool) -> str:
    """Returns the base that PEFT's configuration or the adapter's own folder names."""
    if from_peft:
        with as_user_errors(ValueError):
            name = fields_of(adapter)[0].get("base_model_name_or_path")
    else:
        name = about(adapter).get("model")
    if not name:
        raise UserError(f"--adapter {adapter} does not say what its base is: name it with --model")
    return name


def about(adapter: Path) -> dict[str, Any]:
    """Returns the facts that an adapter's folder states: its base, its labels."""
    with as_user_errors(ValueError):
        return lj.adapter_info(adapter)


def load(options: Options, adapter: Path, from_peft: bool, name: str) -> tuple[Any, Any]:
    """Returns the model, and its parameters with the adapter, all in float32."""
    names = () if from_peft else about(adapter).get("labels", ())
    num_labels = options.num_labels or len(names)
    head: dict[str, Any] = {}
    if num_labels:
        head = {"head": "classification", "num_labels": num_labels}
    model, params = read_model(name, dtype="float32", **head)
    if num_labels and len(names) == num_labels:
        model = model.clone(config=dataclasses.replace(model.config, label_names=tuple(names)))
    with as_user_errors(ValueError):
        if from_peft:
            return model, lp.load(adapter, model, params)
        mismatch = options.allow_base_mismatch
        return model, lj.load_adapter(adapter, params, allow_base_mismatch=mismatch)


def dtype_of_files(name: str) -> str:
    """Returns the commonest dtype of the base's tensors; float32 for quantised ones."""
    kinds = Counter(open_source(resolve(name).path).dtypes.values())
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32")


def tokenizer_of(name: str) -> str | None:
    """Returns the source of the tokenizer's files; None if the base's folder has none."""
    path = resolve(name).path
    if path.is_dir() and not tokenizer_files(path):
        print(f"{path} holds no tokenizer: the model is written without one", file=sys.stderr)
        return None
    return name


def task_type(model: Any, fields: dict[str, Any]) -> str | None:
    """Returns PEFT's task type of the model; None if it has none.

    A classifier that does not train has none: with SEQ_CLS, PEFT would look for a trained head in
    the adapter's file.
    """
    config = model.config
    if not isinstance(config, EncoderConfig):
        return "CAUSAL_LM"
    if config.head == "classification":
        return "SEQ_CLS" if "classifier" in (fields["modules_to_save"] or ()) else None
    return None if config.head == "masked_lm" else "FEATURE_EXTRACTION"


def auto_class(model: Any) -> str:
    """Returns the name of the transformers class that loads the model."""
    if not isinstance(model.config, EncoderConfig):
        return "AutoModelForCausalLM"
    heads = {
        "classification": "AutoModelForSequenceClassification",
        "masked_lm": "AutoModelForMaskedLM",
    }
    return heads.get(model.config.head, "AutoModel")


def report_problems(problems: Sequence[str]) -> None:
    """Prints one problem per line and exits with code 1, or prints that there are none."""
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(PROBLEMS)
    print("serving: nothing to refuse")


def print_files(console: Console, folder: Path, what: str) -> None:
    """Prints a table of the files in a folder."""
    console.print(f"{what}: {folder}", highlight=False, soft_wrap=True, markup=False)
    table = Table("file", "size")
    table.columns[1].justify = "right"
    for path in sorted(folder.iterdir()):
        table.add_row(path.name, size(path.stat().st_size))
    table.add_section()
    table.add_row("total", size(folder_bytes(folder)))
    console.print(table)


def size(n: int) -> str:
    """Formats a number of bytes: "19.6 MB", or "3.2 kB" below a megabyte."""
    return megabytes(n) if n >= 1e6 else f"{n / 1e3:.1f} kB"


def hint(console: Console, code: str) -> None:
    """Prints the code that loads the written files."""
    console.print(f"load it with: {code}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
