"""Ship a trained adapter: `python -m train.export --adapter runs/sql/adapter --output out`.

Writes a PEFT adapter for transformers and serving engines or, with --merged, a whole model; with
--gguf, an adapter for llama.cpp, or a model for it, Ollama and LM Studio; with --diffusers, an
adapter of an image model. Takes adapters of this library and of PEFT.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Column, Table

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.adapt.activate import invocations_of
from lora_jax.buckets.copies import path_to_write, replace_copy_paths
from lora_jax.buckets.store import bucket_path
from lora_jax.core.types import Fields, Model, Tree
from lora_jax.hf.coded import QUANTIZE_STORED
from lora_jax.hf.hub import find_model, name_on_other_machines
from lora_jax.models import save_pretrained
from lora_jax.peft.contents import adapter_contents
from lora_jax.peft.served import convert_for_serving
from lora_jax.peft.serving import list_problems, serving_problems
from train.adapters.source import AdapterSource, find_adapter
from train.console.errors import UserError, as_user_errors, reported
from train.console.output import tell
from train.export.base import choose_tokenizer, find_file_dtype, find_gguf_codes, keep_codes
from train.export.card import Export, is_generated, make_card
from train.export.diffusers import export_image_adapter, is_image_export
from train.export.gguf import check_gguf, write_gguf_adapter, write_gguf_model
from train.export.hub import README, Repository, find_repository, push_folder
from train.export.options import ExportJob, ExportOptions, check_options, parse_export_options
from train.export.terms import (
    auto_class,
    codes_notice,
    describe_loading,
    list_rope_problems,
    task_type,
    transformers_options,
)
from train.processes.cache import keep_compiled
from train.run.costs import byte_size
from train.run.output import folder_bytes
from train.run.pretrained import ModelInfo, read_model, read_untokenized

EXIT_CODE_WITH_PROBLEMS = 1  # the exit code when --check-serving finds some


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported(), local_output(parse_export_options(args)) as options:
        run(options)


def run(options: ExportOptions, console: Console | None = None) -> None:
    """Checks the options, loads the adapter, writes it, and uploads it.

    Args:
      options: the options.
      console: console to print to; None for standard output.
    """
    console = console or Console()
    adapter = find_adapter(options.adapter)
    shard = check_options(options)
    if adapter.is_subspace and not options.merged:
        raise UserError(
            f"{adapter.option} is a subspace (--intrinsic), which PEFT's files cannot hold. Use "
            "--merged to write a whole model."
        )

    # With --check-serving alone, PEFT's folder is checked as it is.
    is_written = any((options.output, options.push_to_hub, options.gguf, options.diffusers))
    if adapter.is_peft and not is_written:
        with as_user_errors(ValueError):
            report_problems(serving_problems(adapter.folder, max_rank=options.max_rank))
        return

    name = options.model or adapter.base()
    check_output_is_no_input(options, adapter.folder, name)
    if is_image_export(options, adapter, name):
        export_image_adapter(options, console, adapter, name, shard)
        return
    repository = find_upload_repository(options, name)
    cache_problem = keep_compiled(options.compilation_cache)
    if cache_problem:
        tell(console, cache_problem)
    with console.status(f"loading {name} and {adapter.folder}"):
        model, params = load(options, adapter, name)
    with tempfile.TemporaryDirectory() as folder:
        # Without --output, the files to upload are written to the temporary folder.
        if repository and options.output is None:
            options = dataclasses.replace(options, output=str(Path(folder) / "export"))
        work = ExportJob(options, console, adapter, name, repository)
        if options.gguf is not None:
            write_gguf = write_gguf_model if options.merged else write_gguf_adapter
            write_gguf(work, model, params)
        elif options.merged:
            write_merged(work, model, params, shard)
        else:
            write_adapter(work, model, params)
        if repository:
            upload(work, repository, Path(folder))


def find_upload_repository(options: ExportOptions, base: str) -> Repository | None:
    """Returns the repository to upload to, after checking that an upload would succeed.

    Raises:
      UserError: the export would name no base, or the hub refuses the name.
    """
    name = options.push_to_hub
    if name is None:
        return None
    if not options.merged and not options.base_name and name_on_other_machines(base) is None:
        raise UserError(
            f"--push-to-hub {name}: Nobody else could load the adapter, because its base {base} is "
            "a local folder. Give the base's name on the hub with --base-name."
        )
    return find_repository(name, private=options.private, overwrite=options.overwrite)


def upload(work: ExportJob, repository: Repository, temporary: Path) -> None:
    """Uploads the export, and prints where it is."""
    output = work.output
    remedy = f"The export is in {output}. Upload it with `hf upload {repository.name} {output}`."
    if output.is_relative_to(temporary):
        remedy = (
            "Run the same command again with --overwrite, and with --output to keep the export."
        )
    if repository.has_own_card:
        print(
            f"{repository.name} keeps its {README}, because somebody wrote or edited it.",
            file=sys.stderr,
        )
    work.say(f"uploaded to {push_folder(repository, output, remedy)}")


def make_readme(work: ExportJob, model: Model, fields: Fields | None = None) -> str:
    """Returns the model card: an edited card in the output folder, or else a new one."""
    readme = work.output / README
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if not is_generated(text):
            print(f"{readme} stays as it is, because somebody wrote or edited it.", file=sys.stderr)
            return text
    export = Export(
        name=work.hub.name if work.hub else f"path/to/{work.output.name}",
        base=work.options.base_name or name_on_other_machines(work.base),
        model=model,
        fields=fields,
        source=work.adapter,
        gguf_codes=find_gguf_codes(work.base),
    )
    return make_card(export)


def write_merged(work: ExportJob, model: Model, params: Tree, shard: int) -> None:
    """Writes the whole model, with the adapter merged into it."""
    dtype = work.options.dtype or find_file_dtype(work.base)
    tokenizer = work.options.tokenizer or work.adapter.tokenizer
    codes_format = None if work.options.quantize else work.adapter.quantize or QUANTIZE_STORED
    with (
        as_user_errors(ValueError, OSError, prefix="--merged: "),
        work.console.status(f"merging and writing {replace_copy_paths(work.output)}"),
    ):
        params, codes_from, remark = keep_codes(lj.merge(params), model, work.base, codes_format)
        save_pretrained(
            work.output,
            model,
            params,
            tokenizer=choose_tokenizer(work.base, tokenizer, model.config),
            max_shard_size=shard,
            dtype=jnp.dtype(dtype),
            readme=make_readme(work, model),
            overwrite=work.options.overwrite,
            codes_from=codes_from,
            chat_template=work.template,
        )
    print_files(work, f"{work.options.adapter} merged into {work.base}, in {dtype}")
    if remark:
        work.say(remark)
    codes = work.adapter.base_codes
    if codes:
        work.say(
            f"The kernels are the dequantized {codes} values of the base plus the update, so a "
            "server runs the model that was trained."
        )
    output = replace_copy_paths(work.output)
    lora_jax_code = f'lora_jax.models.from_pretrained("{output}")'
    torch_code = f'{auto_class(model)[0]}.from_pretrained("{output}")'
    work.say(describe_loading(lora_jax_code, torch_code, [output]))


def write_adapter(work: ExportJob, model: Model, params: Tree) -> None:
    """Writes PEFT's files. With --check-serving, exits before that if there are problems."""
    options = work.options
    base = work.base
    problem = "The adapter cannot be written as a PEFT adapter: "
    remedy = " You can also write a whole model with --merged."
    with as_user_errors(ValueError, prefix=problem, suffix=remedy):
        fields, tensors = adapter_contents(model, params)
        if options.for_serving:
            fields, tensors = convert_for_serving(fields, tensors, model)
    if options.check_serving:
        model_type = model.config.model_type
        problems = list_problems(fields, tensors, max_rank=options.max_rank, model_type=model_type)
        report_problems([*problems, *list_rope_problems(work.adapter, model)])
    if options.output is None:
        return
    with as_user_errors(ValueError, OSError):
        lp.save(
            work.output,
            model,
            params,
            base_model=options.base_name or name_on_other_machines(base),
            task_type=task_type(model, fields),
            for_serving=options.for_serving,
            readme=make_readme(work, model, fields),
            chat_template=work.template,
            overwrite=options.overwrite,
        )
    print_files(work, f"{options.adapter} as a PEFT adapter of {base}")
    if work.adapter.base_codes:
        work.say(codes_notice(work.adapter.base_codes, base))
    if not options.base_name and name_on_other_machines(base) is None:
        work.say(
            "adapter_config.json names no base, because the base is a local folder. Give the name "
            "of the base on the hub with --base-name."
        )
    options_of_loading = transformers_options(work.adapter, model)
    arguments = "".join(f", {name}={value!r}" for name, value in options_of_loading.items())
    auto_name, _ = auto_class(model)
    base_code = f'{auto_name}.from_pretrained("{base}"{arguments})'
    output = replace_copy_paths(work.output)
    lora_jax_code = f'lora_jax.peft.load("{output}", model, params)'
    torch_code = f'PeftModel.from_pretrained({base_code}, "{output}")'
    work.say(describe_loading(lora_jax_code, torch_code, [base, output]))


def check_output_is_no_input(options: ExportOptions, adapter: Path, base: str) -> None:
    """Raises a UserError if replacing the output would delete an input."""
    inputs = [path for path in (adapter, Path(base).expanduser()) if path.exists()]
    outputs = {
        "--output": options.output,
        "--gguf": options.gguf,
        "--diffusers": options.diffusers,
    }
    for option, output in outputs.items():
        if output is None:
            continue
        output_path = Path(output).expanduser().resolve()
        for path in inputs:
            if path.resolve().is_relative_to(output_path):
                raise UserError(
                    f"{option} {output} is or holds the input {path}. Name another path."
                )


def load(options: ExportOptions, adapter: AdapterSource, name: str) -> tuple[Model, Tree]:
    """Returns the model, and its parameters with the adapter, all in float32."""
    label_names = adapter.base_info.get("labels", ())
    num_labels = options.num_labels or adapter.num_labels
    allow_mismatch = options.allow_base_mismatch
    base_options: dict[str, Any] = {"model_code": adapter.model_code}
    if num_labels:
        base_options = {"head": "classification", "num_labels": num_labels}
    outline = read_untokenized(name, **base_options)
    needs_images = adapter.images or options.gguf is None and adapter.names_whole_model
    if needs_images:
        outline = outline.with_images()
    outline = outline.scaled(adapter.rope_scaling)
    has_codes = outline.has_codes
    if options.gguf and not has_codes:
        has_codes = find_model(name).path.suffix == ".gguf"
    if options.quantize and not has_codes:
        raise UserError(
            f"--quantize none has no effect, because the files of {name} are not quantized. Remove "
            "--quantize."
        )
    check_activated_lora(options, adapter, outline)
    if options.gguf is not None:
        check_gguf(options, adapter, name, outline.config)
    outline = outline.quantized(adapter.quantize)
    adapter.check(outline, allow_base_mismatch=allow_mismatch)
    model, params = read_model(name, dtype="float32", **outline.head)
    if num_labels and len(label_names) == num_labels:
        config = dataclasses.replace(model.config, label_names=tuple(label_names))
        model = model.clone(config=config)
    return model, adapter.load(model, params, name, allow_base_mismatch=allow_mismatch)


def check_activated_lora(
    options: ExportOptions, adapter: AdapterSource, outline: ModelInfo
) -> None:
    """Raises a UserError for an activated LoRA in a form that acts on all tokens."""
    if options.merged:
        form = "--merged"
    elif options.gguf is not None:
        form = "--gguf"
    else:
        return
    if adapter.is_subspace:
        return
    for invocation in invocations_of(adapter.abstract_tree(outline)):
        raise UserError(
            f"{form}: {adapter.option} is an activated LoRA, which acts from its invocation "
            f"{list(invocation)} on. With {form} it would act on all tokens. Write PEFT's files "
            "(--output alone), or run the adapter with train.serve."
        )


def report_problems(problems: Sequence[str]) -> None:
    """Prints one problem per line and exits with code 1, or prints that there are none."""
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(EXIT_CODE_WITH_PROBLEMS)
    print("Serving: no problems found.")


def print_files(work: ExportJob, title: str) -> None:
    """Prints a table of the files in the output folder."""
    work.say(f"{title}: {work.output}")
    table = Table("file", Column("size", justify="right"))
    for path in sorted(work.output.iterdir()):
        table.add_row(path.name, byte_size(path.stat().st_size))
    table.add_section()
    table.add_row("total", byte_size(folder_bytes(work.output)))
    work.console.print(table)


@contextlib.contextmanager
def local_output(options: ExportOptions) -> Iterator[ExportOptions]:
    """Yields the options with a local output folder, which is copied to a bucket at the end.

    Raises:
      UserError: the output is or holds an input.
    """
    bucket_output = None if options.output is None else bucket_path(options.output)
    if options.output is None or bucket_output is None:  # a folder of this machine already
        yield options
        return
    for name in (options.adapter, options.model):
        bucket_input = None if name is None else bucket_path(name)
        if bucket_input is not None and f"{bucket_input}/".startswith(f"{bucket_output}/"):
            raise UserError(
                f"--output {bucket_output} is or holds the input {name}. Name another path."
            )
    with path_to_write(options.output) as folder:
        yield dataclasses.replace(options, output=str(folder))


if __name__ == "__main__":
    main()
