"""The model card of an export: the facts of its run, and the code that loads it."""

import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from lora_jax.core.types import Fields, Model
from lora_jax.models.families import reading_options
from lora_jax.training.run.best import BEST
from train.adapters.source import AdapterSource
from train.console.markdown import escape_markdown, table
from train.data.files import parse_datasets
from train.export.marked import mark
from train.export.terms import auto_class, loading_config, loading_options
from train.options.field import CardSection, traits_of
from train.options.paths import FILE_KINDS
from train.options.scripts import classify, distill, dpo, grpo, sft
from train.reporters.files import read_json
from train.run.log import newest_measurement, read_metrics
from train.run.output import CONFIG, FACTS, REPORT, SCORES
from train.run.report import versions

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# ExportOptions that shaped the weights, in the order of the card.
_PLACES = {
    name: traits.card
    for options in (sft, classify, dpo, grpo, distill)
    for name, traits in traits_of(options.Config()).items()
    if traits.card is not CardSection.NOWHERE
}
_IN_ORDER = sorted(_PLACES, key=_PLACES.__getitem__)
_OF_ADAPTER = [name for name in _IN_ORDER if _PLACES[name] is CardSection.ADAPTER]
_OF_TRAINING = [name for name in _IN_ORDER if _PLACES[name] is not CardSection.ADAPTER]
_OF_PEFT = (
    *("r", "lora_alpha", "target_modules", "target_parameters", "lora_dropout", "use_rslora"),
    *("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices"),
)
_LEFT_OUT = ("confusion", "classes", "answers", "right")  # of scores.json


class Export(NamedTuple):
    """The subject of a card.

    Attributes:
      name: the name on the hub, or a stand-in for the folder.
      base: the base's name on the hub; None if it has none.
      model: the model.
      fields: fields of adapter_config.json; None for a merged model.
      source: the adapter.
      gguf_codes: the codes of the base's weights in a GGUF file, such as "Q4_1"; None for others.
    """

    name: str
    base: str | None
    model: Model
    fields: Fields | None
    source: AdapterSource
    gguf_codes: str | None = None


def card(export: Export) -> str:
    """Returns the text of README.md: YAML front matter, how to load it, and how it came about."""
    run = _run_of(export.source)
    options = run.get("options", {})
    base = "a model"
    if export.base:
        address = urllib.parse.quote(export.base)
        base = f"[{escape_markdown(export.base)}](https://huggingface.co/{address})"
    config = export.model.config
    what = f"A LoRA adapter of {base} ({config.model_type})."
    if export.fields is None:
        what = f"{base} ({config.model_type}) with a LoRA adapter merged into it."
    title = escape_markdown(export.name.rsplit("/", 1)[-1])
    parts = [f"# {title}", f"{what} Trained and exported with lora_jax."]
    if labels := getattr(config, "label_names", ()):
        parts.append(f"Its classes: {', '.join(map(_cell, labels))}.")
    if export.gguf_codes:
        parts.append(
            f"The base's weights were those of a GGUF file, in {export.gguf_codes} codes. Those of "
            "its other files differ a little, and so do answers over them."
        )
    parts += ["## Load it", *_code(export)]
    parts += ["## Training", *_training(export, run, options)]
    used = run.get("versions") or versions()
    listed = ", ".join(_cell(f"{name} {version}") for name, version in used.items())
    parts += ["## Versions", f"{'Trained' if run else 'Exported'} with {listed}."]
    return mark(f"---\n{_front_matter(export, options)}\n---\n\n" + "\n\n".join(parts))


def _front_matter(export: Export, options: Fields) -> str:
    is_adapter = export.fields is not None
    data = ModelCardData(
        base_model=export.base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=auto_class(export.model)[1],
        tags=["lora", "lora_jax", "jax"],
        datasets=[name for name in _datasets(options) if _is_of_hub(name)] or None,
    )
    if export.base:
        data["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return data.to_yaml()


def _datasets(options: Fields) -> list[str]:
    """Returns the names of the data sets that a run was given, one or several."""
    given = options.get("dataset")
    if not given:  # there was no run
        return []
    return (
        [given] if isinstance(given, str) else [dataset.name for dataset in parse_datasets(given)]
    )


def _is_of_hub(name: str) -> bool:
    is_name = _HUB_NAME.fullmatch(name) and not name.endswith(FILE_KINDS)
    return bool(is_name) and not Path(name).expanduser().exists()


def _shown(name: str) -> str:
    """Returns the name of a data set without the folders of whoever trained."""
    path = Path(name).expanduser()
    return path.name if name.endswith(FILE_KINDS) or path.is_absolute() else name


def _code(export: Export) -> Iterator[str]:
    """Yields the code that loads the export, with a line before each."""
    base, name = (json.dumps(x) for x in (export.base or "path/to/the/base", export.name))
    auto, _ = auto_class(export.model)
    if export.fields is None:
        loaded = f"model = {auto}.from_pretrained({name})"
        yield "With transformers:"
        yield _python(f"from transformers import {auto}", "", loaded)
        images = ", images=True" if reading_options(export.model.config) else ""
        loaded = f"model, params = models.from_pretrained({name}{images})"
        yield "With lora_jax:"
        yield _python("from lora_jax import models", "", loaded)
        return
    config, source = export.model.config, export.source
    given = loading_options(source, export.model)
    of_torch, of_ours = "".join(f", {key}={value!r}" for key, value in given.items()), ""
    if "num_labels" in given:
        of_ours = f', head="classification", num_labels={config.num_labels}'
    if reading_options(config):
        of_ours += ", images=True"
    if source.rope_scaling:
        of_ours += f", rope_scaling={source.rope_scaling!r}"
    imports = auto
    if source.quantize:
        of_ours += f', quantize="{source.quantize}"'
    if quantization := loading_config(source.quantize):
        imports += ", BitsAndBytesConfig"
        of_torch += f", quantization_config={quantization}"
    yield "With PEFT:"
    yield _python(
        "from peft import PeftModel",
        f"from transformers import {imports}",
        "",
        f"base = {auto}.from_pretrained({base}{of_torch})",
        f"model = PeftModel.from_pretrained(base, {name})",
    )
    yield "With lora_jax:"
    yield _python(
        "import lora_jax as lj",
        "import lora_jax.peft as lp",
        "from lora_jax import models",
        "",
        f"model, params = models.from_pretrained({base}{of_ours})",
        f"params = lp.load({name}, model, params)",
        "forward = lj.adapt(model.apply)  # with the arguments of model.apply",
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _training(export: Export, run: Fields, options: Fields) -> Iterator[str]:
    resolved = run.get("resolved", {})
    if datasets := _datasets(options):
        shown = ", ".join(map(_shown, datasets))
        number = f", {resolved['examples']} examples" if resolved.get("examples") else ""
        yield f"Data: {_cell(shown)}{number}."
    if run.get("summary"):
        yield f"`{run['summary']}`"
    facts: dict[str, object] = {}
    is_new = not any(options.get(name) for name in ("init_adapter", "peft_config", "full"))
    if export.fields is not None:
        facts |= {name: export.fields.get(name) for name in _OF_PEFT}
    elif is_new:
        facts |= {name: options.get(name) for name in _OF_ADAPTER}
    if is_new:
        facts["init"] = options.get("init")
    facts |= {"steps": resolved.get("steps")} | _steps(run.get("report", {}))
    facts["lr"] = resolved.get("lr")
    facts |= {name: options.get(name) for name in _OF_TRAINING}
    unset: Any = (None, False, "", "none", [], (), {})  # 0 and 0.0 equal False
    if rows := [(name, value) for name, value in facts.items() if value not in unset]:
        yield _table("option", rows)
    if losses := list(_losses(export.source, run)):
        yield _table("loss", losses)
    if scores := list(_scores(run.get("scores", {}))):
        yield "Scores on data that it was not trained on:"
        yield _table("score", scores)
    if not run:
        yield "No facts of its training lay beside the adapter."


def _steps(report: Fields) -> dict[str, object]:
    """Returns the steps that a run took, and that of its adapter, where they are not as planned."""
    taken, kept = report.get("last_step"), report.get("kept_step")
    return {} if taken == kept == report.get("steps") else {"steps taken": taken, "kept step": kept}


def _losses(source: AdapterSource, run: Fields) -> Iterator[tuple[str, str]]:
    """Yields the first loss of a run, and the newest up to the step of its adapter."""
    folder = run_folder(source)
    lines = read_metrics(folder) if folder else []
    report, last_step = run.get("report", {}), lines[-1]["step"] if lines else 0
    best = report.get("best", {})  # of earlier versions, which wrote no kept_step
    kept_step = report.get("kept_step", best.get("step", last_step))
    if source.folder.parent.name == BEST and source.folder.name.isdecimal():
        kept_step = int(source.folder.name)
    for name, what in (("loss", "training"), ("eval_loss", "held-out rows")):
        first = next((line for line in lines if name in line), None)
        newest = newest_measurement(lines, name, kept_step)
        if first is not None and (newest.step is None or first["step"] < newest.step):
            yield f"{what}, step {first['step']}", f"{first[name]:.4f}"
        if newest.value is not None:
            yield f"{what}, step {newest.step}", f"{newest.value:.4f}"


def _scores(scores: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the numbers of nested objects by their names."""
    if isinstance(scores, Mapping):
        for key, value in scores.items():
            if key not in _LEFT_OUT:
                yield from _scores(value, f"{name}, {key}" if name else key)
    elif isinstance(scores, int | float) and not isinstance(scores, bool):
        yield name, f"{scores:.4f}" if isinstance(scores, float) else str(scores)


def run_folder(source: AdapterSource) -> Path | None:
    """Returns the folder of the run that an adapter lies in, or a best one of a run on its way."""
    parent = source.folder.parent
    folders = [parent]
    if parent.name == BEST:  # the folder of the best adapters, unless a run has the name
        folders.append(parent.parent)
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _run_of(source: AdapterSource) -> dict[str, Any]:
    """Returns the facts of the run whose folder holds the adapter; {} if none does."""
    folder = run_folder(source)
    if folder is None:
        return {}
    try:
        options = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        options = {}
    run = read_json(folder / FACTS) | {"options": options if isinstance(options, dict) else {}}
    return run | {"scores": read_json(folder / SCORES), "report": read_json(folder / REPORT)}


def _table(header: str, rows: Sequence[tuple[str, object]]) -> str:
    return table((header, "value"), ([_cell(name), _cell(value)] for name, value in rows))


def _cell(value: object) -> str:
    """Returns a value as the text of a table's cell."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return escape_markdown(str(value))
