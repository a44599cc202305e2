"""Converts an adapted tree to the configuration fields and tensors of a PEFT adapter."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_jax.buckets.copies import writes_to_buckets
from lora_jax.core.base import as_array
from lora_jax.core.types import JsonObject, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, leaves_of
from lora_jax.folders import TEMPLATE_FILE, check_writable, local_path, new_folder
from lora_jax.hf.keys import Row, reorder_axes
from lora_jax.hf.stored.raw import entry_of_array, write_tensors
from lora_jax.lorafy import nodes_of
from lora_jax.peft import config as configuration
from lora_jax.peft.config import INVOCATION_FIELD
from lora_jax.peft.copies import add_head_copies, add_head_names, find_tied_heads
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import (
    MLP_PROJECTION,
    MODEL_TYPES_TAKEN_FOR_EXPERTS,
    Expert,
    common_end_of_name,
    join_gate_and_up,
    keys_of_expert,
    list_experts,
    pack_expert_factors,
)
from lora_jax.peft.forms import as_peft_node, find_common_form, form_of_node
from lora_jax.peft.modules import (
    EMBEDDING_NAMES,
    Module,
    ends_with,
    kind_of,
    list_modules,
    locate_tensors,
    module_name,
    tables_by_names,
)
from lora_jax.peft.names import (
    KEY_PREFIX,
    VECTOR_PARTS,
    WEIGHTS_FILE,
    as_peft_number,
    bias_key,
    exact_name_pattern,
    keys_of,
    token_key,
)
from lora_jax.peft.served import convert_for_serving

PEFT_VERSION = "0.21.2"  # the files have the format of this version


@writes_to_buckets(by_all=False)
def save(
    folder: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    readme: str | None = None,
    chat_template: str | None = None,
    overwrite: bool = False,
    embedding_layers: bool = True,
    for_serving: bool = False,
) -> None:
    """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
      folder: created, its parents too; appears whole or not at all. One process alone writes it.
      model: the model of `lora_jax.models`, or the key table of another tree; see `load`.
      params: an adapted tree. Initialisers that take factors out of the base (PiSSA, OLoRA) are
        written as plain LoRA of twice the rank on the original base, and compact variants that PEFT
        does not have as plain LoRA. A kind of its own in PEFT is written as `lora_jax.peft.forms`
        says.
      base_model: the base's hub name or folder, which PEFT's ``AutoPeftModel`` reads.
      task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS". By default there is none, but
        "CAUSAL_LM" for an activated LoRA, which PEFT runs for this type alone.
      readme: the text of README.md, the hub's model card; None for none.
      chat_template: the template that rendered the chats it was trained on, if it has its own.
      overwrite: replace an adapter's folder. Without it, an existing folder is an error.
      embedding_layers: whether the base of an adapted table or head is written, too, as PEFT does
        by default (``save_embedding_layers``).
      for_serving: writes the same function in the layout that vLLM reads: one rank, scales in B,
        every projection of experts; see `lora_jax.peft.served`.

    Raises:
      PeftError: names the part of the adapter that PEFT cannot hold.
      FileExistsError: if the folder exists; with `overwrite`, if it is no adapter's folder.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> from lora_jax import peft
    >>> import tempfile
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["c_attn"], rank=2)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peft.save(f"{folder}/peft", model, tree, task_type="CAUSAL_LM")
    ...     loaded = peft.load(f"{folder}/peft", model, params)
    ...     peft.serving_problems(f"{folder}/peft")
    []
    """
    folder = local_path(folder).absolute()
    check_writable(folder, overwrite, configuration.CONFIG_FILE, "an adapter")
    config, tensors = adapter_contents(model, params, embedding_layers)
    if for_serving:
        config, tensors = convert_for_serving(config, tensors, model)
    else:
        _check_not_taken_for_experts(tensors, model)
    if task_type is None and config.get(configuration.INVOCATION_FIELD):
        task_type = "CAUSAL_LM"
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    with new_folder(folder) as partial:
        write_tensors(
            partial / WEIGHTS_FILE, {name: entry_of_array(array) for name, array in tensors.items()}
        )
        text = json.dumps(dict(sorted(config.items())), indent=2)
        (partial / configuration.CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for file, content in (("README.md", readme), (TEMPLATE_FILE, chat_template)):
            if content is not None:
                (partial / file).write_text(content, encoding="utf-8")


def _check_not_taken_for_experts(keys: Iterable[str], model: Model) -> None:
    """Raises a PeftError if PEFT would mistake adapted MLPs for experts."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in MODEL_TYPES_TAKEN_FOR_EXPERTS:
        return
    prefixes = set(MLP_PROJECTION.findall("\n".join(keys)))
    if prefixes:
        layers = sorted(prefix.rstrip(".") or "its layers without experts" for prefix in prefixes)
        raise PeftError(
            f"PEFT takes gate_proj, up_proj and down_proj of a {model_type} model for its experts, "
            f"so it cannot hold the adapter of {', '.join(layers)}. Exclude these layers from the "
            "rules (exclude=['shared_expert'] or ['shared_experts', 'dense/mlp']), merge the "
            "adapter, or write it with for_serving=True."
        )


def adapter_contents(
    model: Model, params: Tree, embedding_layers: bool = True
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns the adapter_config.json fields and the tensors of an adapted tree.

    Args:
      model: the model, or a key table; see `lora_jax.peft.save`.
      params: an adapted tree.
      embedding_layers: see `lora_jax.peft.save`.

    Raises:
      PeftError: names the part of the adapter that PEFT cannot hold.
    """
    table = tables_by_names(model)[0]
    nodes = nodes_of(params)
    if not nodes:
        raise PeftError(
            "The tree has no adapter to save. Pass the adapted tree that lorafy returned."
        )
    for path, node in nodes.items():
        if not node.is_on:
            raise PeftError(
                f"{path!r} has no adapter in this half of a split tree. Join the two halves first "
                "with lora_jax.join."
            )
    nodes = {path: as_peft_node(path, node) for path, node in nodes.items()}
    table_paths = {row.path for row in table}
    for path in nodes:
        if path not in table_paths:
            raise PeftError(
                f"{path!r} is adapted, but the model's key table has no row for it. Pass the model "
                "or the key table that belongs to this tree."
            )
    return _ContentsWriter(
        table=table,
        leaves=dict(leaves_of(params)[0]),
        nodes=nodes,
        experts=list_experts(model),
        embedding_layers=embedding_layers,
    ).collect()


class _ContentsWriter:
    """Collects the fields and tensors of an adapter's files, node by node.

    Args:
      table: the model's key table.
      leaves: the leaves of the adapted tree, by path.
      nodes: the nodes of the adapted tree as PEFT has them, by path.
      experts: the kernels of the model's experts and routers.
      embedding_layers: whether the base of an adapted table or head is written, too.
    """

    def __init__(
        self,
        table: Sequence[Row],
        leaves: Mapping[str, Leaf],
        nodes: Mapping[str, Leaf],
        experts: Sequence[Expert],
        embedding_layers: bool,
    ) -> None:
        self._rows = {row.path: row for row in table}
        self._location_of_tensor = locate_tensors(table)
        self._leaves = leaves
        self._embedding_layers = embedding_layers
        self._lora_nodes: dict[str, LoraWeight] = {}
        self._trained_nodes: dict[str, Leaf] = {}
        for path, node in nodes.items():
            if isinstance(node, LoraWeight):
                self._lora_nodes[path] = node
            else:
                self._trained_nodes[path] = node
        # PEFT ties the two uses of a table if they share an adapter, or a value trained in full.
        tied_rows = [row for row in table if row.aliases]
        tied_nodes = [nodes[row.path] for row in tied_rows if row.path in nodes]
        self._ties_tables = any(
            not isinstance(node, LoraWeight) or node.uses == "all" for node in tied_nodes
        )
        self._modules = list_modules(table, tied=self._ties_tables)
        self._heads_of_table = find_tied_heads(nodes, tied_rows) if self._ties_tables else {}
        self._adapted_modules = [module for module in self._modules if self._rank_of_module(module)]
        self._experts = experts
        self._adapted_experts = [expert for expert in experts if self._rank_of_module(expert)]
        module_paths = {module.path for module in [*self._adapted_modules, *self._adapted_experts]}
        paths_without_module = sorted(set(self._lora_nodes) - module_paths)
        if paths_without_module:
            raise PeftError(
                f"{paths_without_module[0]!r} is adapted, but transformers has no such module, so "
                "PEFT cannot hold its adapter. Exclude it from the rules, or merge the adapter."
            )
        self._form = find_common_form(self._lora_nodes)
        self._tensors: dict[str, np.ndarray] = {}

    def _rank_of_module(self, module: Module) -> int:
        """Returns r of a module; 0 if the module is not adapted."""
        node = self._lora_nodes.get(module.path)
        if node is None:
            return 0
        # A table with an adapter for each use has the ranks of both.
        if node.uses == "each" and module.uses in ("lookup", "product"):
            return node.rank // 2
        layer = module.index[0] if module.index and len(node.ranks) > 1 else 0
        return node.ranks[layer] if node.uses == module.uses else 0

    def collect(self) -> tuple[JsonObject, dict[str, np.ndarray]]:
        """Returns the fields of the configuration, and the tensors by key.

        Raises:
          PeftError: names the part of the adapter that PEFT cannot hold.
        """
        config = self._common_fields()
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for module in self._adapted_modules:
            ranks[module.name], alphas[module.name] = self._write_module(module)
        config |= self._write_experts(ranks, alphas)
        # The head of a tied table has the same rank and alpha.
        for table, heads in self._heads_of_table.items():
            if table in ranks:
                ranks |= dict.fromkeys(heads, ranks[table])
                alphas |= dict.fromkeys(heads, alphas[table])
        config |= self._target_fields(ranks, alphas)
        config |= self._write_trained_leaves()
        for field in ("target_modules", "modules_to_save"):
            config[field] = add_head_names(config[field], self._heads_of_table)
        if self._form is not None:
            fields, shared = self._form.adapter_contents(
                config, self._lora_nodes, self._adapted_modules
            )
            return fields, self._tensors | shared
        return config, add_head_copies(self._tensors, self._heads_of_table)

    def _common_fields(self) -> JsonObject:
        """Returns the fields that are equal for all adapted modules."""
        nodes = list(self._lora_nodes.values())
        settings: dict[str, set[bool | float]] = {}
        for name, form in VECTOR_PARTS.items():
            settings[str(form.field)] = {name in node.has for node in nodes}
        settings["lora_dropout"] = {float(node.dropout) for node in nodes}
        fields_that_may_differ = [
            form.field for form in VECTOR_PARTS.values() if form.fill is not None
        ]
        for name, values in settings.items():
            if len(values) > 1 and name not in fields_that_may_differ:
                raise PeftError(
                    f"PEFT has one {name} for all modules, but the rules here differ in it. "
                    "Use the same value in all rules."
                )
        invocations = {node.invocation for node in nodes}
        if len(invocations) > 1:
            raise PeftError(
                "PEFT has one invocation for all modules, but the rules of this tree have several. "
                "Use the same invocation in all rules."
            )
        (invocation,) = invocations or {None}
        fields: JsonObject = {} if invocation is None else {INVOCATION_FIELD: [*invocation]}
        return fields | {
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "inference_mode": True,
            "auto_mapping": None,
            "revision": None,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "ensure_weight_tying": self._ties_tables,
            **{name: max(values, default=False) for name, values in settings.items()},
        }

    def _write_module(self, module: Module) -> tuple[int, float]:
        """Writes the tensors of one adapted module; returns its rank and alpha."""
        node = self._lora_nodes[module.path]
        keys = keys_of(module)
        rank = self._rank_of_module(module)
        form = form_of_node(node)
        # A kind of adapter beside LoRA has tensors of its own, with s in them.
        if form is not None:
            for key, tensor in form.module_tensors(module, node).items():
                self._add_tensor(key, tensor)
            return rank, rank
        a, b = self._factors_of_module(node, module, rank)
        self._add_tensor(keys.a, a)
        self._add_tensor(keys.b, b.T)
        for name, vector in VECTOR_PARTS.items():
            if name in node.has:
                self._add_tensor(
                    keys.vectors[name], np.asarray(node.arrays[name])[module.index].reshape(-1)
                )
            elif any(name in weight.has for weight in self._lora_nodes.values()):
                self._add_tensor(keys.vectors[name], np.full(b.shape[1], vector.fill))
        # PEFT saves the base of embeddings and heads if one of them is adapted.
        last_names = {adapted.name.split(".")[-1] for adapted in self._adapted_modules}
        saves_bases = self._embedding_layers and last_names & {*EMBEDDING_NAMES}
        if saves_bases and module.kind in ("embedding", "head"):
            base = np.asarray(as_array(node.base)[module.index])
            self._add_tensor(keys.base_weight, base if module.is_table else base.T)
        scale = float(np.asarray(node.scale)[module.index])
        return len(a), scale * len(a)

    @staticmethod
    def _factors_of_module(
        node: LoraWeight, module: Module, rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns A [r, in] and B [r, out] of a module.

        W + s(AB − A₀B₀) is W + s·[A A₀][B; −B₀].
        """

        def member(factor: Leaf) -> np.ndarray:
            layer_factor: np.ndarray = np.asarray(factor)[module.index]
            return layer_factor.reshape(node.rank, -1)

        # The head of a table with an adapter for each use has the second half of the ranks.
        is_second = node.uses == "each" and module.uses == "product"
        ranks = slice(rank, 2 * rank) if is_second else slice(rank)
        a, b = member(node.a)[ranks], member(node.b)[ranks]
        if node.start is not None:
            start_a, start_b = node.start
            a = np.concatenate([a, member(start_a)[:rank]])
            b = np.concatenate([b, -member(start_b)[:rank]])
        if module.uses == "product":  # a head: its input is the table's output
            return b, a
        return a, b

    def _write_experts(self, ranks: dict[str, int], alphas: dict[str, float]) -> JsonObject:
        """Adds the packed tensors of experts and routers; returns the fields that name them.

        Args:
          ranks, alphas: receive the rank and alpha of each parameter, by its name.
        """
        if not self._adapted_experts:
            return {"target_parameters": None}
        halves_by_name: dict[str, dict[int | None, Expert]] = {}
        for expert in self._adapted_experts:
            halves_by_name.setdefault(expert.name, {})[expert.half] = expert
            node = self._lora_nodes[expert.path]
            unsupported = [*node.has]
            if node.dropout:
                unsupported.append("dropout")
            if unsupported:
                raise PeftError(
                    f"PEFT has no {unsupported[0]} for experts and routers, but {expert.path!r} "
                    "has it. Train without it, or merge the adapter."
                )
        for name, halves in halves_by_name.items():
            factors = {half: self._factors_of_experts(expert) for half, expert in halves.items()}
            if None in factors:
                a, b, scale = factors[None]
            else:
                a, b, scale = join_gate_and_up(factors.get(0), factors.get(1))
            # a is [experts, r, in], and b is [experts, r, out].
            ranks[name] = a.shape[1]
            alphas[name] = scale * a.shape[1]
            key_a, key_b = keys_of_expert(next(iter(halves.values())), self._adapted_experts)
            packed_a, packed_b = pack_expert_factors(a, b)
            self._add_tensor(key_a, packed_a)
            self._add_tensor(key_b, packed_b)
        # If all layers are adapted, the ends of the names select them.
        ends = sorted({common_end_of_name(name) for name in halves_by_name})
        names_with_ends = {
            expert.name for expert in self._experts if common_end_of_name(expert.name) in ends
        }
        adapts_all_layers = names_with_ends == halves_by_name.keys()
        return {"target_parameters": ends if adapts_all_layers else sorted(halves_by_name)}

    def _factors_of_experts(self, expert: Expert) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns A [experts, r, in], B [experts, r, out] and s of a layer's experts or router."""
        node = self._lora_nodes[expert.path]
        rank = self._rank_of_module(expert)
        layer = expert.index  # () outside of a stack
        scales = np.unique(np.asarray(node.scale)[layer])
        if len(scales) > 1:
            raise PeftError(
                f"PEFT has one alpha for all experts of a layer, but those of {expert.path!r} "
                "differ. Use one alpha for them."
            )

        def layer_factor(factor: Leaf) -> np.ndarray:
            # The reshape gives a router, which has no axis of experts, one of size 1.
            factors: np.ndarray = np.asarray(factor)[layer]
            return factors.reshape(expert.n_experts, node.rank, -1)[:, :rank]

        a, b = layer_factor(node.a), layer_factor(node.b)
        if node.start is not None:
            start_a, start_b = node.start
            a = np.concatenate([a, layer_factor(start_a)], axis=1)
            b = np.concatenate([b, -layer_factor(start_b)], axis=1)
        return a, b, float(scales[0])

    def _add_tensor(self, key: str, array: np.ndarray) -> None:
        self._tensors[key] = np.ascontiguousarray(array)

    def _target_fields(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> JsonObject:
        """Returns the fields for targets, ranks and alphas.

        The most common rank and alpha become r and lora_alpha; patterns name the other modules.
        """
        if not ranks:
            # PEFT has no adapter without a target; one that matches nothing is an error there.
            raise PeftError(
                "The tree adapts no module with LoRA, but a PEFT adapter needs at least one. Add a "
                "LoraRule."
            )
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        names = [module.name for module in self._adapted_modules]
        return {
            "target_modules": self._shorten_targets(names) if names else None,
            "r": rank,
            "lora_alpha": as_peft_number(alpha),
            "rank_pattern": {
                exact_name_pattern(name): value for name, value in ranks.items() if value != rank
            },
            "alpha_pattern": {
                exact_name_pattern(name): as_peft_number(value)
                for name, value in alphas.items()
                if value != alpha
            },
        }

    def _shorten_targets(self, names: list[str]) -> list[str]:
        """Returns the last parts of names if these select no other modules."""
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        # Modules that hold others, too: "0" names a layer of a list as well as a kernel of a block.
        module_names = {module.name for module in self._modules}
        for module in self._modules:
            module_names |= {module.name[: dot.start()] for dot in re.finditer(r"\.", module.name)}
        is_ambiguous = any(
            name in ends or ends_with(name, ends) for name in module_names - set(names)
        )
        return sorted(names) if is_ambiguous else ends

    def _write_trained_leaves(self) -> JsonObject:
        """Adds the tensors of biases, tokens and modules that train; returns their fields."""
        biases: list[str] = []
        weights: list[str] = []
        tokens: dict[str, list[int]] = {}
        for path, node in self._trained_nodes.items():
            row = self._rows[path]
            names = row.hf_names
            if isinstance(node, TrainedRows) and node.is_table:
                name = module_name(row.hf)
                tokens[name] = list(node.rows)
                self._add_tensor(token_key(name), np.asarray(node.value))
                continue
            if isinstance(node, TrainedRows):
                names = [names[layer] for layer in node.rows]
            if not row.hf.endswith((".bias", ".weight")):
                raise PeftError(
                    f"{path!r} trains in full, but it belongs to no module that PEFT can save. "
                    "Exclude it from the rules, or merge the adapter."
                )
            if row.hf.endswith(".bias"):
                biases += names
            else:
                weights += names
        adapted = {module.name for module in self._adapted_modules}
        saved = {module_name(name) for name in weights}
        if saved & adapted:
            raise PeftError(
                f"{min(saved & adapted)} is adapted and also trains in full, but PEFT allows only "
                "one of the two. Remove one of the rules."
            )
        biases = [name for name in biases if module_name(name) not in saved]
        kind = self._bias_field(biases, adapted, saved)
        # Biases of modules that are not adapted, such as norms, are saved with their modules.
        if kind is None:
            saved |= {module_name(name) for name in biases} - adapted
            biases = [name for name in biases if module_name(name) in adapted]
            kind = self._bias_field(biases, adapted, saved)
        if kind is None:
            raise PeftError(
                "PEFT trains the biases of all modules, or of all adapted modules, but this tree "
                f"trains other biases, such as {biases[0]}. Change the rules, or merge the adapter."
            )
        for name in biases:
            self._add_tensor(bias_key(name, adapted), self._trained_tensor(name))
        for name in self._location_of_tensor:
            if module_name(name) in saved:
                self._add_tensor(f"{KEY_PREFIX}{name}", self._trained_tensor(name))
        return {
            "bias": kind,
            "modules_to_save": self._name_whole_head(saved) or None,
            "trainable_token_indices": tokens or None,
        }

    def _bias_field(self, names: Sequence[str], adapted: set[str], saved: set[str]) -> str | None:
        """Returns PEFT's field `bias` for the trained biases; None if no value fits.

        Args:
          names: the trained biases of modules that are not saved whole.
          adapted: the names of the adapted modules.
          saved: the names of the modules that are saved whole.
        """
        if not names:
            return "none"
        biases = {
            name
            for name in self._location_of_tensor
            if name.endswith(".bias") and module_name(name) not in saved
        }
        adapted_biases = {name for name in biases if module_name(name) in adapted}
        if set(names) == adapted_biases:
            return "lora_only"
        return "all" if set(names) == biases else None

    def _name_whole_head(self, saved: set[str]) -> list[str]:
        """Returns saved modules' names, with one for a classifier's layers.

        PEFT trains a classifier as one module, and engines accept it under this name only.
        """
        layers = {
            module_name(name)
            for name, (row, _) in self._location_of_tensor.items()
            if kind_of(row) == "classifier"
        }
        classifiers = {name.partition(".")[0] for name in layers}
        has_layers = classifiers != layers
        if has_layers and layers <= saved:
            return sorted((saved | classifiers) - layers)
        return sorted(saved)

    def _trained_tensor(self, name: str) -> np.ndarray:
        """Returns the trained value of one PyTorch tensor."""
        row, index = self._location_of_tensor[name]
        leaf = self._leaves[row.path]
        if isinstance(leaf, Trained | TrainedRows):
            leaf = leaf.merged()
        array: np.ndarray = np.asarray(leaf)[index]
        return reorder_axes(row, array)
