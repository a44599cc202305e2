"""The adapter that an option names: a run's, one that `lora_jax.save_adapter` wrote, or PEFT's."""

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
from lora_jax.buckets.copies import readable
from lora_jax.buckets.store import BucketError
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.folders import TEMPLATE_FILE
from lora_jax.hf.coded import QUANTIZE_NONE
from lora_jax.hf.hub import name_on_other_machines
from lora_jax.hf.vision.readers import reads_images
from lora_jax.lorafy import nodes_of
from lora_jax.models.families import IMAGES, reading_options
from lora_jax.peft.config import FILE as PEFT_CONFIG
from lora_jax.peft.config import fields_of, read_config
from lora_jax.peft.contents import contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.load import adapter_folder, read_names, read_tensors
from lora_jax.peft.names import FILE as PEFT_WEIGHTS
from lora_jax.peft.names import PREFIX
from lora_jax.quantized import is_coded
from lora_jax.training.run.best import BEST
from train.console.errors import UserError, as_user_errors

ADAPTER = "adapter"  # its folder in that of a run
_OURS = "lora"  # an item of `lora_jax.save_adapter`
_OF_RUN = ("config.yaml", "checkpoints")  # what a run's folder holds before its adapter
_CLASSES = re.compile(re.escape(PREFIX) + r"classifier(\.out_proj)?\.weight")
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_SHOWN = 3  # problems of a file that a message names


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """An adapter's folder, of this library or of PEFT.

    Attributes:
      given: the option that names it, for messages: "--adapter runs/sql".
      folder: the folder.
      from_peft: whether PEFT's files are in it.
    """

    given: str
    folder: Path
    from_peft: bool

    @property
    def about(self) -> dict[str, Any]:
        """The facts that the adapter states about its base: its "model", "labels" of a classifier.

        Raises:
          UserError: they cannot be read.
        """
        with self._readable():
            if not self.from_peft:
                return lj.adapter_info(self.folder)
            name = fields_of(self.folder)[0].get("base_model_name_or_path")
        return {"model": name} if name else {}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of RoPE that the adapter was trained with; see --rope-scaling."""
        return None if self.from_peft else self.about.get("rope_scaling")

    @property
    def chat_template(self) -> Path | None:
        """The file of the chat template that the adapter was trained with, if it has one."""
        file = self.folder / TEMPLATE_FILE
        return file if file.is_file() else None

    @property
    def tokenizer(self) -> str | None:
        """The --tokenizer that the adapter was trained with; None for its base's own.

        Raises:
          UserError: it was in a folder that is not on this machine.
        """
        return self.find_tokenizer("name it with --tokenizer")

    @property
    def quantize(self) -> str | None:
        """The --quantize of the base that the adapter was trained on; None if its files said it."""
        return None if self.from_peft else self.about.get("quantize")

    @property
    def model_code(self) -> str | None:
        """The code that the base ran by in training; None if its model_type said it."""
        return None if self.from_peft else self.about.get("model_code")

    @property
    def images(self) -> bool:
        """True where the adapter was trained on a model with its encoder of images."""
        return self._has_names(".visual.") if self.from_peft else bool(self.about.get(IMAGES))

    @property
    def names_whole_model(self) -> bool:
        """True for `images`, and where PEFT adapted the text alone of a model that has both.

        PEFT merges such an adapter into the whole model. Where nothing is merged it goes with both.
        """
        return self.images or self.from_peft and self._has_names(".language_model.")

    @property
    def codes(self) -> str | None:
        """The codes of the base that the adapter was trained on; None for arrays."""
        return None if self.quantize == QUANTIZE_NONE else self.quantize

    @property
    def is_subspace(self) -> bool:
        """True where a subspace was trained, by --intrinsic, rather than an adapter."""
        return not self.from_peft and subspace.FACTS in self.about

    @property
    def num_labels(self) -> int | None:
        """The number of a classifier's classes; None for other adapters.

        Raises:
          UserError: the files cannot be read.
        """
        if not self.from_peft:
            return len(self.about.get("labels", ())) or None
        with self._readable():
            tensors = read_tensors(self.folder / PEFT_WEIGHTS)
        for name, tensor in tensors.items():
            if _CLASSES.fullmatch(name):
                return len(tensor)
        return None

    def find_tokenizer(self, remedy: str) -> str | None:
        """Returns the name of the tokenizer that the adapter was trained with; None if unknown.

        Args:
          remedy: says what to do about a folder that is not on this machine.

        Raises:
          UserError: as `tokenizer` does.
        """
        name: str | None = None if self.from_peft else self.about.get("tokenizer")
        if name and Path(name).is_absolute() and not Path(name).exists():
            raise UserError(
                f"{self.given} was trained with the tokenizer in {name}, which does not exist "
                f"here: {remedy}"
            )
        return name

    def base(self) -> str:
        """Returns the name of the base that the adapter states.

        Raises:
          UserError: it states none, or a folder that is not on this machine.
        """
        name = self.about.get("model")
        if not name:
            raise UserError(f"{self.given} does not say what its base is: name it with --model")
        if name.startswith(("/", ".", "~")) and not Path(name).expanduser().exists():
            raise UserError(
                f"{self.given}: its base was in {name}, which does not exist here: name the base "
                "with --model"
            )
        return name

    def check_files(self) -> None:
        """Raises a UserError if the files cannot be read, or use an unsupported feature."""
        if not self.from_peft:
            _ = self.about
            return
        instead = ". PEFT itself can merge such an adapter into its base (merge_and_unload, then "
        instead += "save_pretrained): give that folder with --model"
        with self._readable(instead):
            read_config(self.folder)
        with self._weights_readable():
            read_tensors(self.folder / PEFT_WEIGHTS)

    def _has_names(self, part: str) -> bool:
        """Returns True if the name of one of PEFT's tensors has this part."""
        with self._weights_readable():
            return any(part in name for name in read_names(self.folder / PEFT_WEIGHTS))

    def _weights_readable(self) -> AbstractContextManager[None]:
        """Turns errors of PEFT's weights within into UserErrors."""
        anew = ". Copy the folder anew, or save the adapter again, "
        anew += "save_pretrained(…, safe_serialization=True)"
        return self._readable(anew)

    def _readable(self, remedy: str = "") -> AbstractContextManager[None]:
        """Turns errors of its files within into UserErrors."""
        return as_user_errors(ValueError, prefix=f"{self.given}: ", suffix=remedy)

    def check(self, outline: Any, *, allow_base_mismatch: bool = False) -> None:
        """Checks the adapter against a model without reading the model's weights.

        Args:
          outline: the model's outline; see `train.run.pretrained`.
          allow_base_mismatch: accept a base of another name.

        Raises:
          UserError: the adapter is of another base, or of a model without the head in question.
        """
        self.check_files()
        if not allow_base_mismatch:
            self._check_name(outline.name)
        with self._fits(outline.name, outline.config):
            if self.is_subspace:
                space, _ = subspace.load(self.folder, outline.params, allow_base_mismatch=True)
                return self._check_head(outline, {tensor.path for tensor in space.tensors})
        tree = self.abstract_tree(outline)
        self._check_head(outline, set(nodes_of(tree)))

    def load(
        self, model: Any, params: Tree, name: str, *, allow_base_mismatch: bool = False
    ) -> Tree:
        """Returns a model's tree with the adapter, or the plain tree that a subspace has moved.

        Args:
          model, params: the model and its parameters.
          name: the model's name, for messages.
          allow_base_mismatch: accept another base.

        Raises:
          UserError: the adapter is damaged, or of another base.
        """
        with self._fits(name, model.config):
            if self.is_subspace:
                mismatch = allow_base_mismatch
                space, theta = subspace.load(self.folder, params, allow_base_mismatch=mismatch)
                return jax.jit(space.params_of)(theta, params)
            if self.from_peft:
                return lp.load(self.folder, model, params)
            return lj.load_adapter(self.folder, params, allow_base_mismatch=allow_base_mismatch)

    def abstract_tree(self, outline: Any) -> Tree:
        """Returns the tree of `load` over a model without its weights, whatever its base is."""
        return self.load(outline, outline.params, outline.name, allow_base_mismatch=True)

    def fits_peft(self, outline: Any) -> bool:
        """Returns True if files of PEFT can hold the adapter, over a model without its weights.

        A form whose arrays are made of the base (LoRA-XS, TinyLoRA) is taken to be held.
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
            contents(outline, tree, embedding_layers=False)
        except PeftError:
            return False
        return True

    def _check_name(self, name: str) -> None:
        """Compares names of PEFT's adapters, which have no fingerprint of their base."""
        trained_base = self.about.get("model") if self.from_peft else None
        if not trained_base:
            return
        trained_name = name_on_other_machines(trained_base)
        model_name = name_on_other_machines(name)
        if trained_name is None or model_name is None:  # a folder, whose name says nothing
            return
        is_hub_name = trained_name.count("/") == 1
        if is_hub_name and trained_name != model_name:
            raise UserError(
                f"{self.given} was trained on {trained_name}, and --model is {model_name}: leave "
                "out --model, or accept this base with --allow-base-mismatch"
            )

    def _check_head(self, outline: Any, adapter_paths: set[str]) -> None:
        """Raises a UserError if neither base nor adapter holds a part of the model, such as a head.

        This library's adapters store a fingerprint of their base. It covers a freshly initialised
        part, too, unless the adapter trains it.
        """
        for path in outline.absent:
            is_needed = self.from_peft or outline.kinds[path] == "classifier"
            if is_needed and path not in adapter_paths:
                raise UserError(
                    f"{self.given} holds no {path}, and neither does --model {outline.name}: both "
                    "together are not a classifier. An adapter of a classifier (in PEFT one of the "
                    "task type SEQ_CLS), or a base with a head, is needed"
                )

    def _images_differ(self, name: str, config: Any) -> str:
        """Says that images were read in training or are read here, and not both; "" otherwise."""
        if self.images and not reads_images(config):
            return (
                f"was trained on {name} with its images, and only texts are read here: train.sft, "
                "train.generate and train.export take it"
            )
        if reading_options(config) and not self.images and not self.from_peft:
            return (
                f"was trained on the text of {name} alone, and here images are read: PEFT's files "
                "of it, which train.export writes, fit both"
            )
        return ""

    @contextmanager
    def _fits(self, name: str, config: Any) -> Iterator[None]:
        """Turns errors within into a UserError of one paragraph."""
        try:
            yield
        except ValueError as error:
            image_problem = self._images_differ(name, config)
            if image_problem:
                raise UserError(f"{self.given} {image_problem}") from error
            lines = [line.strip() for line in str(error).splitlines()]
            message = lines[0]
            details = lines[1:]
            if details:
                message += f": {'; '.join(details[:_SHOWN])}"
            if len(details) > _SHOWN:
                message += f"; and {len(details) - _SHOWN} more"
            trained_base = self.about.get("model")
            remedy = ""
            if trained_base == name:
                remedy = f". It says that its base is {name}: copy its folder again, or name "
                remedy += "another base with --model"
            elif "--allow-base-mismatch" not in message:
                base_name = f" ({trained_base})" if trained_base else ""
                remedy = f". The base here is {name}: name the one that it was trained on"
                remedy += f"{base_name} with --model"
            raise UserError(f"{self.given}: {message}{remedy}") from error


def find_adapter(name: str, option: str = "--adapter") -> AdapterSource:
    """Returns the adapter in a folder: that of a run, of an adapter, or of PEFT's files.

    An unfinished run has no adapter yet, but may have a best one.

    Args:
      name: the folder, or the hub name of a PEFT adapter.
      option: the option that names it.

    Raises:
      UserError: there is no adapter; the message says where one may be.
    """
    given = f"{option} {name}"
    with as_user_errors(BucketError, prefix=f"{option} "):
        folder = readable(name, _is_no_state).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f"{given}: there is no such folder")
        with as_user_errors(ValueError, prefix=f"{given}: there is no such folder, and "):
            return AdapterSource(given, adapter_folder(name, None), from_peft=True)
    if not folder.is_dir():
        raise UserError(f"{given} is a file: an adapter is a folder; name the one that holds it")
    for place in (folder, folder / ADAPTER, *_best_in(folder)):
        if (place / PEFT_CONFIG).is_file():
            return AdapterSource(given, place, from_peft=True)
        if (place / _OURS).is_dir():
            return AdapterSource(given, place, from_peft=False)
    if all((folder / name).exists() for name in _OF_RUN):
        raise UserError(
            f"{given} is the folder of a run that has no adapter yet: end the run, with --resume "
            "if it was stopped"
        )
    if (folder / PEFT_WEIGHTS).is_file():
        raise UserError(
            f"{given} has {PEFT_WEIGHTS}, and {PEFT_CONFIG} is missing, without which its rank "
            "and scale are not known: copy that file, too"
        )
    inside = sorted({path.parent for path in folder.glob(f"*/{PEFT_CONFIG}")})
    inside += sorted({path.parent for path in folder.glob(f"*/{ADAPTER}/{_OURS}")})
    where = f": did you mean {inside[0]}?" if inside else ""
    raise UserError(
        f"{given} is neither an adapter's folder (of this library or of PEFT, {PEFT_CONFIG}) nor a "
        f"run's{where}"
    )


def _is_no_state(file: str) -> bool:
    """Returns False for a file of a run's checkpoints, which hold no adapter to load."""
    return "checkpoints" not in file.split("/")


def _best_in(folder: Path) -> list[Path]:
    """Returns the newest of the best adapters that a run keeps; see `training.run.best`."""
    inner = folder / BEST
    best = folder if folder.name == BEST and not inner.is_dir() else inner  # a run may be named so
    steps = [path for path in best.glob("*") if path.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.name))[-1:]


def runnable(model: Model, tree: Tree) -> tuple[Forward, Tree]:
    """Returns a function with the arguments of ``model.apply``, and parameters for it.

    The parameters are merged. Over a base in codes, which stays so, and where an adapter cannot be
    merged (a bias on B, or an adapter for one use of a tied table), the function is the adapted
    one.
    """
    try:
        return model.apply, merged(tree)
    except UserError:
        return lj.adapt(model.apply), tree


def merged(tree: Tree) -> Tree:
    """Returns the plain tree with an adapter's update added to its kernels.

    Raises:
      UserError: the base is in codes, or the adapter cannot be merged; the message says why.
    """
    if any(map(is_coded, jax.tree.leaves(lj.strip(tree), is_leaf=is_coded))):
        raise UserError(
            "the base is in codes, and stays so (`train.export --merged` writes a merged model)"
        )
    with as_user_errors(ValueError):
        return lj.merge(tree)
