"""The key table of a torch module's parameters, and the tensors of its stacked layers."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jax.sharding import PartitionSpec

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.specs import COLUMNS, EXPERT_COLUMNS, EXPERT_ROWS, REPLICATED, ROWS

_ATTENTION_NAMES = re.compile(r"attn|attention|mixer|mamba|ssm|conv|rwkv|recurrent|temporal_block")
_EXPANDING_NAMES = re.compile(
    r"(q|k|v|qkv|in|gate|up|gate_up|query|key|value|w1|w3|fc1|fc_in|c_fc|c_attn)(_proj)?"
)
_CONTRACTING_NAMES = re.compile(r"(o|out|down|dense|c|w2|wo|fc2|fc_out|dense_4h_to_h)(_proj)?")
_EXPERT_KERNELS = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' ExpertsInterface


@dataclasses.dataclass(frozen=True)
class LayerPeriods:
    """The layers of a ModuleList that one scan runs, `period` layers per step.

    Attributes:
      name: the list's dotted name.
      start: the index of the scan's first layer in the list.
      period: the number of kinds of layers, which alternate.
      repeats: the number of the scan's steps.
      carried: tuple of argument indices for each kind. These arguments are the outputs of the
        previous layer, in the order of the outputs; see `LayerCall`.
    """

    name: str
    start: int
    period: int
    repeats: int
    carried: tuple[tuple[int, ...], ...] = ()

    @property
    def first_period(self) -> range:
        """The indices of the first layer of each kind."""
        return range(self.start, self.start + self.period)

    @property
    def end(self) -> int:
        """The index behind the scan's last layer."""
        return self.start + self.period * self.repeats

    def kind_name(self, kind: int) -> str:
        """Returns the name of a kind of layers in paths; "" if there is only one kind."""
        if self.start:
            return f"{kind}of{self.period}from{self.start}"
        if self.period > 1:
            return f"{kind}of{self.period}"
        return ""

    def layer_indices(self, kind: int) -> tuple[int, ...]:
        """Returns the indices of the layers of a kind in the list."""
        return tuple(self.start + kind + i * self.period for i in range(self.repeats))


class StackPosition(NamedTuple):
    """The position of a tensor in a stack of layers.

    Attributes:
      stack: the stack.
      kind: the index of the tensor's layer in its period.
      scan_step: the index of the period.
      name: the tensor's name within its layer.
    """

    stack: LayerPeriods
    kind: int
    scan_step: int
    name: str

    @property
    def names_in_all_layers(self) -> list[str]:
        """This tensor's module names in all layers of the kind."""
        return [f"{self.stack.name}.{i}.{self.name}" for i in self.stack.layer_indices(self.kind)]


def stack_position_of(name: str, stacks: Sequence[LayerPeriods]) -> StackPosition | None:
    """Returns the position of a tensor in its stack; None if it belongs to no stack."""
    for stack in stacks:
        match = re.fullmatch(rf"{re.escape(stack.name)}\.(\d+)\.(.+)", name)
        if match is not None:
            scan_step, kind = divmod(int(match[1]) - stack.start, stack.period)
            if 0 <= scan_step < stack.repeats:
                return StackPosition(stack=stack, kind=kind, scan_step=scan_step, name=match[2])
    return None


def make_key_rows(module: torch.nn.Module, stacks: Sequence[LayerPeriods] = ()) -> list[Row]:
    """Makes a row for each parameter and each saved float buffer of a module.

    Tied parameters get one row, and so do the layers of a kind in a stack. The first of a row's
    names is the module's name of the tensor, in the first layer of its kind.

    Args:
      module: a module with all of its layers, which may be on torch's meta device.
      stacks: the layers that are stacked.
    """
    kinds = _kinds_of_token_modules(module)
    # Modules that share a tensor have different names for the same object.
    names_by_id: dict[int, list[str]] = {}
    tensors_by_id: dict[int, torch.Tensor] = {}
    for name, tensor in _stored_tensors(module):
        names_by_id.setdefault(id(tensor), []).append(name)
        tensors_by_id[id(tensor)] = tensor
    rows: list[Row] = []
    for tensor_id, tensor in tensors_by_id.items():
        name = names_by_id[tensor_id][0]
        aliases = tuple(names_by_id[tensor_id][1:])
        position = stack_position_of(name, stacks)
        # One row stands for all layers of a kind. It is made for the first of these layers.
        if position is None or position.scan_step == 0:
            rows.append(_make_key_row(module, name, aliases, tensor, position, kinds))
    return rows


def _stored_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and saved float buffers, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner_name, _, buffer_name = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        is_saved = buffer_name not in owner._non_persistent_buffers_set
        if is_saved and buffer.is_floating_point():
            yield name, buffer


def _kinds_of_token_modules(module: torch.nn.Module) -> dict[str, Kind]:
    """Returns the kinds of the modules that embed tokens and compute logits, by module name."""
    kinds: dict[str, Kind] = {}
    getters: dict[Kind, str] = {
        "embedding": "get_input_embeddings",
        "head": "get_output_embeddings",
    }
    for kind, getter in getters.items():
        try:
            table = getattr(module, getter)()
        except (AttributeError, NotImplementedError):  # the module has no such part
            continue
        for name, submodule in module.named_modules():
            if submodule is table:
                kinds[name] = kind
    return kinds


def _make_key_row(
    module: torch.nn.Module,
    name: str,
    aliases: tuple[str, ...],
    tensor: torch.Tensor,
    position: StackPosition | None,
    kinds: dict[str, Kind],
) -> Row:
    """Makes the row of a tensor in the key table.

    Args:
      module: the whole module.
      name: the module's name of the tensor, in the first layer of its kind.
      aliases: the other names of a tied tensor.
      tensor: the tensor.
      position: the tensor's position in a stack; None outside of stacks.
      kinds: the kinds of modules, from `_kinds_of_token_modules`.
    """
    owner_name, _, torch_leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    leaf = _leaf_name(owner, torch_leaf, tensor.ndim)
    shape = tuple(tensor.shape)
    # Torch stores a linear layer's weight as [out, in], and the tree as [in, out].
    transpose = leaf == "kernel" and isinstance(owner, torch.nn.Linear)
    segments = owner_name.split(".")
    if is_expert_kernel(owner, torch_leaf, tensor.ndim):
        segments.append(torch_leaf)
        leaf = "kernel"
        transpose = not owner.is_transposed
    elif _is_router_kernel(owner, owner_name, torch_leaf, tensor.ndim):
        leaf = "kernel"
        transpose = True
    if transpose:
        shape = (*shape[:-2], shape[-1], shape[-2])
    kind = _kind_of_tensor(owner_name, leaf, len(shape), kinds)
    module_path = ".".join(segments)
    hf_name = name
    stack_fields: dict[str, Any] = {}
    if position is not None:
        # The path names the kind of layer in place of the layer's index.
        stack = position.stack
        n_list_segments = len(stack.name.split(".")) + 1  # of the list and the layer's index
        module_segments = segments[n_list_segments:]
        segments = [*stack.name.split("."), stack.kind_name(position.kind), *module_segments]
        hf_name = f"{stack.name}.{{}}.{position.name}"
        stack_fields = {
            "stack": (stack.repeats,),
            "numbers": stack.layer_indices(position.kind),
        }
    return Row(
        path="/".join(segment for segment in (*segments, leaf) if segment),
        hf=hf_name,
        shape=shape,
        transpose=transpose,
        aliases=aliases,
        kind=kind,
        spec=_sharding_of_tensor(module_path, leaf, shape, kind),
        **stack_fields,
    )


def is_expert_kernel(owner: torch.nn.Module, torch_leaf: str, ndim: int) -> bool:
    """Returns True for a kernel of experts that transformers' ExpertsInterface runs."""
    return ndim == 3 and torch_leaf in _EXPERT_KERNELS and hasattr(owner, "has_post_expert_norm")


def _is_router_kernel(owner: torch.nn.Module, owner_name: str, torch_leaf: str, ndim: int) -> bool:
    """Returns True for the kernel of a router that is no linear layer; its form is [out, in]."""
    is_router = owner_name.rsplit(".", 1)[-1] in ("gate", "router")
    is_layer = isinstance(owner, torch.nn.Linear | torch.nn.Embedding)
    has_router_class = "router" in type(owner).__name__.lower()
    return is_router and has_router_class and not is_layer and torch_leaf == "weight" and ndim == 2


def _leaf_name(owner: torch.nn.Module, torch_leaf: str, ndim: int) -> str:
    """Returns the last segment of a tensor's path: torch's name, or Flax's name for "weight"."""
    if torch_leaf != "weight":
        return torch_leaf
    if ndim == 2 and isinstance(owner, torch.nn.Embedding):
        return "embedding"
    # transformers' Conv1D (of GPT-2) is a linear layer whose weight is [in, out].
    if ndim == 2 and (isinstance(owner, torch.nn.Linear) or type(owner).__name__ == "Conv1D"):
        return "kernel"
    return "scale" if "norm" in type(owner).__name__.lower() else torch_leaf


def _kind_of_tensor(
    owner: str, leaf: str, ndim: int, kinds_of_token_modules: dict[str, Kind]
) -> Kind | None:
    """Returns the kind of a tensor of the module `owner`; None if its kind is not known."""
    if owner in kinds_of_token_modules:
        return kinds_of_token_modules[owner]
    module_name = owner.rsplit(".", 1)[-1]
    if leaf == "embedding":  # not of tokens, so of positions
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
    name_within_layer = owner.rsplit(".layers.", 1)[-1]
    return "attention" if _ATTENTION_NAMES.search(name_within_layer) else "mlp"


def _sharding_of_tensor(
    owner: str, leaf: str, shape: tuple[int, ...], kind: Kind | None
) -> PartitionSpec:
    """Returns the sharding of a parameter, by its name or else by its shape.

    A kernel is sharded over its in axis if it has fewer outputs than inputs, or if its name is that
    of a block's last product. Other kernels are sharded over their out axis.
    """
    if leaf == "embedding":
        return ROWS
    name = owner.rsplit(".", 1)[-1]
    if len(shape) == 3 and kind == "experts":
        return EXPERT_ROWS if name.endswith("down_proj") else EXPERT_COLUMNS
    if leaf != "kernel" or len(shape) != 2:
        return REPLICATED
    if kind == "head" or _EXPANDING_NAMES.fullmatch(name):
        return COLUMNS
    return ROWS if shape[0] > shape[1] or _CONTRACTING_NAMES.fullmatch(name) else COLUMNS


def sharding_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a line for each sharding, with the parameters that have it."""
    names_by_spec: dict[Any, list[str]] = {}
    for row in rows:
        short_name = "/".join(row.path.split("/")[-2:])
        names_by_spec.setdefault(row.spec, []).append(short_name)
    for spec, names in names_by_spec.items():
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else str(a) for a in spec)
        distinct_names = ", ".join(dict.fromkeys(names))
        yield f"{axes or 'replicated'}: {distinct_names}"
