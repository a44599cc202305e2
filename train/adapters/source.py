"""Finds and loads the adapter that an option names: a run's, this library's or PEFT's."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import subspace
from lora_jax.buckets.copies import path_to_read
from lora_jax.buckets.store import BucketError
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.folders import TEMPLATE_FILE
from lora_jax.hf.coded import QUANTIZE_NONE
from lora_jax.hf.hub import name_on_other_machines
from lora_jax.hf.vision.readers import reads_images
from lora_jax.lorafy import nodes_of
from lora_jax.models.families import IMAGES, reading_options
from lora_jax.peft.config import CONFIG_FILE as PEFT_CONFIG
from lora_jax.peft.config import read_config, read_fields
from lora_jax.peft.contents import adapter_contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.load import find_adapter_folder, read_tensor_names, read_tensors
from lora_jax.peft.names import KEY_PREFIX
from lora_jax.peft.names import WEIGHTS_FILE as PEFT_WEIGHTS
from lora_jax.quantized import is_coded
from lora_jax.saving.errors import DamagedAdapterError
from lora_jax.training.run.best import BEST
from train.console.errors import UserError, as_user_errors

ADAPTER = "adapter"  # the adapter's folder in the folder of a run
_OUR_WEIGHTS = "lora"  # an item of `lora_jax.save_adapter`
_RUN_FILES = ("config.yaml", "checkpoints")  # files of a run that has no adapter yet
_CLASSIFIER_KEY = re.compile(re.escape(KEY_PREFIX) + r"classifier(\.out_proj)?\.weight")
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_MAX_SHOWN_PROBLEMS = 3  # problems of a file that a message names


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """The folder of an adapter in the format of this library or of PEFT.

    Attributes:
      given: the option that names it, for messages: "--adapter runs/sql".
      folder: the folder.
      from_peft: whether PEFT's files are in it.
    """

    option: str
    folder: Path
    is_peft: bool

    @property
    def base_info(self) -> dict[str, Any]:
        """The "model" and other facts that the adapter states about its base.

        Raises:
          UserError: the adapter's files cannot be read.
        """
        with self._as_user_errors():
            if not self.is_peft:
                return lj.adapter_info(self.folder)
            name = read_fields(self.folder)[0].get("base_model_name_or_path")
        return {"model": name} if name else {}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of RoPE that the adapter was trained with; see --rope-scaling."""
        return None if self.is_peft else self.base_info.get("rope_scaling")

    @property
    def chat_template(self) -> Path | None:
        """The chat template file that the adapter was trained with, or None."""
        file = self.folder / TEMPLATE_FILE
        return file if file.is_file() else None

    @property
    def tokenizer(self) -> str | None:
        """The --tokenizer that the adapter was trained with; None for the base's tokenizer.

        Raises:
          UserError: the tokenizer was in a folder that is not on this machine.
        """
        return self.find_tokenizer("Name the tokenizer with --tokenizer.")

    @property
    def quantize(self) -> str | None:
        """The --quantize of the adapter's run; None if the base's files determined it."""
        return None if self.is_peft else self.base_info.get("quantize")

    @property
    def model_code(self) -> str | None:
        """The --model-code of the adapter's run; None if the model_type selected the code."""
        return None if self.is_peft else self.base_info.get("model_code")

    @property
    def images(self) -> bool:
        """True if the adapter was trained on a model that includes an image encoder."""
        return (
            self._has_tensor_named(".visual.") if self.is_peft else bool(self.base_info.get(IMAGES))
        )

    @property
    def names_whole_model(self) -> bool:
        """True if the adapter's tensors have the names of a model that also reads images.

        That is the case for `images`, and where PEFT adapted only the text of such a model. PEFT
        merges such an adapter into the whole model. Without a merge it fits the text alone, too.
        """
        if self.images:
            return True
        return self.is_peft and self._has_tensor_named(".language_model.")

    @property
    def base_codes(self) -> str | None:
        """The quantization of the base in the adapter's run; None for a float base."""
        return None if self.quantize == QUANTIZE_NONE else self.quantize

    @property
    def is_subspace(self) -> bool:
        """True if the run trained a random subspace (--intrinsic), not an adapter."""
        return not self.is_peft and subspace.FACTS in self.base_info

    @property
    def num_labels(self) -> int | None:
        """The number of classes of a classifier; None for other adapters.

        Raises:
          UserError: the files cannot be read.
        """
        if not self.is_peft:
            return len(self.base_info.get("labels", ())) or None
        with self._as_user_errors():
            tensors = read_tensors(self.folder / PEFT_WEIGHTS)
        for name, tensor in tensors.items():
            if _CLASSIFIER_KEY.fullmatch(name):
                return len(tensor)
        return None

    def find_tokenizer(self, remedy: str) -> str | None:
        """Returns the name of the tokenizer that the adapter was trained with; None if unknown.

        Args:
          remedy: an instruction for a folder that is not on this machine, as a sentence.

        Raises:
          UserError: as `tokenizer` does.
        """
        name: str | None = None if self.is_peft else self.base_info.get("tokenizer")
        if name and Path(name).is_absolute() and not Path(name).exists():
            raise UserError(
                f"{self.option} was trained with the tokenizer in {name}, which does not exist "
                f"on this machine. {remedy}"
            )
        return name

    def base(self) -> str:
        """Returns the name of the base that the adapter states.

        Raises:
          UserError: it states none, or a folder that is not on this machine.
        """
        name = self.base_info.get("model")
        if not name:
            raise UserError(
                f"{self.option} does not state its base model. Name the base with --model."
            )
        if name.startswith(("/", ".", "~")) and not Path(name).expanduser().exists():
            raise UserError(
                f"{self.option} was trained on the base in {name}, which does not exist on this "
                "machine. Name the base with --model."
            )
        return name

    def check_files(self) -> None:
        """Raises a UserError if the files cannot be read, or use an unsupported feature."""
        if not self.is_peft:
            _ = self.base_info
            return
        remedy = " You can merge such an adapter into its base with PEFT (merge_and_unload, then "
        remedy += "save_pretrained). Then name the merged folder with --model."
        with self._as_user_errors(remedy):
            read_config(self.folder)
        with self._weights_as_user_errors():
            read_tensors(self.folder / PEFT_WEIGHTS)

    def _has_tensor_named(self, part: str) -> bool:
        """Returns True if the name of one of PEFT's tensors contains this text."""
        with self._weights_as_user_errors():
            return any(part in name for name in read_tensor_names(self.folder / PEFT_WEIGHTS))

    def _weights_as_user_errors(self) -> AbstractContextManager[None]:
        """Turns errors while PEFT's weights are read into UserErrors."""
        remedy = " Copy the folder again, or save the adapter again with "
        remedy += "save_pretrained(…, safe_serialization=True)."
        return self._as_user_errors(remedy)

    def _as_user_errors(self, remedy: str = "") -> AbstractContextManager[None]:
        """Turns errors while the adapter's files are read into UserErrors."""
        return as_user_errors(ValueError, prefix=f"{self.option}: ", suffix=remedy)

    def check(self, outline: Any, *, allow_base_mismatch: bool = False) -> None:
        """Checks the adapter against a model without reading the model's weights.

        Args:
          outline: the model's outline; see `train.run.pretrained`.
          allow_base_mismatch: accept a base of another name.

        Raises:
          UserError: the adapter was trained on another base, or a part such as a head is missing.
        """
        self.check_files()
        if not allow_base_mismatch:
            self._check_name(outline.name)
        with self._as_mismatch_errors(outline.name, outline.config):
            if self.is_subspace:
                space, _ = subspace.load(self.folder, outline.params, allow_base_mismatch=True)
                return self._check_head(outline, {tensor.path for tensor in space.tensors})
        tree = self.abstract_tree(outline)
        self._check_head(outline, set(nodes_of(tree)))

    def load(
        self, model: Any, params: Tree, name: str, *, allow_base_mismatch: bool = False
    ) -> Tree:
        """Returns a model's tree with the adapter, or a plain tree with a subspace's update.

        Args:
          model, params: the model and its parameters.
          name: the model's name, for messages.
          allow_base_mismatch: accept another base.

        Raises:
          UserError: the adapter is damaged, or of another base.
        """
        with self._as_mismatch_errors(name, model.config):
            if self.is_subspace:
                mismatch = allow_base_mismatch
                space, theta = subspace.load(self.folder, params, allow_base_mismatch=mismatch)
                return jax.jit(space.params_of)(theta, params)
            if self.is_peft:
                return lp.load(self.folder, model, params)
            return lj.load_adapter(self.folder, params, allow_base_mismatch=allow_base_mismatch)

    def abstract_tree(self, outline: Any) -> Tree:
        """Returns the adapted tree of `load` in shapes, without a check of the base's name."""
        return self.load(outline, outline.params, outline.name, allow_base_mismatch=True)

    def fits_peft(self, outline: Any) -> bool:
        """Returns True if PEFT's files can hold the adapter; reads no weights of the model.

        For a form whose arrays are made of the base (LoRA-XS, TinyLoRA), the result is True.
        """
        if self.is_subspace:
            return False
        tree = self.abstract_tree(outline)
        for node in nodes_of(tree).values():
            if not isinstance(node, LoraWeight):
                continue
            has_shapes = any(
                isinstance(array, jax.ShapeDtypeStruct) for array in node.arrays.values()
            )
            if has_shapes:  # the arrays are made of the base
                return True
        try:
            adapter_contents(outline, tree, embedding_layers=False)
        except PeftError:
            return False
        return True

    def _check_name(self, name: str) -> None:
        """Raises a UserError if PEFT's adapter, which has no fingerprint, names another base."""
        trained_base = self.base_info.get("model") if self.is_peft else None
        if not trained_base:
            return
        trained_name = name_on_other_machines(trained_base)
        model_name = name_on_other_machines(name)
        if trained_name is None or model_name is None:  # a folder, whose name says nothing
            return
        is_hub_name = trained_name.count("/") == 1
        if is_hub_name and trained_name != model_name:
            raise UserError(
                f"{self.option} was trained on {trained_name}, but --model is {model_name}. "
                "Remove --model, or accept this base with --allow-base-mismatch."
            )

    def _check_head(self, outline: Any, adapter_paths: set[str]) -> None:
        """Raises a UserError if neither base nor adapter contains a required part, such as a head.

        This library's adapters store a fingerprint of their base. It covers a freshly initialised
        part, too, unless the adapter trains it.
        """
        for path in outline.absent:
            is_needed = self.is_peft or outline.kinds[path] == "classifier"
            if is_needed and path not in adapter_paths:
                raise UserError(
                    f"Neither {self.option} nor --model {outline.name} holds {path}, so the two do "
                    "not make a classifier. Use a base with a head, or the adapter of a classifier "
                    "(in PEFT, task type SEQ_CLS)."
                )

    def _image_mismatch(self, name: str, config: Any) -> str:
        """Returns the problem if only the run or only this command reads images; else ""."""
        if self.images and not reads_images(config):
            return (
                f"was trained on {name} with its images, but this command reads only texts. Use "
                "the adapter with train.sft, train.generate or train.export."
            )
        if reading_options(config) and not self.images and not self.is_peft:
            return (
                f"was trained on the text of {name} alone, but this command reads images. Convert "
                "the adapter to PEFT's files with train.export, which fit both."
            )
        return ""

    @contextmanager
    def _as_mismatch_errors(self, name: str, config: Any) -> Iterator[None]:
        """Turns errors of an adapter that does not fit into a UserError of one paragraph."""
        try:
            yield
        except ValueError as error:
            image_problem = self._image_mismatch(name, config)
            if image_problem:
                raise UserError(f"{self.option} {image_problem}") from error
            if isinstance(error, DamagedAdapterError):
                raise UserError(f"{self.option}: {error}") from error
            # The first line says what is wrong, and each further line lists one problem.
            lines = [line.strip() for line in str(error).splitlines()]
            message = lines[0]
            details = lines[1:]
            if details:
                message += f": {'; '.join(details[:_MAX_SHOWN_PROBLEMS])}"
            if len(details) > _MAX_SHOWN_PROBLEMS:
                message += f"; and {len(details) - _MAX_SHOWN_PROBLEMS} more"
            if not message.endswith("."):
                message += "."
            trained_base = self.base_info.get("model")
            remedy = ""
            if trained_base == name:
                remedy = (
                    f" The adapter states the base {name}. Copy the adapter's folder again, or "
                )
                remedy += "name another base with --model."
            elif "--allow-base-mismatch" not in message:
                base_name = f" ({trained_base})" if trained_base else ""
                remedy = f" The base here is {name}. Name the base that the adapter was trained on"
                remedy += f"{base_name} with --model."
            raise UserError(f"{self.option}: {message}{remedy}") from error


def find_adapter(name: str, option: str = "--adapter") -> AdapterSource:
    """Returns the adapter in a folder of a run, of this library or of PEFT.

    An unfinished run has no final adapter yet, but may have a best one.

    Args:
      name: the folder, or the hub name of a PEFT adapter.
      option: the option that names it.

    Raises:
      UserError: there is no adapter; the message says where one may be.
    """
    option_text = f"{option} {name}"
    with as_user_errors(BucketError, prefix=f"{option} "):
        folder = path_to_read(name, _is_outside_checkpoints).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f"{option_text}: There is no such folder. Check the path.")
        # A name of the form owner/name may be a PEFT adapter on the hub.
        with as_user_errors(ValueError, prefix=f"{option_text}: There is no such folder, and "):
            return AdapterSource(option_text, find_adapter_folder(name, None), is_peft=True)
    if not folder.is_dir():
        raise UserError(
            f"{option_text} is a file, but an adapter is a folder. Name the folder that holds it."
        )
    for candidate in (folder, folder / ADAPTER, *_newest_best_adapter(folder)):
        if (candidate / PEFT_CONFIG).is_file():
            return AdapterSource(option_text, candidate, is_peft=True)
        if (candidate / _OUR_WEIGHTS).is_dir():
            return AdapterSource(option_text, candidate, is_peft=False)
    # There is no adapter. The message depends on what the folder holds.
    if all((folder / name).exists() for name in _RUN_FILES):
        raise UserError(
            f"{option_text} is the folder of a run that has no adapter yet. Wait until the run "
            "ends, or continue a stopped run with --resume."
        )
    if (folder / PEFT_WEIGHTS).is_file():
        raise UserError(
            f"{option_text} has {PEFT_WEIGHTS}, but {PEFT_CONFIG} is missing, which states the "
            "adapter's rank and scale. Copy that file, too."
        )
    subfolders = sorted({path.parent for path in folder.glob(f"*/{PEFT_CONFIG}")})
    subfolders += sorted({path.parent for path in folder.glob(f"*/{ADAPTER}/{_OUR_WEIGHTS}")})
    remedy = f"Did you mean {subfolders[0]}?" if subfolders else "Check the path."
    raise UserError(
        f"{option_text} holds no adapter: it is neither the folder of a run nor of an adapter (of "
        f"lora_jax, or of PEFT with {PEFT_CONFIG}). {remedy}"
    )


def _is_outside_checkpoints(file: str) -> bool:
    """Returns True for a file outside a run's checkpoints, which hold no loadable adapter."""
    return "checkpoints" not in file.split("/")


def _newest_best_adapter(folder: Path) -> list[Path]:
    """Returns the newest best adapter (--keep-best) of a run in a list; [] if there is none.

    Args:
      folder: the folder of a run, or its folder of best adapters; see `training.run.best`.
    """
    best_folder = folder / BEST
    # A run may have the name of this folder, too.
    if folder.name == BEST and not best_folder.is_dir():
        best_folder = folder
    step_folders = [path for path in best_folder.glob("*") if path.name.isdecimal()]
    return sorted(step_folders, key=lambda path: int(path.name))[-1:]


def prepare_to_run(model: Model, tree: Tree) -> tuple[Forward, Tree]:
    """Returns a function with the arguments of ``model.apply``, and parameters for it.

    The adapter is merged into the parameters where possible. The function is the adapted one over a
    quantized base, which stays quantized, and for an adapter that cannot be merged: one with a bias
    on B, or one for a single use of a tied table.
    """
    try:
        return model.apply, merge_adapter(tree)
    except UserError:
        return lj.adapt(model.apply), tree


def merge_adapter(tree: Tree) -> Tree:
    """Returns the plain tree with an adapter's update added to its kernels.

    Raises:
      UserError: the base is quantized, or the adapter cannot be merged; the message says why.
    """
    base_leaves = jax.tree.leaves(lj.strip(tree), is_leaf=is_coded)
    if any(is_coded(leaf) for leaf in base_leaves):
        raise UserError(
            "the base is quantized and stays quantized. Write a merged model with "
            "`train.export --merged`."
        )
    with as_user_errors(ValueError):
        return lj.merge(tree)
