"""Builds a torch module without weights, and calls it with JAX arrays as parameters."""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Tree
from lora_jax.hf.keys import Row
from lora_jax.models.layers.attention import dot_wide
from lora_jax.torch.attention import ATTENTION_NAME
from lora_jax.torch.backend import LOCK, call_jax, call_module, run_with_jax, to_torch
from lora_jax.torch.cache import OTHER_STATE, CachedCall
from lora_jax.torch.layers import (
    Recomputation,
    layer_lists,
    patch_forwards,
    run_as_scan,
    run_one_by_one,
    to_jax,
)
from lora_jax.torch.packages import TorchModelError
from lora_jax.torch.probe import (
    arrays_under,
    buffers_of,
    exchange_tensors,
    find_stacks,
    stack_buffers,
    without_caches,
)
from lora_jax.torch.recipe import Recipe
from lora_jax.torch.structure import LayerPeriods, make_key_rows

NO_HEAD = (
    "{name}: the module that computes its logits is not separate from the rest of the model, so "
    "lora_jax cannot call it alone. Use another model."
)
# Classes of modules that mix tokens by something other than attention.
_TOKEN_MIXERS = re.compile(
    r"Conv(?!1D$)|Mamba|SSM|Rwkv|Recurrent|DeltaNet|LinearAtt|Lightning|KDA|LSTM|Retention|"
    r"Compressor"
)
# A method of modules that compute positions from tokens: the first one follows that of padding.
_POSITIONS_METHOD = "create_position_ids_from_input_ids"


@dataclasses.dataclass(frozen=True, eq=False)
class EmptyModule:
    """A module without weights.

    Attributes:
      name: the name of the model in messages.
      module: the module, on torch's meta device. It has one layer of each kind of a stack.
      rows: the key table of parameters and saved buffers; see `make_key_rows`.
      stacks: the stacks of layers.
      lists: the names of all lists of layers, with the indices that layers had before those of
        stacks were removed.
      buffers: the other buffers, by name; those of layers of a kind are stacked, as parameters.
      reasons_against_stacks: the reason why a list is not stacked, by list; without the lists that
        were not compared.
    """

    name: str
    module: torch.nn.Module
    rows: Sequence[Row]
    stacks: Sequence[LayerPeriods]
    lists: Mapping[str, Sequence[int]]
    buffers: Mapping[str, np.ndarray]
    reasons_against_stacks: Mapping[str, str]

    def call(
        self,
        tree: Tree,
        args: Any,
        kwargs: Any,
        recomputed: Recomputation,
        cache: CachedCall | None = None,
    ) -> Any:
        """Calls the module.

        Args:
          tree: the parameters.
          args, kwargs: arguments, with JAX's arrays.
          recomputed: what the backward pass recomputes.
          cache: the tokens so far; None without a cache.

        Raises:
          TorchModelError: see `running`.
        """
        arrays = self._arrays(tree)
        transposed_rows = {
            self._kept_name(name): row
            for row in self.rows
            for name in (row.hf_names[0], *row.aliases)
            if row.transpose and row.stack
        }

        def layers(name: str, indices: Sequence[int]) -> tuple[list[torch.nn.Module], list[Any]]:
            modules = self.layers(name)
            new_indices = [self.lists[name].index(i) for i in indices]
            layer_arrays = [arrays_under(arrays, f"{name}.{i}.") for i in new_indices]
            return [modules[i] for i in new_indices], layer_arrays

        with run_with_jax(self.name), contextlib.ExitStack() as contexts:
            for stack in self.stacks:
                kinds, kind_arrays = layers(stack.name, stack.first_period)
                new_indices = map(self.lists[stack.name].index, stack.first_period)
                transposed = [
                    arrays_under(transposed_rows, f"{stack.name}.{i}.").keys() for i in new_indices
                ]
                contexts.enter_context(
                    run_as_scan(stack, kinds, kind_arrays, transposed, recomputed, cache)
                )
            # Other layers run one by one. Those that are neither recomputed nor placed need no
            # change: torch calls them.
            if recomputed.remat is not False or recomputed.placement.token_parts > 1:
                for name in self.lists:
                    modules, module_arrays = layers(name, self.single_layers(name))
                    contexts.enter_context(run_one_by_one(modules, module_arrays, recomputed))
            contexts.enter_context(without_caches(self.module))
            holds_new_tensors = contexts.enter_context(exchange_tensors(self.module))
            if cache is not None:
                kwargs = {**kwargs, "use_cache": True, self.cache_name: cache}
                kwargs["position_ids"] = cache.positions + self.first_position
            out = to_jax(call_module(self.module, arrays, args, kwargs))
            if cache is not None and holds_new_tensors():
                raise TorchModelError(OTHER_STATE)
            return out

    def _arrays(self, tree: Tree) -> dict[str, jax.Array]:
        """Returns a tree's arrays, and the buffers, by the module's own names.

        Kernels of stacks are not transposed, because that would dequantize whole stacks.
        """
        leaves = dict(flatten_with_paths(tree)[0])
        missing_paths = [row.path for row in self.rows if row.path not in leaves]
        if missing_paths:
            raise TorchModelError(
                f"{self.name}: the parameter tree has no {missing_paths[0]}. Pass the tree that "
                "from_torch returned, or an adapted tree of it."
            )
        arrays: dict[str, jax.Array] = {
            self._kept_name(n): jnp.asarray(b) for n, b in self.buffers.items()
        }
        for row in self.rows:
            array = leaves[row.path]
            if row.transpose and not row.stack:
                array = array.swapaxes(-1, -2)
            arrays |= dict.fromkeys(map(self._kept_name, (row.hf_names[0], *row.aliases)), array)
        return arrays

    def _kept_name(self, name: str) -> str:
        """Returns the name that a tensor has after layers of stacks were removed."""
        for list_name, indices in self.lists.items():
            match = re.fullmatch(rf"{re.escape(list_name)}\.(\d+)\.(.+)", name)
            if match is not None and int(match[1]) in indices:
                return f"{list_name}.{indices.index(int(match[1]))}.{match[2]}"
        return name

    def single_layers(self, name: str) -> list[int]:
        """Returns the indices of the layers of a list that are in no stack."""
        stacked = {
            i for stack in self.stacks if stack.name == name for i in range(stack.start, stack.end)
        }
        return [i for i in self.lists[name] if i not in stacked]

    def layers(self, name: str) -> list[torch.nn.Module]:
        """Returns the modules of a list."""
        modules: Any = self.module.get_submodule(name)
        return list(modules)

    @functools.cached_property
    def conversions(self) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
        """Transformers' renamings and conversions of stored tensors, and the module's tensors."""
        module: Any = self.module
        is_of_transformers = isinstance(module, PreTrainedModel)
        mapping = get_model_conversion_mapping(module) if is_of_transformers else []
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        names = [name for row in self.rows for name in (*row.hf_names, *row.aliases)]
        return renamings, converters, dict.fromkeys(names, torch.empty(0))

    def ignores(self, name: str) -> bool:
        """Returns True for a stored tensor that transformers does not load."""
        patterns = getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The names of the module's arguments."""
        return frozenset(inspect.signature(self.module.forward).parameters)

    @property
    def cache_name(self) -> str | None:
        """The name of the cache argument; None if there is none."""
        names = ("cache", "past_key_values")
        return next((name for name in names if name in self.arguments), None)

    @property
    def attends(self) -> bool:
        """True if the module uses the attention of `lora_jax.torch.attention`."""
        config = getattr(self.module, "config", None)
        return getattr(config, "_attn_implementation", None) == ATTENTION_NAME

    @property
    def may_attend(self) -> bool:
        """True if the module uses our attention, or may call torch's, which ours replaces.

        Modules of transformers that do not use our attention compute scores themselves.
        """
        return self.attends or not isinstance(self.module, PreTrainedModel)

    @property
    def packs(self) -> bool:
        """True if rows may be packed, because only our attention mixes tokens."""
        classes = [type(submodule).__name__ for submodule in self.module.modules()]
        has_other_mixers = any(_TOKEN_MIXERS.search(name) for name in classes)
        return self.attends and "position_ids" in self.arguments and not has_other_mixers

    @functools.cached_property
    def first_position(self) -> int:
        """The position of a row's first token, which is not 0 for models like RoBERTa."""
        tables: list[Any] = [
            table for table in self.module.modules() if hasattr(table, _POSITIONS_METHOD)
        ]
        return tables[0].padding_idx + 1 if tables else 0

    @functools.cached_property
    def _trunks(self) -> list[torch.nn.Module]:
        """The submodules before a language model's head, from the outermost to the innermost.

        All of them contain the table of tokens. A model may call any of them.

        Raises:
          TorchModelError: the module has no such submodule.
        """
        module: Any = self.module
        table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        base_model = getattr(module, "base_model", None)
        trunks: list[Any] = []
        if base_model not in (None, module):
            trunks.append(base_model)
        # Descend from child to child, as long as a child contains the table of tokens.
        innermost = trunks[0] if trunks else module
        while True:
            children_with_table = [
                child
                for child in innermost.children()
                if child is not table and table in list(child.modules())
            ]
            if not children_with_table:
                break
            innermost = children_with_table[0]
            trunks.append(innermost)
        if not trunks:
            raise TorchModelError(NO_HEAD.format(name=self.name))
        return trunks

    @contextlib.contextmanager
    def wide_logits(self) -> Iterator[None]:
        """Makes the head compute logits in fp32 within a block."""

        def multiply_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
            return dot_wide(x, weight, (((x.ndim - 1,), (1,)), ((), ())))

        def forward(_: int, head: Any, x: torch.Tensor) -> Any:
            logits = call_jax(multiply_wide, x, head.weight)
            return logits if head.bias is None else logits + head.bias

        get_head: Any = getattr(self.module, "get_output_embeddings", lambda: None)
        head = get_head()
        heads = [head] if type(head) is torch.nn.Linear else []
        with LOCK, patch_forwards(heads, forward):
            yield

    @contextlib.contextmanager
    def trunk_output(self, change: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
        """Applies ``change`` to the final hidden states within a block."""

        def forward(_: int, trunk: Any, *args: Any, **kwargs: Any) -> Any:
            """Runs the trunk, and changes its hidden states."""
            out = trunk.forward(*args, **kwargs)
            hidden = to_torch(change(to_jax(out[0])))
            if isinstance(out, tuple):
                return (hidden, *out[1:])
            out["last_hidden_state"] = hidden
            return out

        with LOCK, patch_forwards(self._trunks, forward):
            yield

    @contextlib.contextmanager
    def trunk_replaced(self, hidden: jax.Array) -> Iterator[None]:
        """Replaces the trunk's output by `hidden` within a block."""

        def forward(_: int, trunk: Any, *args: Any, **kwargs: Any) -> Any:
            return _Hidden(to_torch(hidden))

        with LOCK, patch_forwards(self._trunks, forward):
            yield


class _Hidden:
    """A trunk's output that consists only of final hidden states."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@functools.lru_cache(maxsize=8)
def _build_module(recipe: Recipe) -> EmptyModule:
    """Builds the module of a recipe, and keeps one layer of each kind in its stacks."""
    module: torch.nn.Module = recipe.empty_module().eval()
    buffers = buffers_of(module)
    lists = layer_lists(module)
    stacks_or_reason: dict[str, list[LayerPeriods] | str] = {}
    example = recipe.example_arguments(module)
    if recipe.scan and (recipe.continues or example is not None):
        stacks_or_reason = find_stacks(recipe.model_type, module, lists, buffers, example)
    stacks = [
        stack
        for list_stacks in stacks_or_reason.values()
        if not isinstance(list_stacks, str)
        for stack in list_stacks
    ]
    rows = make_key_rows(module, stacks)
    stored_names = {name for row in make_key_rows(module) for name in (*row.hf_names, *row.aliases)}
    further_buffers = {n: buffer for n, buffer in buffers.items() if n not in stored_names}
    return EmptyModule(
        name=recipe.model_type,
        module=module,
        rows=rows,
        stacks=stacks,
        lists={name: _remove_repeated_layers(module, name, stacks) for name in lists},
        buffers=stack_buffers(stacks, further_buffers),
        reasons_against_stacks={
            name: why for name, why in stacks_or_reason.items() if isinstance(why, str)
        },
    )


def _remove_repeated_layers(
    module: torch.nn.Module, name: str, stacks: Sequence[LayerPeriods]
) -> list[int]:
    """Removes all layers of stacks but the first one of each kind from a list.

    Returns:
      The indices of the layers that stay, before the others were removed.
    """
    layers: Any = module.get_submodule(name)
    remaining = set(range(len(layers)))
    for stack in stacks:
        if stack.name == name:
            remaining -= set(range(stack.start + stack.period, stack.end))
    for i in reversed(range(len(layers))):
        if i not in remaining:
            del layers[i]
    return sorted(remaining)


def build_module(recipe: Recipe) -> EmptyModule:
    """Returns the cached module of a recipe or a configuration, without weights.

    Raises:
      TorchModelError: transformers cannot build it.
    """
    return _build_module(
        Recipe(
            text=recipe.text,
            auto=recipe.auto,
            scan=recipe.scan,
            module=recipe.module,
            example=recipe.example,
        )
    )
