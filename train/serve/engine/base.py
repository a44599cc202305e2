"""The served base, and adapters over it, which all have the same shapes (the shared form).

In the shared form, an adapter has the largest rank and all weights that any adapter may adapt: A
and B are zeros beyond its own rank, and at weights that it leaves alone. Zeros stay zeros in
training. So adapters of all ranks and targets run the same compiled functions.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import models, peft
from lora_jax.bank.slots import slots_of
from lora_jax.bank.stored import BankError, adapter_values, values_of
from lora_jax.bank.writing import add_slots
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Model, Tree
from lora_jax.core.weight import LoraWeight, Node
from lora_jax.folders import new_folder
from lora_jax.lorafy import map_nodes, nodes_of
from lora_jax.peft.experts import list_experts
from lora_jax.training.layout import Layout, layout_of_one_device
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.run.costs import tree_bytes
from train.run.invocation import meets_every_token
from train.serve.engine.adapter import Adapter, Factors, TrainingState
from train.serve.protocol.encryption import encrypt
from train.serve.protocol.requests import AdapterSpec, RequestError, Save
from train.settings.defaults import absolute_path

Nodes = Mapping[str, Node]  # by path
SPEC = "tenant.json"
MOMENTS = "optimizer.safetensors"
# The kinds of weights that each flag of an `AdapterSpec` stands for.
_KINDS_OF_TARGET = {"attention": {"attention"}, "mlp": {"mlp", "experts"}, "unembed": {"head"}}


class ServedBase:
    """A model with its weights. It makes, reads and writes the adapters of the model."""

    def __init__(
        self,
        model: Model,
        params: Tree,
        name: str,
        max_rank: int,
        layout: Layout | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Keeps a model and its arrays, without copying the arrays.

        Args:
          model: a model of `lora_jax.models`.
          params: its parameters.
          name: its name, for clients.
          max_rank: the largest rank of an adapter.
          layout: the mesh; by default the first device.
          tokenizer: name of the tokenizer, if it is not the model's own.
        """
        self.tokenizer = absolute_path(tokenizer)
        self.model = model
        self.params = params
        self.name = name
        self.max_rank = max_rank
        # New adapters lie where trained ones do: others would have all functions compile again.
        self._device_put = functools.partial(
            jax.device_put, device=(layout or layout_of_one_device()).whole
        )
        kind_of_path = models.kinds(model.config)
        self._paths_of_target: dict[str, list[str]] = {}
        for target, kinds in _KINDS_OF_TARGET.items():
            self._paths_of_target[target] = [
                path
                for path, kind in kind_of_path.items()
                if kind in kinds and _is_matrix_path(path) and peft.can_hold(model, path)
            ]
        self._token_paths = {path for path, kind in kind_of_path.items() if meets_every_token(kind)}
        self._has_tied_head = not self._paths_of_target["unembed"]
        if self._has_tied_head:  # the head's use of the table alone
            self._paths_of_target["unembed"] = [
                path for path, kind in kind_of_path.items() if kind == "embedding"
            ]
        self._param_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        # Sums over all slots' ranks have the same bits, whichever slot an adapter lies in, where
        # each has a multiple of 8.
        shared_spec = AdapterSpec(rank=-(-max_rank // 8) * 8)
        self.rules = self._make_rules(shared_spec)
        _, self.shell = lj.split(lj.lorafy(params, self.rules))
        self.slots = slots_of(add_slots(params, self.rules, 2))
        self.leaves = {path: slots.base for path, slots in self.slots.items()}
        self.size = tree_bytes(params)
        self.zero_adapter = self._make_shared_adapter(shared_spec, {})
        self._new_factors = jax.jit(self._make_factors)

    def rules_of(self, spec: AdapterSpec) -> list[lj.LoraRule]:
        """Returns the rules of an adapter.

        Raises:
          RequestError: its rank is too large, or it adapts nothing.
        """
        if not 1 <= spec.rank <= self.max_rank:
            raise RequestError(
                f"rank {spec.rank} is not possible here. Use ranks from 1 to {self.max_rank}, or "
                "start the server with a larger --max-rank."
            )
        rules = self._make_rules(spec)
        if not rules:
            raise RequestError("the adapter adapts no weights. Train attention, mlp or unembed.")
        return rules

    def _make_rules(self, spec: AdapterSpec) -> list[lj.LoraRule]:
        """Returns a rule for each target of an adapter's description."""
        rules: list[lj.LoraRule] = []
        for target, paths in self._paths_of_target.items():
            if getattr(spec, target):
                is_tied_head = target == "unembed" and self._has_tied_head
                rules.append(
                    lj.LoraRule(
                        targets=paths,
                        rank=spec.rank,
                        alpha=spec.alpha,
                        uses="product" if is_tied_head else "all",
                    )
                )
        return rules

    def begin(self, spec: AdapterSpec, seed: int) -> Adapter:
        """Returns a new adapter, whose A is uniform in ±1/√inputs and whose B is zero.

        Raises:
          RequestError: see `rules_of`.
        """
        rules = self.rules_of(spec)
        is_adapted = {path: any(path in rule.targets for rule in rules) for path in self.slots}
        factors = self._new_factors(jax.random.key(seed), spec.rank, is_adapted)
        return dataclasses.replace(
            self._make_shared_adapter(spec, {}), factors=self._device_put(factors)
        )

    def make_shell_for(self, adapter: Adapter) -> Tree:
        """Returns the base's tree without factors, with the invocation of an adapter."""
        if adapter.invocation is None:
            return self.shell

        def set_invocation(path: str, node: Node) -> Node:
            return (
                node.replace(invocation=adapter.invocation) if path in self._token_paths else node
            )

        return map_nodes(set_invocation, self.shell)

    def tree(self, factors: Factors, scales: Mapping[str, jax.Array], shell: Tree) -> Tree:
        """Returns the tree of the base with an adapter's factors; the arrays may be traced."""
        joined = lj.join(factors, shell)
        return map_nodes(lambda path, node: node.replace(scale=scales[path]), joined)

    def read_state(self, folder: Path, optimizer: bool = False) -> TrainingState:
        """Reads an adapter that `write`, PEFT or a run of this library wrote.

        Args:
          folder: the folder.
          optimizer: whether to load the optimizer's state, which otherwise starts at zero.

        Raises:
          RequestError: it cannot be read, or does not fit.
        """
        nodes = self._load_nodes(folder)
        # The description: saved by a server, or derived from the weights of other adapters.
        spec_file = folder / SPEC
        saved_fields: dict[str, Any] = {}
        if spec_file.exists():  # the adapter was trained by a server
            saved_fields = json.loads(spec_file.read_text())
            spec = AdapterSpec(**saved_fields["spec"])
            nodes = self._split_experts(nodes, spec.rank)
        else:
            spec = self._derive_spec(nodes)
        # The adapter in the shared form, where an invocation is kept beside the weights.
        invocation, nodes = self._extract_invocation(folder.name, nodes)
        adapter = dataclasses.replace(self._make_shared_adapter(spec, nodes), invocation=invocation)
        arrays = jax.tree.leaves((adapter.factors, adapter.scales))
        if not all(np.isfinite(array).all() for array in arrays):
            raise RequestError(
                f"{folder.name} holds values that are not finite. Load an earlier checkpoint."
            )
        state = TrainingState.begin(adapter)
        if not optimizer:
            return state
        # The optimizer's state, padded from the adapter's own rank.
        if not (folder / MOMENTS).exists():
            raise RequestError(
                f"{folder.name} holds no state of an optimiser. Load it without the optimizer."
            )
        moments = load_file(folder / MOMENTS)
        return dataclasses.replace(
            state,
            first=self._pad_to_shared_rank(moments, "first"),
            second=self._pad_to_shared_rank(moments, "second"),
            steps=saved_fields["steps"],
        )

    def _load_nodes(self, folder: Path) -> Nodes:
        """Returns the nodes of an adapter's folder; raises a RequestError if loading fails."""
        try:
            source = find_adapter(str(folder.absolute()), "the adapter")
            if source.images:
                raise RequestError(
                    f"{folder.name} was trained with images, which the server does not support. "
                    "Use train.generate."
                )
            if source.is_subspace or source.rope_scaling:
                option = "--intrinsic" if source.is_subspace else "--rope-scaling"
                raise RequestError(
                    f"{folder.name} was trained with {option}, which the server does not support. "
                    "Use train.generate."
                )
            if source.tokenizer and source.tokenizer != self.tokenizer:
                raise RequestError(
                    f"{folder.name} was trained with the tokenizer {source.tokenizer}, and this "
                    f"server has {self.tokenizer or 'that of the model'}. Start it with "
                    "--tokenizer."
                )
            return nodes_of(source.load(self.model, self.params, self.name))
        except (UserError, ValueError, OSError) as error:
            raise RequestError(f"{folder.name}: {error}") from None

    def write(self, state: TrainingState, command: Save) -> int:
        """Writes an adapter as a PEFT folder atomically, and returns the folder's bytes.

        Args:
          state: the adapter and its optimiser's state.
          command: its folder is not there yet, or is replaced.
        """
        folder = command.path
        spec = state.adapter.spec
        shapes = lj.lorafy(self._param_shapes, self.rules_of(spec))

        def fill(path: str, node: LoraWeight) -> LoraWeight:
            """Returns a weight with the adapter's factors, cut to the adapter's own rank."""
            factors = self._cut_to_rank(state.adapter.factors[path], path, spec.rank)
            return node.replace(**factors, scale=np.asarray(state.adapter.scales[path]))

        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as partial:
            # PEFT's files are written into a folder within, and moved up.
            peft_folder = partial / "adapter"
            tree = map_nodes(fill, shapes)
            peft.save(peft_folder, self.model, tree, base_model=self.name, embedding_layers=False)
            for path in peft_folder.iterdir():
                path.rename(partial / path.name)
            peft_folder.rmdir()
            saved_fields = {"spec": dataclasses.asdict(spec), "steps": state.steps}
            (partial / SPEC).write_text(json.dumps(saved_fields))
            if command.optimizer:
                save_file(self._moment_arrays(state, [*nodes_of(shapes)]), partial / MOMENTS)
            if command.recipients:
                encrypt(partial, command.recipients)
            # The files are on the disk before the folder gets its name.
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return sum(path.stat().st_size for path in folder.iterdir())

    def _moment_arrays(self, state: TrainingState, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns Adam's moments of some weights as a file holds them, at the adapter's rank."""
        arrays: dict[str, np.ndarray] = {}
        for moment, factors in (("first", state.first), ("second", state.second)):
            for path in paths:
                cut_factors = self._cut_to_rank(factors[path], path, state.adapter.spec.rank)
                for name, array in cut_factors.items():
                    arrays[f"{moment}|{path}|{name}"] = np.ascontiguousarray(array)
        return arrays

    def _make_factors(
        self, key: jax.Array, rank: jax.Array | int, is_adapted: Mapping[str, jax.Array | bool]
    ) -> Factors:
        """Returns random factors of a new adapter; its rank and targets may be traced."""
        factors = jax.tree.map(jnp.zeros_like, self.zero_adapter.factors)
        for path, weight_factors in factors.items():
            # The head's inputs are the columns of a tied table: its A is `b` here.
            is_tied_head = self._has_tied_head and path in self._paths_of_target["unembed"]
            name = "b" if is_tied_head else "a"
            shape = weight_factors[name].shape
            rank_axis = self.slots[path].slot_axis
            bound = 1 / np.sqrt(math.prod(shape[rank_axis + 1 :]))
            path_key = fold_in_path(key, path)
            random_factor = jax.random.uniform(path_key, shape, jnp.float32, -bound, bound)
            rank_indices = jax.lax.broadcasted_iota(jnp.int32, shape, rank_axis)
            # Weights and ranks beyond the adapter's own stay zero.
            is_used = is_adapted[path] & (rank_indices < rank)
            weight_factors[name] = jnp.where(is_used, random_factor, 0.0)
        return factors

    def _cut_to_rank(
        self, factors: Mapping[str, jax.Array], path: str, rank: int
    ) -> dict[str, np.ndarray]:
        """Returns A and B of a weight at the adapter's own rank."""
        cut = _rank_slice(self.slots[path].slot_axis, slice(rank))
        return {name: np.asarray(factor)[cut] for name, factor in factors.items()}

    def _pad_to_shared_rank(self, arrays: Mapping[str, np.ndarray], moment: str) -> Factors:
        """Returns factors in the shared form, from those at their own rank."""
        factors = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.zero_adapter.factors)
        for path, weight_factors in factors.items():
            for name, factor in weight_factors.items():
                saved_factor = arrays.get(f"{moment}|{path}|{name}")
                if saved_factor is not None:
                    factor[tuple(map(slice, saved_factor.shape))] = saved_factor
        return self._device_put(factors)

    def _extract_invocation(self, name: str, nodes: Nodes) -> tuple[tuple[int, ...] | None, Nodes]:
        """Returns the invocation of an adapter, and its nodes without the invocation.

        Raises:
          RequestError: a weight trains without the invocation, or does not multiply every token.
        """
        invocations = {path: getattr(node, "invocation", None) for path, node in nodes.items()}
        if not any(invocations.values()):  # the adapter always acts
            return None, nodes
        for path, invocation in invocations.items():
            if invocation is None or path not in self._token_paths:
                raise RequestError(
                    f"{name} is an activated LoRA, but it also changes {path} for the tokens "
                    "before its invocation. Adapt only weights that multiply every token."
                )
        return invocation, {path: node.replace(invocation=None) for path, node in nodes.items()}

    def _split_experts(self, nodes: Nodes, rank: int) -> Nodes:
        """Returns nodes in which the gate and up projections of experts are separate.

        PEFT's files hold gate and up of experts as one weight, their factors side by side: each
        would get those of the other, too, and other places than the optimiser's moments have.
        """
        split_nodes = dict(nodes)
        for expert in list_experts(self.model):
            node = nodes.get(expert.path)
            if expert.half is None or not isinstance(node, LoraWeight):
                continue
            has_factors_of_both = {*node.ranks} == {2 * rank}
            if not has_factors_of_both:  # gate and up share one A
                continue
            half = slice(expert.half * rank, (expert.half + 1) * rank)
            cut = _rank_slice(self.slots[expert.path].slot_axis, half)
            split_nodes[expert.path] = node.replace(
                a=np.asarray(node.a)[cut],
                b=np.asarray(node.b)[cut],
                ranks=(rank,) * len(node.ranks),
            )
        return split_nodes

    def _derive_spec(self, nodes: Nodes) -> AdapterSpec:
        """Returns the description of an adapter that this server did not create."""
        weights = {path: node for path, node in nodes.items() if isinstance(node, LoraWeight)}
        rank = max((weight.rank for weight in weights.values()), default=0)
        scale = max((float(np.max(weight.scale)) for weight in weights.values()), default=0.0)
        flags: dict[str, bool] = {}
        for target, paths in self._paths_of_target.items():
            flags[target] = any(path in weights for path in paths)
        return AdapterSpec(rank=rank, alpha=scale * rank, **flags)

    def _make_shared_adapter(self, spec: AdapterSpec, nodes: Nodes) -> Adapter:
        """Returns an adapter in the shared form.

        Args:
          spec: its description.
          nodes: its weights by path. A scale that is not alpha / rank comes from its weight.

        Raises:
          RequestError: a weight does not fit into the shared form.
        """
        try:
            node_values = (
                adapter_values("the adapter", _nest_nodes(nodes), self.slots) if nodes else {}
            )
        except BankError as error:
            raise RequestError(str(error)) from None
        values = values_of(node_values, self.slots, self.leaves)
        # A scale that differs from alpha / rank only by rounding becomes alpha / rank.
        spec_scale = np.float32(spec.alpha / spec.rank)
        scales: dict[str, np.ndarray] = {}
        factors: dict[str, dict[str, Any]] = {}
        for path, weight_values in values.items():
            scale = np.asarray(weight_values["scale"])
            is_close = np.isclose(scale, spec_scale, rtol=1e-5, atol=0)
            scales[path] = np.where((scale == 0) | is_close, spec_scale, scale)
            factors[path] = {name: weight_values[name] for name in ("a", "b")}
        placed_factors, placed_scales = self._device_put((factors, scales))
        return Adapter(spec, placed_factors, placed_scales)


def _rank_slice(rank_axis: int, ranks: slice) -> tuple[slice, ...]:
    """Returns the index that selects some ranks on axis `rank_axis` of a factor."""
    return (*[slice(None)] * rank_axis, ranks)


def _is_matrix_path(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding")


def _nest_nodes(nodes: Nodes) -> Tree:
    """Returns nodes by path as a nested tree."""
    tree: dict[str, Tree] = {}
    for path, node in nodes.items():
        *folders, leaf_name = path.split("/")
        subtree = tree
        for folder in folders:
            subtree = subtree.setdefault(folder, {})
        subtree[leaf_name] = node
    return tree
