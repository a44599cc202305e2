"""Lists the modules of a PyTorch model by its key table, and selects those that PEFT adapts."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lora_jax.core.types import Fields, Model
from lora_jax.hf.keys import Kind, Row
from lora_jax.models.families import FAMILIES, key_table
from lora_jax.peft.errors import PeftError
from lora_jax.peft.patterns import fullmatch, match

# The names of modules in transformers, by kind, for a table without kinds.
_NAMES_OF_KIND: dict[Kind, re.Pattern[str]] = {
    "head": re.compile(r"lm_head|cls\.predictions\.decoder|lm_head\.decoder|embed_out"),
    "classifier": re.compile(r"(score|classifier)(\..*)?"),
    "experts": re.compile(r"(.*\.)(mlp|block_sparse_moe)\.experts\.\d+\..*"),
    "router": re.compile(r"(.*\.)(mlp|block_sparse_moe)\.gate"),
}

# PEFT ties adapters and saves base weights only for layers with these names.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer or an embedding: its PyTorch name, and the place of its weight in our tree.

    Attributes:
      name: the dotted name, with the layer's number.
      path: the path of our kernel or table.
      index: the index of the weight in the stack at `path`; () without a stack.
      kind: the part of the model that the module is; see `Row`.
      uses: "all", or one use of a tied table: "lookup" or "product".
      is_parameter: True if target_parameters names the weight, and not target_modules the module.
    """

    name: str
    path: str
    index: tuple[int, ...]
    kind: Kind | None
    uses: str = "all"
    is_parameter: bool = False

    @property
    def name_for_patterns(self) -> str:
        """The name that rank_pattern and alpha_pattern are matched with."""
        return f"{self.name}.weight" if self.is_parameter else self.name

    @property
    def is_embedding(self) -> bool:
        """True for an embedding table."""
        return self.kind in ("embedding", "positions")

    @property
    def is_table(self) -> bool:
        """True for an embedding table, and for a head that is tied to one."""
        return self.is_embedding or self.uses == "product"


def tables_by_names(model: Model) -> list[Sequence[Row]]:
    """Returns a model's key table for each naming scheme that PEFT's files may use.

    The first tables have the names of transformers 5 and 4. The text of a model with images has two
    more tables: with the names in that model, of today and of transformers before 4.52. The whole
    model with images has one more, with the names in its text alone. The last tables have the names
    in a bare model (transformers' AutoModel), without "model.".

    Raises:
      PeftError: see `check_key_table`.
    """
    table = check_key_table(model)
    if any(row.in_module for row in table):
        # transformers 4 and 5 name the modules of this model differently.
        new_table = [
            dataclasses.replace(row, hf=row.in_module or row.hf, in_module=None) for row in table
        ]
        return [new_table, table]
    config = getattr(model, "config", None)
    family = getattr(config, "family", None)
    image_model_type = getattr(family, "with_images", None)
    tables = [table]
    if image_model_type is not None:
        # The text model is a part of a model with images, which names its modules otherwise.
        if getattr(config, "model_type", None) == image_model_type:
            tables.append(_rename_rows(table, r"^model\.language_model\.", "model."))
        else:
            tables.append(_rename_rows(table, r"^model\.", "model.language_model."))
            tables.append(_rename_rows(table, r"^model\.", "language_model.model."))
    # transformers' AutoModel is the model without its head, and without this prefix.
    bare_tables = [_rename_rows(table, r"^(model|transformer)\.", "") for table in tables]
    return [*tables, *bare_tables]


def _rename_rows(table: Sequence[Row], pattern: str, replacement: str) -> list[Row]:
    """Returns a table whose Hugging Face names start with another prefix."""
    return [dataclasses.replace(row, hf=re.sub(pattern, replacement, row.hf)) for row in table]


def check_key_table(model: Model) -> Sequence[Row]:
    """Returns the key table of one of our models, or the given table.

    Raises:
      PeftError: for anything else.
    """
    if isinstance(model, Sequence) and all(isinstance(row, Row) for row in model):
        return model
    config = getattr(model, "config", None)
    if config is None:
        raise PeftError(
            f"The model is a {type(model).__name__}. Pass a model of lora_jax.models, or, for "
            "another tree, its key table, a list of lora_jax.models.Row."
        )
    return key_table(config)


def locate_tensors(table: Iterable[Row]) -> dict[str, tuple[Row, tuple[int, ...]]]:
    """Returns the row of each PyTorch tensor, and its index in the row's stack."""
    return {
        name: (row, index)
        for row in table
        for index, name in zip(row.members, row.hf_names, strict=True)
    }


def list_modules(
    table: Sequence[Row], *, experts: bool = False, tied: bool = False
) -> list[Module]:
    """Lists the modules that PEFT could adapt, in the order of the table.

    Args:
      table: the model's key table.
      experts: True if experts and routers are modules of their own, as they were up to
        transformers 4.
      tied: True if the two uses of a tied table share their adapter (PEFT's ensure_weight_tying).
    """
    listed = []
    for row in table:
        kind = kind_of(row)
        if not _is_module_weight(row) or (kind in ("experts", "router") and not experts):
            continue
        heads = [alias for alias in row.aliases if alias.endswith(".weight")]
        is_split = kind == "embedding" and not tied
        for index, name in zip(row.members, row.hf_names, strict=True):
            module = Module(
                name=name.removesuffix(".weight"),
                path=row.path,
                index=index,
                kind=kind,
                uses="lookup" if heads and is_split else "all",
            )
            listed.append(module)
        if is_split:
            for head in heads:
                name = head.removesuffix(".weight")
                module = Module(name=name, path=row.path, index=(), kind="head", uses="product")
                listed.append(module)
    return listed


def sort_modules(modules: Iterable[Module]) -> list[Module]:
    """Sorts modules as torch lists them: all modules of a block together."""
    # The rank of each child of a parent, in the order of their first use.
    ranks_by_parent: dict[str, dict[str, int]] = {}

    def sort_key(module: Module) -> list[int]:
        """Returns the position of each segment of a name among its siblings."""
        names = module.name.split(".")
        key = []
        for depth, name in enumerate(names):
            sibling_ranks = ranks_by_parent.setdefault(".".join(names[:depth]), {})
            if name.isdigit():
                key.append(int(name))
            else:
                key.append(sibling_ranks.setdefault(name, len(sibling_ranks)))
        return key

    return sorted(modules, key=sort_key)


def ties_tables(config: Fields) -> bool:
    """Returns True if PEFT ties the adapter, or the saved copy, of a tied table's two uses.

    Source: PEFT's ``_check_tied_modules``, which goes by names.
    """
    targets = config["target_modules"] or ()
    if isinstance(targets, str):
        targets = [name for name in EMBEDDING_NAMES if fullmatch("target_modules", targets, name)]
    saved = config["modules_to_save"] or ()
    last_names = {name.split(".")[-1] for name in (*targets, *saved)}
    return bool(config["ensure_weight_tying"]) and bool(last_names & {*EMBEDDING_NAMES})


def kind_of(row: Row) -> Kind | None:
    """Returns the kind of a row, or the kind that its names suggest."""
    if row.kind is not None:
        return row.kind
    if row.path.rsplit("/", 1)[-1] == "embedding":
        return "embedding"
    name = row.hf.replace("{}", "0").removesuffix(".weight")
    for kind, pattern in _NAMES_OF_KIND.items():
        if pattern.fullmatch(name):
            return kind
    return None


def _is_module_weight(row: Row) -> bool:
    """Returns True if a row is the weight of a linear layer or an embedding."""
    if not row.hf.endswith(".weight"):
        return False
    if row.kind is not None:
        return len(row.shape) == 2
    return row.path.rsplit("/", 1)[-1] in ("kernel", "embedding", "w")


def select_modules(
    config: Fields, available: Sequence[Module], model_type: str | None
) -> list[Module]:
    """Lists the modules that PEFT would adapt, in order.

    Args:
      config: the fields of a PEFT configuration.
      available: the modules to choose from.
      model_type: Hugging Face's name of the family, for PEFT's default targets.

    Raises:
      PeftError: if none is selected.

    Source: PEFT's ``check_target_module_exists``.
    """
    targets = config["target_modules"]
    if not targets and config["target_parameters"]:  # PEFT writes null or [], both for none
        return []
    if targets is None:
        family = FAMILIES.get(model_type or "")
        if family is None or family.default_targets is None:
            raise PeftError(
                f"target_modules is not set, and PEFT has no default for {model_type}. Set "
                "target_modules."
            )
        targets = list(family.default_targets)
    chosen = [module for module in available if _is_targeted(module, targets, config)]
    if not chosen:
        raise PeftError(
            f"target_modules={config['target_modules']!r} matches none of the model's "
            f"{len(available)} modules, such as {', '.join(m.name for m in available[:3])}. "
            "Correct target_modules, or use the model that the adapter was made for."
        )
    return chosen


def _is_targeted(module: Module, targets: str | list[str], config: Fields) -> bool:
    """Returns True if a configuration's targets, exclusions and layers select a module."""
    name = module.name
    if _is_excluded(name, config):
        return False
    # A text is "all-linear" or a pattern of whole names; a list has names or their ends.
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            if module.kind == "classifier":
                return bool(config["task_type"] != "SEQ_CLS")
            return module.kind not in ("embedding", "positions", "head")
        return fullmatch("target_modules", targets, name)
    return name in targets or (ends_with(name, targets) and _is_chosen_layer(name, config))


def _is_excluded(name: str, config: Fields) -> bool:
    """Returns True if exclude_modules or modules_to_save names a module or a parent of it."""
    exclude = config["exclude_modules"]
    if isinstance(exclude, str) and exclude and fullmatch("exclude_modules", exclude, name):
        return True
    if isinstance(exclude, list) and (name in exclude or ends_with(name, exclude)):
        return True
    saved = config["modules_to_save"] or ()
    form = r"(^|.*\.){}($|\..*)"
    return any(match("modules_to_save", module, name, form) for module in saved)


def _is_chosen_layer(name: str, config: Fields) -> bool:
    """Returns True if layers_to_transform contains a module's layer or is not set."""
    layers = config["layers_to_transform"]
    if layers is None or layers == []:
        return True
    patterns = config["layers_pattern"]
    indices = [layers] if isinstance(layers, int) else layers
    if not patterns:
        number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return number is not None and int(number[1]) in indices
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        number = match("layers_pattern", pattern, name, form=r"(?:^|.*?\.){}\.(\d+)\.")
        if number:
            layer = number[1] or ""  # the pattern's own first group, if it has one, as in PEFT
            return layer.isdecimal() and int(layer) in indices
    return False


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Returns True if a dotted name ends with one of some dotted names."""
    return any(name.endswith(f".{end}") for end in ends)


def rank_and_alpha(config: Fields, name: str) -> tuple[int, float]:
    """Returns the r and the lora_alpha of a module."""
    rank: int = pattern_value(config, "rank_pattern", name, config["r"])
    return rank, pattern_value(config, "alpha_pattern", name, config["lora_alpha"])


def pattern_value(config: Fields, field: str, name: str, default: _Value) -> _Value:
    """Returns the value of the first pattern that matches a name, or the default.

    Args:
      config: the fields of a PEFT configuration.
      field: "rank_pattern" or "alpha_pattern".
      name: the name of a module.
      default: the value without a pattern.
    """
    patterns: Mapping[str, _Value] = config.get(field) or {}
    for pattern, value in patterns.items():
        if match(field, pattern, name, form=r"(.*\.)?({})$"):
            return value
    return default


def module_name(name: str) -> str:
    """Returns the name of a tensor's module."""
    return name.rpartition(".")[0]
