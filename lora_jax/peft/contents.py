"""Writes an adapted tree as PEFT has it in an adapter's folder: its fields and its tensors."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.buckets.copies import writes_to_buckets
from lora_jax.core.base import as_array
from lora_jax.core.types import JsonObject, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, leaves_of
from lora_jax.folders import TEMPLATE_FILE, check_free, local_path, new_folder
from lora_jax.hf.keys import Row
from lora_jax.hf.stored.raw import array_entry, write_tensors
from lora_jax.lorafy import nodes_of
from lora_jax.peft import config as configuration
from lora_jax.peft.config import INVOCATION
from lora_jax.peft.copies import add_head_names, add_heads, tied_heads
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import (
    OF_MLP,
    TAKEN_FOR_EXPERTS,
    Expert,
    end_of,
    experts_of,
    keys_of_expert,
    pack,
    side_by_side,
)
from lora_jax.peft.forms import common_form, form_of, peft_node
from lora_jax.peft.modules import (
    EMBEDDING_NAMES,
    Module,
    ends_with,
    kind_of,
    module_name,
    modules,
    places,
    tables_of,
)
from lora_jax.peft.names import FILE, PREFIX, VECTORS, bias_key, exactly, keys_of, number, token_key
from lora_jax.peft.served import as_served

PEFT_VERSION = "0.21.2"  # files have the format of this version


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
    check_free(folder, overwrite, configuration.FILE, "adapter's")
    config, tensors = contents(model, params, embedding_layers)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if for_serving:
        config, tensors = as_served(config, tensors, model)
    elif model_type in TAKEN_FOR_EXPERTS and (others := set(OF_MLP.findall("\n".join(tensors)))):
        parts = sorted(name.rstrip(".") or "its layers without experts" for name in others)
        names = ", ".join(parts)
        raise PeftError(
            f"PEFT takes gate_proj, up_proj and down_proj of a {model_type} model for its experts, "
            f"and cannot hold an adapter of {names}: leave it out (exclude=['shared_expert'], "
            "['shared_experts', 'dense/mlp']), merge the adapter, or write it for_serving"
        )
    if task_type is None and config.get(configuration.INVOCATION):
        task_type = "CAUSAL_LM"
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    with new_folder(folder) as partial:
        write_tensors(partial / FILE, {name: array_entry(array) for name, array in tensors.items()})
        text = json.dumps(dict(sorted(config.items())), indent=2)
        (partial / configuration.FILE).write_text(text + "\n", encoding="utf-8")
        for file, content in (("README.md", readme), (TEMPLATE_FILE, chat_template)):
            if content is not None:
                (partial / file).write_text(content, encoding="utf-8")


def contents(
    model: Model, params: Tree, embedding_layers: bool = True
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns the fields of adapter_config.json and the tensors of an adapted tree.

    Args:
      model: the model, or a key table; see `lora_jax.peft.save`.
      params: an adapted tree.
      embedding_layers: see `lora_jax.peft.save`.

    Raises:
      PeftError: names the part of the adapter that PEFT cannot hold.
    """
    table = tables_of(model)[0]
    nodes = nodes_of(params)
    if not nodes:
        raise PeftError("peft.save needs an adapted tree, and this one is plain")
    if off := [path for path, node in nodes.items() if not node.is_on]:
        raise PeftError(f"{off[0]!r} has no adapter in this half of the tree: join it first")
    nodes = {path: peft_node(path, node) for path, node in nodes.items()}
    rows = {row.path: row for row in table}
    if unknown := [path for path in nodes if path not in rows]:
        raise PeftError(f"{unknown[0]!r} is in no row of the model's key table")
    leaves = dict(leaves_of(params)[0])
    return _Contents(table, leaves, nodes, experts_of(model), embedding_layers).collect()


class _Contents:
    """The fields and tensors to write, put together node by node."""

    def __init__(
        self,
        table: Sequence[Row],
        leaves: Mapping[str, Leaf],
        nodes: Mapping[str, Leaf],
        experts: Sequence[Expert],
        embedding_layers: bool,
    ) -> None:
        self._rows, self._places = {row.path: row for row in table}, places(table)
        self._leaves, self._embedding_layers = leaves, embedding_layers
        self._lora = {p: n for p, n in nodes.items() if isinstance(n, LoraWeight)}
        self._trained = {p: n for p, n in nodes.items() if not isinstance(n, LoraWeight)}
        tied = [row for row in table if row.aliases]
        whole = (nodes[row.path] for row in tied if row.path in nodes)
        self._tied = any(not isinstance(n, LoraWeight) or n.uses == "all" for n in whole)
        self._all = modules(table, tied=self._tied)
        self._heads = tied_heads(nodes, tied) if self._tied else {}
        self._adapted = [m for m in self._all if self._rank(m)]
        self._all_experts = experts
        self._experts = [e for e in experts if self._rank(e)]
        written = {m.path for m in [*self._adapted, *self._experts]}
        if lost := sorted(set(self._lora) - written):
            raise PeftError(f"{lost[0]!r} is adapted, and transformers has no such module")
        self._form = common_form(self._lora)
        self._tensors: dict[str, np.ndarray] = {}

    def _rank(self, module: Module) -> int:
        """Returns r of a module, 0 if it is not adapted."""
        node = self._lora.get(module.path)
        if node is None:
            return 0
        if node.uses == "each" and module.uses in ("lookup", "product"):
            return node.rank // 2
        layer = module.index[0] if module.index and len(node.ranks) > 1 else 0
        return node.ranks[layer] if node.uses == module.uses else 0

    def collect(self) -> tuple[JsonObject, dict[str, np.ndarray]]:
        config = self._settings()
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for module in self._adapted:
            ranks[module.name], alphas[module.name] = self._write(module)
        config |= self._write_experts(ranks, alphas)
        for table, heads in self._heads.items():
            for head in heads if table in ranks else []:
                ranks[head], alphas[head] = ranks[table], alphas[table]
        config |= self._patterns(ranks, alphas)
        config |= self._write_trained()
        for field in ("target_modules", "modules_to_save"):
            config[field] = add_head_names(config[field], self._heads)
        if self._form is not None:
            fields, shared = self._form.contents(config, self._lora, self._adapted)
            return fields, self._tensors | shared
        return config, add_heads(self._tensors, self._heads)

    def _settings(self) -> JsonObject:
        """Returns the fields that PEFT has once for all adapted modules."""
        nodes = list(self._lora.values())
        settings: dict[str, set[bool | float]] = {
            str(form.field): {name in node.has for node in nodes} for name, form in VECTORS.items()
        }
        settings["lora_dropout"] = {float(node.dropout) for node in nodes}
        may_differ = [form.field for form in VECTORS.values() if form.fill is not None]
        for name, values in settings.items():
            if len(values) > 1 and name not in may_differ:
                raise PeftError(f"PEFT has one {name} for all modules; here they differ")
        invocation, *others = {node.invocation for node in nodes} or {None}
        if others:
            raise PeftError("PEFT has one invocation for all modules; here they differ")
        return ({} if invocation is None else {INVOCATION: [*invocation]}) | {
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "inference_mode": True,
            "auto_mapping": None,
            "revision": None,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "ensure_weight_tying": self._tied,
            **{name: max(values, default=False) for name, values in settings.items()},
        }

    def _write(self, module: Module) -> tuple[int, float]:
        """Writes the tensors of one adapted module; returns its rank and alpha."""
        node, at, keys = self._lora[module.path], module.index, keys_of(module)
        rank = self._rank(module)
        if form := form_of(node):
            for key, tensor in form.tensors_of(module, node).items():
                self._put(key, tensor)
            return rank, rank  # s is in the tensors
        is_second = node.uses == "each" and module.uses == "product"
        a, b = self._factors(node.a, node.b, node, at, 2 * rank if is_second else rank)
        a, b = a[-rank:], b[-rank:]
        if node.start is not None:
            start_a, start_b = node.start
            a0, b0 = self._factors(start_a, start_b, node, at, rank)
            a, b = np.concatenate([a, a0]), np.concatenate([b, -b0])
        if module.uses == "product":  # a head: its input is the table's output
            a, b = b, a
        self._put(keys.a, a)
        self._put(keys.b, b.T)
        for name, vector in VECTORS.items():
            if name in node.has:
                self._put(keys.parts[name], np.asarray(node.arrays[name])[at].reshape(-1))
            elif any(name in other.has for other in self._lora.values()):
                self._put(keys.parts[name], np.full(b.shape[1], vector.fill))
        ends = {adapted.name.split(".")[-1] for adapted in self._adapted}
        saves = self._embedding_layers and ends & {*EMBEDDING_NAMES}
        if saves and module.kind in ("embedding", "head"):
            base = np.asarray(as_array(node.base)[at])
            self._put(keys.base_weight, base if module.is_table else base.T)
        scale = float(np.asarray(node.scale)[at])
        return len(a), scale * len(a)

    @staticmethod
    def _factors(
        a: Leaf, b: Leaf, node: LoraWeight, at: tuple[int, ...], rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns A [r, in] and B [r, out] of one member of a stack, without padding."""
        a, b = (np.asarray(v)[at].reshape(node.rank, -1)[:rank] for v in (a, b))
        return a, b

    def _write_experts(self, ranks: dict[str, int], alphas: dict[str, float]) -> JsonObject:
        """Writes the tensors of experts, as PEFT packs them; adds their ranks and alphas."""
        if not self._experts:
            return {"target_parameters": None}
        by_name: dict[str, dict[int | None, Expert]] = {}
        for expert in self._experts:
            by_name.setdefault(expert.name, {})[expert.half] = expert
            node = self._lora[expert.path]
            for what in (*node.has, *["dropout"] * bool(node.dropout)):
                raise PeftError(f"PEFT has no {what} for experts and routers: {expert.path!r}")
        for name, halves in by_name.items():
            factors = {half: self._expert_factors(expert) for half, expert in halves.items()}
            if None in factors:
                a, b, scale = factors[None]
            else:
                a, b, scale = side_by_side(factors.get(0), factors.get(1))
            ranks[name], alphas[name] = a.shape[1], scale * a.shape[1]
            key_a, key_b = keys_of_expert(next(iter(halves.values())), self._experts)
            packed_a, packed_b = pack(a, b)
            self._put(key_a, packed_a)
            self._put(key_b, packed_b)
        ends = sorted({end_of(name) for name in by_name})
        every_layer = {
            e.name for e in self._all_experts if end_of(e.name) in ends
        } == by_name.keys()
        return {"target_parameters": ends if every_layer else sorted(by_name)}

    def _expert_factors(self, expert: Expert) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns A [experts, r, in], B [experts, r, out] and s of a layer's experts or router."""
        node, rank = self._lora[expert.path], self._rank(expert)
        (layer,) = expert.index
        scales = np.unique(np.asarray(node.scale)[layer])
        if len(scales) > 1:
            raise PeftError(f"PEFT has one alpha for all experts; those of {expert.path!r} differ")
        parts = [(node.a, node.b)] + ([node.start] if node.start is not None else [])
        whole = (expert.n, node.rank, -1)  # a router has no axis of experts
        a, b = (
            [np.asarray(factor)[layer].reshape(whole)[:, :rank] for factor in factors]
            for factors in zip(*parts, strict=True)
        )
        b[1:] = [-factor for factor in b[1:]]
        return np.concatenate(a, axis=1), np.concatenate(b, axis=1), float(scales[0])

    def _put(self, key: str, array: np.ndarray) -> None:
        self._tensors[key] = np.ascontiguousarray(array)

    def _patterns(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> JsonObject:
        """Returns the fields on targets, ranks and alphas."""
        if not ranks:
            # PEFT has no adapter without a target; one that matches nothing is an error there.
            raise PeftError("nothing is adapted: PEFT needs one module with a LoRA at least")
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        names = [module.name for module in self._adapted]
        return {
            "target_modules": self._targets(names) if names else None,
            "r": rank,
            "lora_alpha": number(alpha),
            "rank_pattern": {exactly(n): r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {exactly(n): number(v) for n, v in alphas.items() if v != alpha},
        }

    def _targets(self, names: list[str]) -> list[str]:
        """Shortens names to their last parts, if these select no other module."""
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        # Modules that hold others, too: "0" names a layer of a list as well as a kernel of a block.
        every = {module.name for module in self._all}
        every |= {name[: dot.start()] for name in every for dot in re.finditer(r"\.", name)}
        others = every - set(names)
        clash = [n for n in others if n in ends or ends_with(n, ends)]
        return sorted(names) if clash else ends

    def _write_trained(self) -> JsonObject:
        """Writes trained biases, tokens and whole modules; returns their fields."""
        biases: list[str] = []
        whole: list[str] = []
        tokens: dict[str, list[int]] = {}
        for path, node in self._trained.items():
            row = self._rows[path]
            names = row.hf_names
            if isinstance(node, TrainedRows) and node.is_table:
                name = module_name(row.hf)
                tokens[name] = list(node.rows)
                self._put(token_key(name), np.asarray(node.value))
                continue
            if isinstance(node, TrainedRows):
                names = [names[layer] for layer in node.rows]
            if not row.hf.endswith((".bias", ".weight")):
                raise PeftError(
                    f"{path!r} trains in full; PEFT saves whole modules, and this is none"
                )
            (biases if row.hf.endswith(".bias") else whole).extend(names)
        adapted = {module.name for module in self._adapted}
        saved = {module_name(name) for name in whole}
        if wrong := sorted(saved & adapted):
            raise PeftError(f"{wrong[0]} is adapted and trains in full; PEFT has one or the other")
        loose = [name for name in biases if module_name(name) not in saved]
        kind = self._bias_kind(loose, adapted, saved)
        if kind is None:  # biases of modules of their own (norms): save these whole
            saved |= {module_name(name) for name in loose} - adapted
            loose = [name for name in loose if module_name(name) in adapted]
            kind = self._bias_kind(loose, adapted, saved)
        if kind is None:
            raise PeftError(
                "PEFT trains the biases of all modules, or of all adapted ones; here others train, "
                f"such as {loose[0]}"
            )
        for name in loose:
            self._put(bias_key(name, adapted), self._tensor(name))
        for name in self._places:
            if module_name(name) in saved:
                self._put(f"{PREFIX}{name}", self._tensor(name))
        return {
            "bias": kind,
            "modules_to_save": self._name_whole_head(saved) or None,
            "trainable_token_indices": tokens or None,
        }

    def _bias_kind(self, names: Sequence[str], adapted: set[str], saved: set[str]) -> str | None:
        """Returns PEFT's `bias` for trained biases other than saved modules'; None if none fits."""
        every = {name for name in self._places if name.endswith(".bias")}
        every = {name for name in every if module_name(name) not in saved}
        of_adapted = {name for name in every if module_name(name) in adapted}
        if not names:
            return "none"
        if set(names) == of_adapted:
            return "lora_only"
        return "all" if set(names) == every else None

    def _name_whole_head(self, saved: set[str]) -> list[str]:
        """Names a classifier's layers as one module, as PEFT trains it and engines accept it."""
        places = self._places.items()
        head = {module_name(name) for name, (row, _) in places if kind_of(row) == "classifier"}
        whole = {name.partition(".")[0] for name in head}
        return sorted((saved | whole) - head if whole != head <= saved else saved)

    def _tensor(self, name: str) -> np.ndarray:
        """Returns one of PyTorch's tensors, as it has been trained."""
        row, index = self._places[name]
        leaf = self._leaves[row.path]
        whole = leaf.merged() if isinstance(leaf, Trained | TrainedRows) else leaf
        array: np.ndarray = np.asarray(whole)[index]
        return array.T if row.transpose else array
