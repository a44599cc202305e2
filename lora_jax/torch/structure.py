"""The parameters of a torch module as the rows of a key table, and the stacks of its layers."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jax.sharding import PartitionSpec

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.specs import COLUMNS, EXPERT_COLUMNS, REPLICATED, ROWS

_MIXES = re.compile(r"attn|attention|mixer|mamba|ssm|conv|rwkv|recurrent|temporal_block")
_EXPANDS = re.compile(
    r"(q|k|v|qkv|in|gate|up|gate_up|query|key|value|w1|w3|fc1|fc_in|c_fc|c_attn)(_proj)?"
)
_CONTRACTS = re.compile(r"(o|out|down|dense|c|w2|wo|fc2|fc_out|dense_4h_to_h)(_proj)?")


@dataclasses.dataclass(frozen=True)
class LayerPeriods:
    """Layers of a ModuleList that one scan runs: those from `start` on, `period` of them a step.

    Attributes:
      name: the list's dotted name.
      start: the number of layers before them, each of its own kind.
      period: the number of kinds, which take turns.
      repeats: the number of turns.
    """

    name: str
    start: int
    period: int
    repeats: int

    @property
    def n_layers(self) -> int:
        """The number of layers that are left of the list: those before, and one of each kind."""
        return self.start + self.period

    def place(self, kind: int) -> str:
        """Returns the name of a kind of layers in paths; "" where there is a single one."""
        if self.start:
            return f"{kind}of{self.period}from{self.start}"
        return f"{kind}of{self.period}" if self.period > 1 else ""

    def numbers(self, kind: int) -> tuple[int, ...]:
        """Returns the numbers of the layers of a kind."""
        return tuple(self.start + kind + i * self.period for i in range(self.repeats))


class Place(NamedTuple):
    """The place of a tensor in a stack.

    Attributes:
      stack: the stack.
      kind: the number of its layer in the period.
      turn: the number of the period.
      name: its name within its layer.
    """

    stack: LayerPeriods
    kind: int
    turn: int
    name: str

    @property
    def all_names(self) -> list[str]:
        """The module's names of this tensor in all layers of the kind."""
        return [f"{self.stack.name}.{i}.{self.name}" for i in self.stack.numbers(self.kind)]


def place_of(name: str, stacks: Sequence[LayerPeriods]) -> Place | None:
    """Returns the place of a tensor; None if it belongs to no stack."""
    for stack in stacks:
        if match := re.fullmatch(rf"{re.escape(stack.name)}\.(\d+)\.(.+)", name):
            turn, kind = divmod(int(match[1]) - stack.start, stack.period)
            if turn >= 0:
                return Place(stack, kind, turn, match[2])
    return None


def rows_of(module: torch.nn.Module, stacks: Sequence[LayerPeriods] = ()) -> list[Row]:
    """Returns a row for each parameter of a module with all of its layers, for tied ones once.

    So, too, for buffers of floats that files hold. The first of a row's names is the module's own
    of the tensor, or of the first layer of its kind.

    Args:
      module: it may be on torch's meta device.
      stacks: the layers that are stacked.
    """
    heads = _heads(module)
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in _stored(module):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    rows: list[Row] = []
    for key, (name, *aliases) in names.items():
        place = place_of(name, stacks)
        if place is not None and place.turn > 0:
            continue  # the row of the first layer of its kind holds it
        rows.append(_row(module, name, tuple(aliases), tensors[key], place, heads))
    return rows


def _stored(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters, and buffers of floats that files hold, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        kept = leaf not in module.get_submodule(owner)._non_persistent_buffers_set
        if kept and buffer.is_floating_point():
            yield name, buffer


def _heads(module: torch.nn.Module) -> dict[str, Kind]:
    """Returns the kinds of the modules that turn tokens into vectors and back, by name."""
    kinds: dict[str, Kind] = {}
    getters: dict[Kind, str] = {
        "embedding": "get_input_embeddings",
        "head": "get_output_embeddings",
    }
    for kind, getter in getters.items():
        try:
            table = getattr(module, getter)()
        except (AttributeError, NotImplementedError):
            continue
        kinds |= {name: kind for name, submodule in module.named_modules() if submodule is table}
    return kinds


def _row(
    module: torch.nn.Module,
    name: str,
    aliases: tuple[str, ...],
    tensor: torch.Tensor,
    place: Place | None,
    heads: dict[str, Kind],
) -> Row:
    """Returns the row of a tensor.

    Args:
      module: the whole module.
      name: the module's name of the tensor, in the first layer of its kind.
      aliases: its other names.
      tensor: the tensor.
      place: its place in a stack; None outside of stacks.
      heads: the kinds of modules, from `_heads`.
    """
    owner_name, _, torch_leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    leaf = _leaf_name(owner, torch_leaf, tensor.ndim)
    shape = tuple(tensor.shape)
    transpose = leaf == "kernel" and isinstance(owner, torch.nn.Linear)
    if transpose:
        shape = shape[::-1]
    kind = _kind(owner_name, leaf, len(shape), heads)
    segments = owner_name.split(".")
    hf_name = name
    stack_fields: dict[str, Any] = {}
    if place is not None:
        stack = place.stack
        module_segments = place.name.split(".")[:-1]
        segments = [*stack.name.split("."), stack.place(place.kind), *module_segments]
        hf_name = f"{stack.name}.{{}}.{place.name}"
        stack_fields = {"stack": (stack.repeats,), "numbers": stack.numbers(place.kind)}
    return Row(
        path="/".join(segment for segment in (*segments, leaf) if segment),
        hf=hf_name,
        shape=shape,
        transpose=transpose,
        aliases=aliases,
        kind=kind,
        spec=_spec(owner_name, leaf, shape, kind),
        **stack_fields,
    )


def _leaf_name(owner: torch.nn.Module, torch_leaf: str, ndim: int) -> str:
    """Returns the last segment of a tensor's path: torch's own name, or Flax's for a weight."""
    if torch_leaf != "weight":
        return torch_leaf
    if ndim == 2 and isinstance(owner, torch.nn.Embedding):
        return "embedding"
    # transformers' Conv1D is a linear layer whose weight is [in, out], as GPT-2 has it.
    if ndim == 2 and (isinstance(owner, torch.nn.Linear) or type(owner).__name__ == "Conv1D"):
        return "kernel"
    return "scale" if "norm" in type(owner).__name__.lower() else torch_leaf


def _kind(owner: str, leaf: str, ndim: int, heads: dict[str, Kind]) -> Kind | None:
    """Returns the kind of a tensor of a module of that name; None for one of no known kind."""
    if owner in heads:
        return heads[owner]
    module_name = owner.rsplit(".", 1)[-1]
    if leaf == "embedding":
        return "positions"
    if leaf == "scale" or "norm" in module_name:
        return "norm"
    is_one_expert = leaf == "kernel" and re.search(r"(^|\.)experts\.\d+\.", owner)
    if is_one_expert or (ndim == 3 and re.search(r"(^|\.)experts(\.|$)", owner)):
        return "experts"
    if module_name in ("gate", "router"):
        return "router"
    if leaf not in ("kernel", "bias"):
        return None
    return "attention" if _MIXES.search(owner.rsplit(".layers.", 1)[-1]) else "mlp"


def _spec(owner: str, leaf: str, shape: tuple[int, ...], kind: Kind | None) -> PartitionSpec:
    """Returns the sharding of a parameter: by its name, and by its shape where that says nothing.

    A kernel that narrows, or whose name is that of a block's last product, is sharded over its in
    axis, and others over their out axis.
    """
    if leaf == "embedding":
        return ROWS
    if len(shape) == 3 and kind == "experts":
        return EXPERT_COLUMNS
    if leaf != "kernel" or len(shape) != 2:
        return REPLICATED
    name = owner.rsplit(".", 1)[-1]
    if kind == "head" or _EXPANDS.fullmatch(name):
        return COLUMNS
    return ROWS if shape[0] > shape[1] or _CONTRACTS.fullmatch(name) else COLUMNS


def plan_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a line for each sharding: the axes of the mesh, and the modules that have it."""
    by_spec: dict[Any, list[str]] = {}
    for row in rows:
        by_spec.setdefault(row.spec, []).append("/".join(row.path.split("/")[-2:]))
    for spec, names in by_spec.items():
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else str(a) for a in spec)
        yield f"{axes or 'replicated'}: {', '.join(dict.fromkeys(names))}"
