"""A torch module on the meta device, and its calls with JAX's arrays for its parameters."""

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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Tree
from lora_jax.hf.keys import Row
from lora_jax.models.layers.attention import dot_wide
from lora_jax.torch.attention import NAME
from lora_jax.torch.backend import LOCK, call_jax, call_module, running, to_torch
from lora_jax.torch.cache import MORE, CachedCall
from lora_jax.torch.layers import (
    Recomputed,
    layer_lists,
    patched,
    scanned,
    to_jax,
    unrolled,
)
from lora_jax.torch.packages import TorchModelError
from lora_jax.torch.probe import buffers_of, find_stacks, loose, stack_buffers, within
from lora_jax.torch.recipe import Recipe
from lora_jax.torch.structure import LayerPeriods, rows_of

# Classes of modules that mix tokens otherwise than by attention.
_MIXES = re.compile(
    r"Conv(?!1D$)|Mamba|SSM|Rwkv|Recurrent|DeltaNet|LinearAtt|Lightning|KDA|LSTM|Retention|"
    r"Compressor"
)
# A method of modules that number the positions by the tokens, from behind that of padding.
_FROM_IDS = "create_position_ids_from_input_ids"


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A module without weights.

    Attributes:
      name: for messages.
      module: on torch's meta device; of each stack it has the layers before, and one of each kind.
      rows: its parameters, and the buffers that files hold; see `rows_of`.
      stacks: its stacks.
      lists: the names of its lists of layers, without those of the stacks.
      buffers: its further buffers, by name; those of layers of a kind are stacked, as parameters.
      unlike: by list, why it is no stack; without those that were not compared.
    """

    name: str
    module: torch.nn.Module
    rows: Sequence[Row]
    stacks: Sequence[LayerPeriods]
    lists: Sequence[str]
    buffers: Mapping[str, np.ndarray]
    unlike: Mapping[str, str]

    def call(
        self,
        tree: Tree,
        args: Any,
        kwargs: Any,
        recomputed: Recomputed,
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

        def layers(name: str, indices: range) -> tuple[list[torch.nn.Module], list[Any]]:
            modules = self.layers(name)
            layer_arrays = [within(arrays, f"{name}.{i}.") for i in indices]
            return [modules[i] for i in indices], layer_arrays

        with running(self.name), contextlib.ExitStack() as contexts:
            for stack in self.stacks:
                kinds, kind_arrays = layers(stack.name, range(stack.start, stack.n_layers))
                contexts.enter_context(scanned(stack, kinds, kind_arrays, recomputed, cache))
            # A layer that is neither recomputed nor placed runs as torch calls it.
            if recomputed.remat is not False or recomputed.placement.token_parts > 1:
                n_unrolled = {name: len(self.layers(name)) for name in self.lists}
                n_unrolled |= {stack.name: stack.start for stack in self.stacks}
                for name, n in n_unrolled.items():
                    contexts.enter_context(unrolled(*layers(name, range(n)), recomputed))
            holds_others = contexts.enter_context(loose(self.module))
            if cache is not None:
                kwargs = {**kwargs, "use_cache": True, self.cache_name: cache}
                kwargs["position_ids"] = cache.positions + self.first_position
            out = to_jax(call_module(self.module, arrays, args, kwargs))
            if cache is not None and holds_others():
                raise TorchModelError(MORE)
            return out

    def _arrays(self, tree: Tree) -> dict[str, jax.Array]:
        """Returns the arrays of a tree and the buffers under the module's own names."""
        leaves = dict(flatten_with_paths(tree)[0])
        missing_paths = [row.path for row in self.rows if row.path not in leaves]
        if missing_paths:
            raise TorchModelError(f"{self.name}: the tree has no {missing_paths[0]}")
        arrays: dict[str, jax.Array] = {n: jnp.asarray(b) for n, b in self.buffers.items()}
        for row in self.rows:
            array = leaves[row.path]
            if row.transpose:
                array = array.swapaxes(-1, -2)
            arrays |= dict.fromkeys((row.hf_names[0], *row.aliases), array)
        return arrays

    def layers(self, name: str) -> list[torch.nn.Module]:
        """Returns the modules of a list."""
        modules: Any = self.module.get_submodule(name)
        return list(modules)

    @functools.cached_property
    def conversions(self) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
        """Transformers' renamings and conversions of files' tensors, and the module's tensors."""
        module: Any = self.module
        mapping = get_model_conversion_mapping(module)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        names = [name for row in self.rows for name in (*row.hf_names, *row.aliases)]
        return renamings, converters, dict.fromkeys(names, torch.empty(0))

    def ignores(self, name: str) -> bool:
        """Returns True for a tensor that transformers leaves in the files: another head's, say."""
        patterns = getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The names of the arguments that the module takes."""
        return frozenset(inspect.signature(self.module.forward).parameters)

    @property
    def cache_name(self) -> str | None:
        """The name of the argument for keys and values; None if there is none."""
        names = ("cache", "past_key_values")
        return next((name for name in names if name in self.arguments), None)

    @property
    def attends(self) -> bool:
        """True if the module's attention is `lora_jax.torch.attention`'s."""
        config = getattr(self.module, "config", None)
        return getattr(config, "_attn_implementation", None) == NAME

    @property
    def packs(self) -> bool:
        """True if rows may hold several sequences: attention alone mixes tokens, and is ours."""
        classes = [type(submodule).__name__ for submodule in self.module.modules()]
        mixes_otherwise = any(map(_MIXES.search, classes))
        return self.attends and "position_ids" in self.arguments and not mixes_otherwise

    @functools.cached_property
    def first_position(self) -> int:
        """The position of a row's first token: RoBERTa's rows begin behind that of padding."""
        tables: list[Any] = [table for table in self.module.modules() if hasattr(table, _FROM_IDS)]
        return tables[0].padding_idx + 1 if tables else 0

    @functools.cached_property
    def _trunks(self) -> list[torch.nn.Module]:
        """The part of a language model before its head, and the parts of it that read the tokens.

        A model may call one of these by itself.

        Raises:
          TorchModelError: the module has no such part.
        """
        module: Any = self.module
        table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        base_model = getattr(module, "base_model", None)
        trunks: list[Any] = []
        if base_model not in (None, module):
            trunks.append(base_model)
        innermost = trunks[0] if trunks else module
        while True:
            with_table = [
                child
                for child in innermost.children()
                if child is not table and table in list(child.modules())
            ]
            if not with_table:
                break
            innermost = with_table[0]
            trunks.append(innermost)
        if not trunks:
            raise TorchModelError(f"{self.name}: its head is no part of its own")
        return trunks

    @contextlib.contextmanager
    def wide_logits(self) -> Iterator[None]:
        """Has the head give fp32 at least, within a block: no narrower copy of logits is alive."""

        def product(x: jax.Array, weight: jax.Array) -> jax.Array:
            return dot_wide(x, weight, (((x.ndim - 1,), (1,)), ((), ())))

        def forward(_: int, head: Any, x: torch.Tensor) -> Any:
            logits = call_jax(product, x, head.weight)
            return logits if head.bias is None else logits + head.bias

        get: Any = getattr(self.module, "get_output_embeddings", lambda: None)
        head = get()
        with LOCK, patched([head] if type(head) is torch.nn.Linear else [], forward):
            yield

    @contextlib.contextmanager
    def trunk_output(self, change: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
        """Gives the head ``change(hidden)`` in the place of final hidden states, within a block."""

        def forward(_: int, trunk: Any, *args: Any, **kwargs: Any) -> Any:
            out = trunk.forward(*args, **kwargs)
            hidden = to_torch(change(to_jax(out[0])))
            if isinstance(out, tuple):
                return (hidden, *out[1:])
            out["last_hidden_state"] = hidden
            return out

        with LOCK, patched(self._trunks, forward):
            yield

    @contextlib.contextmanager
    def trunk_replaced(self, hidden: jax.Array) -> Iterator[None]:
        """Gives the head these final hidden states, within a block; nothing before it runs."""

        def forward(_: int, trunk: Any, *args: Any, **kwargs: Any) -> Any:
            return _Hidden(to_torch(hidden))

        with LOCK, patched(self._trunks, forward):
            yield


class _Hidden:
    """Outputs of a trunk, of which only the hidden states are there."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@functools.lru_cache(maxsize=8)
def _built(recipe: Recipe) -> Built:
    """Returns the module of a recipe, whose stacks keep a layer of each kind."""
    module: torch.nn.Module = recipe.empty_module().eval()
    buffers = buffers_of(module)
    lists = layer_lists(module)
    stack_or_reason: dict[str, LayerPeriods | str] = {}
    if recipe.scan and recipe.continues:
        stack_or_reason = find_stacks(recipe.model_type, module, lists, buffers)
    stacks = [stack for stack in stack_or_reason.values() if not isinstance(stack, str)]
    stack_names = {stack.name for stack in stacks}
    rows = rows_of(module, stacks)
    stored_names = {name for row in rows_of(module) for name in (*row.hf_names, *row.aliases)}
    further_buffers = {n: buffer for n, buffer in buffers.items() if n not in stored_names}
    for stack in stacks:
        layers: Any = module.get_submodule(stack.name)
        del layers[stack.n_layers :]
    return Built(
        name=recipe.model_type,
        module=module,
        rows=rows,
        stacks=stacks,
        lists=[name for name in lists if name not in stack_names],
        buffers=stack_buffers(stacks, further_buffers),
        unlike={name: why for name, why in stack_or_reason.items() if isinstance(why, str)},
    )


def built(recipe: Recipe) -> Built:
    """Returns the module of a recipe or a configuration, without weights; it is built once.

    Raises:
      TorchModelError: transformers cannot build it.
    """
    return _built(Recipe(recipe.text, recipe.auto, recipe.scan, recipe.module))
