"""Finds the parts of diffusers' pipelines, and the classes of their modules."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.hub import find_file_first, find_snapshot
from lora_jax.hf.keys import WeightsError
from lora_jax.torch.packages import TorchModelError

CLASS_FIELD = "_class_name"
STEM = "diffusion_pytorch_model"
_PIPELINE_FILE = "model_index.json"
_ENDS_OF_WEIGHTS = (".safetensors", ".safetensors.index.json", "-*.safetensors")


def find_part(pipeline: Any, part: str) -> Path:
    """Returns the folder of a part of a pipeline, which is downloaded from the hub if needed.

    Args:
      pipeline: a folder or a hub name.
      part: the name of the folder in it, such as "transformer".

    Raises:
      ModelNotFound: the hub cannot provide the pipeline.
      TorchModelError: the pipeline has no such part.
    """
    folder = Path(pipeline).expanduser()
    if not folder.exists():
        weights = (f"{stem}{end}" for stem in (STEM, "model") for end in _ENDS_OF_WEIGHTS)
        files = ("config.json", *weights)
        patterns = [_PIPELINE_FILE, *(f"{part}/{file}" for file in files)]
        folder = find_snapshot(str(pipeline), patterns, needed=f"{part}/*.safetensors")
    if not (folder / part / "config.json").exists():
        parts = ", ".join(_parts_of(folder))
        remedy = f"Pass one of its parts as subfolder: {parts}." if parts else "Check the path."
        raise TorchModelError(f"{folder} has no {part}/config.json. {remedy}")
    return folder / part


def check_hub_name(source: Any) -> None:
    """Raises a TorchModelError for the hub name of a pipeline, before its parts are downloaded."""
    index_file = find_file_first(source, _PIPELINE_FILE)
    if index_file is None:
        return
    entries = json.loads(index_file.read_text(encoding="utf-8"))
    parts = [
        name for name, entry in sorted(entries.items()) if isinstance(entry, list) and any(entry)
    ]
    raise TorchModelError(
        f"{source} is a pipeline of diffusers. Pass one of its parts as subfolder: "
        f"{', '.join(parts)}."
    )


def check_folder(folder: Path) -> bool:
    """Returns True for the folder of a part of a pipeline.

    Raises:
      TorchModelError: it is the folder of a whole pipeline.
      WeightsError: its weights are a pickle.
    """
    config = folder / "config.json"
    if not config.exists():
        if (folder / _PIPELINE_FILE).exists():
            raise TorchModelError(
                f"{folder} is a pipeline of diffusers. Pass one of its parts as subfolder: "
                f"{', '.join(_parts_of(folder))}."
            )
        return False
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False  # who reads the configuration says what is wrong
    if not isinstance(fields, dict) or CLASS_FIELD not in fields:
        return False
    pickles = sorted(path.name for path in folder.glob(f"{STEM}*.bin"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder} holds only {pickles[0]}, which is a pickle. A pickle can run any code when "
            "it is loaded, so lora_jax does not read it. Save the module with diffusers' "
            "save_pretrained, which writes safetensors."
        )
    return True


def _parts_of(folder: Path) -> list[str]:
    """Returns the folders of a pipeline that hold a module of diffusers or transformers."""
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def module_class(fields: Fields) -> Any:
    """Returns the class that a config.json of diffusers names.

    Raises:
      TorchModelError: diffusers is not installed, or has no such class.
    """
    name = str(fields[CLASS_FIELD])
    if importlib.util.find_spec("diffusers") is None:
        raise TorchModelError(
            f"{name} is a class of diffusers, which is not installed. Run pip install "
            "'lora_jax[diffusion]'"
        )
    import diffusers

    named_class = getattr(diffusers, name, None)
    if not hasattr(named_class, "from_config"):
        raise TorchModelError(
            f"diffusers {importlib.metadata.version('diffusers')} has no class {name}. Install a "
            "newer version of diffusers."
        )
    return named_class
