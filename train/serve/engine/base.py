"""The base that a server holds, and adapters over it in one form.

In that form, an adapter has the largest rank and all weights that any adapter may adapt: A and B
are zeros beyond its own rank, and at weights that it leaves alone. Zeros stay zeros in training. So
adapters of all ranks and targets run the same compiled functions.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

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
from lora_jax.peft.experts import experts_of
from lora_jax.training.layout import Layout, one_device
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.run.costs import tree_bytes
from train.run.invocation import meets_every_token
from train.serve.engine.adapter import Adapter, Factors, TrainingState
from train.serve.protocol.encryption import encrypt
from train.serve.protocol.requests import AdapterSpec, RequestError, Save
from train.settings.defaults import absolute_path

Nodes = Mapping[str, Node]  # by path
SPEC, MOMENTS = "tenant.json", "optimizer.safetensors"


class ServedBase:
    """A model with its weights, and what makes, reads and writes adapters over it."""

    def __init__(
        self,
        model: Model,
        params: Tree,
        name: str,
        max_rank: int,
        layout: Layout | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Takes in a model; its arrays are not copied.

        Args:
          model: a model of `lora_jax.models`.
          params: its parameters.
          name: its name, for clients.
          max_rank: the largest rank of an adapter.
          layout: the mesh; by default the first device.
          tokenizer: name of the tokenizer, if it is not the model's own.
        """
        self.tokenizer = absolute_path(tokenizer)
        self.model, self.params, self.name, self.max_rank = model, params, name, max_rank
        # New adapters lie where trained ones do: others would have all functions compile again.
        self._place = functools.partial(jax.device_put, device=(layout or one_device()).whole)
        kinds = models.kinds(model.config)
        self._paths = {
            part: [
                path
                for path, kind in kinds.items()
                if kind in of and _is_matrix(path) and peft.can_hold(model, path)
            ]
            for part, of in {
                "attention": {"attention"},
                "mlp": {"mlp", "experts"},
                "unembed": {"head"},
            }.items()
        }
        self._by_token = {path for path, kind in kinds.items() if meets_every_token(kind)}
        self._tied = not self._paths["unembed"]
        if self._tied:  # the head's use of the table alone
            self._paths["unembed"] = [path for path, kind in kinds.items() if kind == "embedding"]
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        # Sums over all slots' ranks have the same bits, whichever slot an adapter lies in, where
        # each has a multiple of 8.
        whole = AdapterSpec(rank=-(-max_rank // 8) * 8)
        self.rules = self._rules(whole)
        _, self.shell = lj.split(lj.lorafy(params, self.rules))
        self.slots = slots_of(add_slots(params, self.rules, 2))
        self.leaves = {path: slots.base for path, slots in self.slots.items()}
        self.size = tree_bytes(params)
        self.none = self._adapter(whole, {})
        self._new_factors = jax.jit(self._make_factors)

    def rules_of(self, spec: AdapterSpec) -> list[lj.LoraRule]:
        """Returns the rules of an adapter.

        Raises:
          RequestError: its rank is too large, or it adapts nothing.
        """
        if not 1 <= spec.rank <= self.max_rank:
            raise RequestError(
                f"rank {spec.rank}: this server has room for ranks from 1 to {self.max_rank}"
            )
        rules = self._rules(spec)
        if not rules:
            raise RequestError("an adapter of nothing: train attention, mlp or unembed")
        return rules

    def _rules(self, spec: AdapterSpec) -> list[lj.LoraRule]:
        return [
            lj.LoraRule(
                targets=self._paths[part],
                rank=spec.rank,
                alpha=spec.alpha,
                uses="product" if part == "unembed" and self._tied else "all",
            )
            for part in self._paths
            if getattr(spec, part)
        ]

    def begin(self, spec: AdapterSpec, seed: int) -> Adapter:
        """Returns a new adapter: A uniform in ±1/√inputs, B zeros.

        Raises:
          RequestError: see `rules_of`.
        """
        rules = self.rules_of(spec)
        adapted = {path: any(path in rule.targets for rule in rules) for path in self.slots}
        factors = self._new_factors(jax.random.key(seed), spec.rank, adapted)
        return dataclasses.replace(self._adapter(spec, {}), factors=self._place(factors))

    def shell_of(self, adapter: Adapter) -> Tree:
        """Returns the base without an adapter's arrays, which knows its invocation."""
        if adapter.invocation is None:
            return self.shell

        def told(path: str, node: Node) -> Node:
            return node.replace(invocation=adapter.invocation) if path in self._by_token else node

        return map_nodes(told, self.shell)

    def tree(self, factors: Factors, scales: Mapping[str, jax.Array], shell: Tree) -> Tree:
        """Returns the adapted tree of an adapter; traced or not."""
        joined = lj.join(factors, shell)
        return map_nodes(lambda path, node: node.replace(scale=scales[path]), joined)

    def read(self, folder: Path, optimizer: bool = False) -> TrainingState:
        """Reads an adapter that `write`, PEFT or a run of this library wrote.

        Args:
          folder: the folder.
          optimizer: whether to go on with the optimiser's state; else it begins anew.

        Raises:
          RequestError: it cannot be read, or does not fit.
        """
        try:
            source = find_adapter(str(folder.absolute()), "the adapter")
            if source.images:
                raise RequestError(f"{folder.name} was trained with images, which are not served")
            if source.is_subspace or source.rope_scaling:
                how = "--intrinsic" if source.is_subspace else "--rope-scaling"
                raise RequestError(f"{folder.name} was trained by {how}, which is not served")
            if source.tokenizer and source.tokenizer != self.tokenizer:
                raise RequestError(
                    f"{folder.name} was trained with the tokenizer {source.tokenizer}, and this "
                    f"server has {self.tokenizer or 'that of the model'}: start it with --tokenizer"
                )
            read: Nodes = nodes_of(source.load(self.model, self.params, self.name))
        except (UserError, ValueError, OSError) as error:
            raise RequestError(f"{folder.name}: {error}") from None
        saved = folder / SPEC
        about = json.loads(saved.read_text()) if saved.exists() else {}
        spec = AdapterSpec(**about["spec"]) if about else self._spec_of(read)
        read = self._part_experts(read, spec.rank) if about else read
        invocation, nodes = self._invocation_of(folder.name, read)
        adapter = dataclasses.replace(self._adapter(spec, nodes), invocation=invocation)
        if not all(
            np.isfinite(x).all() for x in jax.tree.leaves((adapter.factors, adapter.scales))
        ):
            raise RequestError(f"{folder.name} holds values that are not finite")
        state = TrainingState.begin(adapter)
        if not optimizer:
            return state
        if not (folder / MOMENTS).exists():
            raise RequestError(f"{folder.name} holds no state of an optimiser: load it without")
        moments = load_file(folder / MOMENTS)
        return dataclasses.replace(
            state,
            first=self._fill_rank(moments, "first"),
            second=self._fill_rank(moments, "second"),
            steps=about["steps"],
        )

    def write(self, state: TrainingState, command: Save) -> int:
        """Writes an adapter as a PEFT folder, which appears whole; returns its bytes.

        Args:
          state: the adapter and its optimiser's state.
          command: its folder is not there yet, or is replaced.
        """
        folder = command.path
        spec = state.adapter.spec
        tree = lj.lorafy(self._shapes, self.rules_of(spec))
        scales = state.adapter.scales

        def own(path: str, node: LoraWeight) -> LoraWeight:
            parts = self._cut_rank(state.adapter.factors[path], path, spec.rank)
            return node.replace(**parts, scale=np.asarray(scales[path]))

        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as partial:
            inner = partial / "adapter"
            mine = map_nodes(own, tree)
            peft.save(inner, self.model, mine, base_model=self.name, embedding_layers=False)
            for path in inner.iterdir():
                path.rename(partial / path.name)
            inner.rmdir()
            about = {"spec": dataclasses.asdict(spec), "steps": state.steps}
            (partial / SPEC).write_text(json.dumps(about))
            if command.optimizer:
                both = {"first": state.first, "second": state.second}
                arrays = {
                    f"{moment}|{path}|{name}": np.ascontiguousarray(array)
                    for moment, factors in both.items()
                    for path in nodes_of(tree)
                    for name, array in self._cut_rank(factors[path], path, spec.rank).items()
                }
                save_file(arrays, partial / MOMENTS)
            if command.recipients:
                encrypt(partial, command.recipients)
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return sum(path.stat().st_size for path in folder.iterdir())

    def _make_factors(
        self, key: jax.Array, rank: jax.Array | int, adapted: Mapping[str, jax.Array | bool]
    ) -> Factors:
        """Returns the factors of a new adapter; its rank and targets are traced, too."""
        factors = jax.tree.map(jnp.zeros_like, self.none.factors)
        for path, parts in factors.items():
            # The head's inputs are the columns of a tied table: its A is `b` here.
            name = "b" if self._tied and path in self._paths["unembed"] else "a"
            shape, axis = parts[name].shape, self.slots[path].slot_axis
            bound = 1 / np.sqrt(math.prod(shape[axis + 1 :]))
            own = fold_in_path(key, path)
            drawn = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
            used = adapted[path] & (jax.lax.broadcasted_iota(jnp.int32, shape, axis) < rank)
            parts[name] = jnp.where(used, drawn, 0.0)
        return factors

    def _cut_rank(
        self, parts: Mapping[str, jax.Array], path: str, rank: int
    ) -> dict[str, np.ndarray]:
        """Returns A and B of a weight at the adapter's own rank."""
        axis = self.slots[path].slot_axis
        used = (slice(None),) * axis + (slice(rank),)
        return {name: np.asarray(array)[used] for name, array in parts.items()}

    def _fill_rank(self, arrays: Mapping[str, np.ndarray], moment: str) -> Factors:
        """Returns factors in the form of all adapters, from those at their own rank."""
        factors = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.none.factors)
        for path, parts in factors.items():
            for name, whole in parts.items():
                mine = arrays.get(f"{moment}|{path}|{name}")
                if mine is not None:
                    whole[tuple(map(slice, mine.shape))] = mine
        return self._place(factors)

    def _invocation_of(self, name: str, nodes: Nodes) -> tuple[tuple[int, ...] | None, Nodes]:
        """Returns the invocation of an adapter, and its nodes as those of one that always acts.

        Raises:
          RequestError: a weight trains without the invocation, or does not multiply every token.
        """
        every = {path: getattr(node, "invocation", None) for path, node in nodes.items()}
        if not any(every.values()):
            return None, nodes
        for path, invocation in every.items():
            if invocation is None or path not in self._by_token:
                raise RequestError(
                    f"{name} is an activated LoRA, and the tokens before its invocation would not "
                    f"be the base's at {path}"
                )
        return invocation, {path: node.replace(invocation=None) for path, node in nodes.items()}

    def _part_experts(self, nodes: Nodes, rank: int) -> Nodes:
        """Returns an adapter of this server at its rank.

        PEFT's files hold gate and up of experts as one weight, their factors side by side: each
        would get those of the other, too, and other places than the optimiser's moments have.
        """
        parted = dict(nodes)
        for expert in experts_of(self.model):
            node = nodes.get(expert.path)
            if expert.half is None or not isinstance(node, LoraWeight):
                continue
            if {*node.ranks} != {2 * rank}:  # one A for both
                continue
            own = slice(expert.half * rank, (expert.half + 1) * rank)
            at = (slice(None),) * self.slots[expert.path].slot_axis + (own,)
            a, b = (np.asarray(part)[at] for part in (node.a, node.b))
            parted[expert.path] = node.replace(a=a, b=b, ranks=(rank,) * len(node.ranks))
        return parted

    def _spec_of(self, nodes: Nodes) -> AdapterSpec:
        """Returns the description of an adapter from elsewhere."""
        weights = {p: n for p, n in nodes.items() if isinstance(n, LoraWeight)}
        rank = max((node.rank for node in weights.values()), default=0)
        scale = max((float(np.max(node.scale)) for node in weights.values()), default=0.0)
        parts = {part: any(p in weights for p in paths) for part, paths in self._paths.items()}
        return AdapterSpec(rank=rank, alpha=scale * rank, **parts)

    def _adapter(self, spec: AdapterSpec, nodes: Nodes) -> Adapter:
        """Returns an adapter in the form of all.

        Args:
          spec: its description.
          nodes: its weights by path. Where s is not alpha / rank but for rounding, they say it.

        Raises:
          RequestError: there is no room for it.
        """
        try:
            kept = adapter_values("the adapter", _tree_of(nodes), self.slots) if nodes else {}
        except BankError as error:
            raise RequestError(str(error)) from None
        values = values_of(kept, self.slots, self.leaves)
        s = np.float32(spec.alpha / spec.rank)
        scales = {
            path: np.where((x == 0) | np.isclose(x, s, rtol=1e-5, atol=0), s, x)
            for path, x in ((path, np.asarray(v["scale"])) for path, v in values.items())
        }
        factors = {path: {name: v[name] for name in ("a", "b")} for path, v in values.items()}
        return Adapter(spec, *self._place((factors, scales)))


def _is_matrix(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding")


def _tree_of(nodes: Nodes) -> Tree:
    """Returns nodes as a tree of their own."""
    tree: dict[str, Tree] = {}
    for path, node in nodes.items():
        *folders, last = path.split("/")
        functools.reduce(lambda at, name: at.setdefault(name, {}), folders, tree)[last] = node
    return tree
