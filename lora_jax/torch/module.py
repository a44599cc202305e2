"""A torch module on the meta device, and its calls with JAX's arrays for its parameters."""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections import defaultdict
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
from lora_jax.models.layers.attention import dot_wide
from lora_jax.torch.attention import NAME
from lora_jax.torch.backend import (
    LOCK,
    Tensor,
    TorchModelError,
    call_jax,
    environment,
    running,
)
from lora_jax.torch.cache import CachedCall
from lora_jax.torch.layers import (
    Recomputed,
    layer_lists,
    patched,
    scanned,
    to_jax,
    to_torch,
    unrolled,
)
from lora_jax.torch.probe import buffers_of, find_stacks, loose, stack_buffers, within
from lora_jax.torch.recipe import Recipe
from lora_jax.torch.structure import LayerPeriods, Parameter, Place, parameters_of, place_of

# Classes of modules that mix tokens otherwise than by attention.
_MIXES = re.compile(
    r"Conv(?!1D$)|Mamba|SSM|Rwkv|Recurrent|DeltaNet|LinearAtt|Lightning|KDA|LSTM|Retention"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A module without weights.

    Attributes:
      name: for messages.
      module: on torch's meta device; of each stack it has the layers before, and one of each kind.
      parameters: its parameters, and the buffers that files hold.
      stacks: its stacks.
      lists: the names of its lists of layers, without those of the stacks.
      buffers: its further buffers, by name; those of layers of a kind are stacked, as parameters.
      unlike: by list, why it is no stack; without those that were not compared.
    """

    name: str
    module: torch.nn.Module
    parameters: Sequence[Parameter]
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
        leaves = dict(flatten_with_paths(tree)[0])
        if lacking := [p.row.path for p in self.parameters if p.row.path not in leaves]:
            raise TorchModelError(f"{self.name}: the tree has no {lacking[0]}")
        whole: dict[str, jax.Array] = {}
        kinds: dict[tuple[LayerPeriods, int], dict[str, jax.Array]] = defaultdict(dict)

        def give(array: jax.Array, place: Place | None, *names: str) -> None:
            if place is None:
                whole.update(dict.fromkeys(names, array))
            else:
                kinds[place.stack, place.kind][place.name] = array

        for own in self.parameters:
            array = leaves[own.row.path]
            array = array.swapaxes(-1, -2) if own.row.transpose else array
            give(array, own.place, own.name, *own.aliases)
        for name, buffer in self.buffers.items():
            give(jnp.asarray(buffer), place_of(name, self.stacks), name)
        with running(self.name) as env, contextlib.ExitStack() as open_:
            for stack in self.stacks:
                layers = self.layers(stack.name)[stack.start :]
                arrays = [kinds[stack, kind] for kind in range(stack.period)]
                open_.enter_context(scanned(env, stack, layers, arrays, recomputed, cache))
            apart = recomputed.recomputes or recomputed.placement.token_parts > 1
            single = {**dict.fromkeys(self.lists), **{s.name: s.start for s in self.stacks}}
            for name, n in single.items() if apart else ():
                layers = self.layers(name)[:n]
                of = [within(whole, f"{name}.{i}.") for i in range(len(layers))]
                open_.enter_context(unrolled(env, layers, of, recomputed))
            open_.enter_context(loose(env, self.module))
            tensors = {name: Tensor(array, env) for name, array in whole.items()}
            if cache is not None:
                kwargs = {**kwargs, "use_cache": True, self.cache_name: cache}
                kwargs["position_ids"] = cache.positions
            out = torch.func.functional_call(
                self.module,
                tensors,
                to_torch(env, tuple(args)),
                to_torch(env, dict(kwargs)),
                tie_weights=False,
            )
            return to_jax(out)

    def layers(self, name: str) -> list[torch.nn.Module]:
        """Returns the modules of a list."""
        modules: Any = self.module.get_submodule(name)
        return list(modules)

    @functools.cached_property
    def conversions(self) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
        """Transformers' renamings and conversions of files' tensors, and the module's tensors."""
        module: Any = self.module
        mapping = get_model_conversion_mapping(module)
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
        names = [n for p in self.parameters for n in (*p.row.hf_names, *p.aliases)]
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
        mixing = any(_MIXES.search(type(part).__name__) for part in self.module.modules())
        return self.attends and "position_ids" in self.arguments and not mixing

    @functools.cached_property
    def _trunks(self) -> list[torch.nn.Module]:
        """The part of a language model before its head, and the parts of it that read the tokens.

        A model may call one of these by itself.

        Raises:
          TorchModelError: the module has no such part.
        """
        module: Any = self.module
        table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        trunks: list[Any] = [getattr(module, "base_model", None)]
        trunks = trunks if trunks[0] not in (None, module) else []
        parts: Any = trunks[-1:] or [module]
        while parts:
            inner = (part for part in parts[-1].children() if part is not table)
            parts = [part for part in inner if table in list(part.modules())][:1]
            trunks += parts
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
            first = out[0]
            hidden = Tensor(change(first.jax()), first._env)
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
            return _Hidden(Tensor(hidden, environment()))

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
    module: torch.nn.Module = recipe.empty_module().eval()
    name, buffers, lists = recipe.model_type, buffers_of(module), layer_lists(module)
    stacks: list[LayerPeriods] = []
    unlike: dict[str, str] = {}
    if recipe.scan and recipe.continues:
        stacks, unlike = find_stacks(name, module, lists, buffers)
    parameters = parameters_of(module, stacks)
    stored = {n for p in parameters_of(module) for n in (p.name, *p.aliases)}
    for stack in stacks:
        layers: Any = module.get_submodule(stack.name)
        owner, _, leaf = stack.name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.ModuleList(layers[: stack.n_layers]))
    return Built(
        name=name,
        module=module,
        parameters=parameters,
        stacks=stacks,
        lists=[name for name in lists if name not in {stack.name for stack in stacks}],
        buffers=stack_buffers(stacks, {n: b for n, b in buffers.items() if n not in stored}),
        unlike=unlike,
    )


def built(recipe: Recipe) -> Built:
    """Returns the module of a recipe or a configuration, without weights; it is built once.

    Raises:
      TorchModelError: transformers cannot build it.
    """
    return _built(Recipe(recipe.text, recipe.auto, recipe.scan, recipe.module))
