"""Decoder-only language models in Flax Linen, from Llama to Phi-3; see ``DecoderConfig``.

Layers of one kind are stacked and scanned. A run is a number of consecutive layers whose kinds
repeat in a pattern, a period is one repetition of the pattern, and a stack has the layers of one
place in the pattern (see ``DecoderConfig.runs``).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.causal import CausalLM, output_head
from lora_jax.models.decoder.blocks import multiply, rms_norm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts, check_experts
from lora_jax.models.decoder.gemma4 import compute_layer_inputs, select_reused_keys
from lora_jax.models.decoder.layer import DecoderLayer, SharedLayerInput, SingleLayerInput
from lora_jax.models.decoder.rope import RopeAngles, compute_rope_angles
from lora_jax.models.layers.blocks import (
    EmbeddingNoise,
    ModelPart,
    add_noise,
    dense,
    embed,
    insert_vectors,
)
from lora_jax.models.layers.cache import Cache, NewEntries
from lora_jax.models.layers.delta import RecurrentTokens
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import TokenPlaces, rematerialise, scan_layers


class Decoder(CausalLM):
    """A causal language model with scanned layers, so that compile time is independent of depth.

    Parameters are a plain nested dict under Hugging Face's module names, less the layer number:
    ``model/layers/self_attn/q_proj/kernel`` is [layers, d_model, heads * head_dim].

    Attributes:
      config: the options of the forward pass.
      dtype: dtype of the computation. Norms' statistics, RoPE, routers, softmax and logits are
        fp32 (or float64, where dtype is).
      param_dtype: dtype of the parameters that ``init`` makes.
      remat: recompute each layer in the backward pass. True keeps nothing but the layer's input,
        and xA of narrow adapters; "attention" keeps what a kernel of attention returns as well,
        "projections" what attention's projections return too, "products" what an MLP's products do;
        "products:7" is "products" for the last seven layers, and "projections" for the others;
        "offload" keeps the input alone, in the host's memory; a policy of
        ``jax.checkpoint_policies`` by name, such as "dots_saveable", keeps what it says.
      placement: the activations' place on a mesh; see ``Placement``.
      attention: the implementation of attention: "auto", another name, or a function; see
        ``lora_jax.models.layers.attend.implementation``.
      experts: the implementation of a mixture's products: "auto", "blocks", "ragged", or a
        function; see ``lora_jax.models.decoder.experts.implementation``. Anything but "auto" is an
        error for a model without experts.
    """

    config: DecoderConfig
    experts: str | Experts = "auto"
    TRUNK = "model"

    def setup(self) -> None:
        check_experts(self.config, self.experts)
        self.model = Trunk(*self.options, experts=self.experts)
        self.lm_head = output_head(self)


class Trunk(ModelPart):
    """Embedding, scanned layers and the final norm, without the head.

    ``vectors`` replace the embedded tokens where ``is_vector``; see ``insert_vectors``.
    ``routing``, [batch, seq, layers, k] int, are the experts that tokens go through, such as those
    of a sampler; -1 stands for the router's choice.
    """

    config: DecoderConfig
    experts: str | Experts = "auto"
    n_positions = None

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = embed(self, cfg.vocab_size)
        self.layers = stack_layers(self)
        self.norm = rms_norm(self)
        if size := cfg.hidden_size_per_layer_input:
            width = cfg.num_hidden_layers * size
            self.embed_tokens_per_layer = embed(self, cfg.vocab_size_per_layer_input, width=width)
            self.per_layer_model_projection = dense(self, width, use_bias=False)
            self.per_layer_projection_norm = rms_norm(self)

    @property
    def words(self) -> nn.Embed:
        return self.embed_tokens

    def __call__(
        self,
        input_ids: jax.Array,
        placed: TokenPlaces,
        mask: Mask,
        cache: Cache | None,
        embedding_noise: EmbeddingNoise | None,
        is_vector: jax.Array | None = None,
        vectors: jax.Array | None = None,
        routing: jax.Array | None = None,
    ) -> tuple[jax.Array, NewEntries]:
        cfg = self.config
        self._check_routing(routing)
        rope, other_rope = self._rotations(placed, cache)
        step = SharedLayerInput(
            rope=rope,
            other_rope=other_rope,
            mask=mask,
            filled=placed.first_slot,
            tokens=RecurrentTokens(placed.is_token, mask.queries.segments),
        )

        x = add_noise(self.embed_tokens(input_ids), embedding_noise)
        if cfg.scale_embeddings:
            x = x * cfg.hidden_size**0.5
        per_layer_inputs = None
        if cfg.hidden_size_per_layer_input:
            per_layer_inputs = compute_layer_inputs(self, self.embed_tokens_per_layer(input_ids), x)
        x = insert_vectors(multiply(x, cfg.embedding_multiplier), is_vector, vectors)
        x = self.placement.constrain(x, "residual")

        # The experts of each layer's tokens: given ones, or the router's choice for the cache.
        if routing is not None:
            routing = jnp.moveaxis(routing, 2, 0)  # layers first
        elif cache is not None and cache.routing is not None:
            shape = (cfg.num_hidden_layers, *input_ids.shape, cache.routing.shape[-1])
            routing = jnp.full(shape, -1, jnp.int32)
        layer_indices = np.arange(cfg.num_hidden_layers)
        layers = SingleLayerInput(
            windowed=jnp.asarray(np.isin(layer_indices, cfg.windowed_layers)),
            is_rotated_apart=jnp.asarray(np.isin(layer_indices, cfg.layers_rotated_apart)),
            cache=cache and cache.layers,
            recurrent=cache and cache.recurrent,
            inputs=per_layer_inputs,
            routing=routing,
        )
        x, (entries, experts) = run_layers(self.layers, "", x, step, layers)
        if cache is not None:  # (keys, values, memories or None, experts or None)
            padding = [None] * (3 - len(entries))
            entries = (*entries, *padding, experts)
        return self.placement.constrain(self.norm(x), "inputs"), entries

    @nn.nowrap  # adds no scope of its own to the program
    def _rotations(
        self, placed: TokenPlaces, cache: Cache | None
    ) -> tuple[RopeAngles, RopeAngles | None]:
        """Returns the RoPE angles of most layers, and of the layers that differ, or None."""
        cfg, positions = self.config, placed.positions
        length = jnp.max(positions) + 1 if cache is None else cache.max_len
        rope = compute_rope_angles(
            positions if placed.rope_positions is None else placed.rope_positions, cfg, length
        )
        if cfg.rope_free_layers:
            return rope, RopeAngles(jnp.ones_like(rope.cos), jnp.zeros_like(rope.sin))
        if cfg.rope_local_theta is not None:
            return rope, compute_rope_angles(positions, cfg, length, local=True)
        return rope, None

    def _check_routing(self, routing: jax.Array | None) -> None:
        """Raises a ValueError for routing with a wrong number of layers, or for dense models."""
        cfg = self.config
        layers_and_choices = (
            cfg.num_hidden_layers,
            cfg.num_experts_per_tok if cfg.num_experts else 0,
        )
        if routing is not None and routing.shape[2:] != layers_and_choices:
            raise ValueError(
                f"routing has the experts of {routing.shape[2:]} layers and choices, but the model "
                f"has {layers_and_choices}. Pass routing of the shape [batch, seq, layers, k] to a "
                "model with experts."
            )


class Period(ModelPart):
    """The layers of one repetition of a run's pattern, named ``0of4`` to ``3of4``."""

    config: DecoderConfig
    experts: str | Experts = "auto"
    run: str = ""  # see ``DecoderConfig.runs``

    @nn.compact
    def __call__(
        self, x: jax.Array, step: SharedLayerInput, layers: SingleLayerInput
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs the body of a scan: x is the carry, [batch, seq, d_model]; see ``DecoderLayer``.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layers: the layers' own input: with as many entries on axis 0 as there are such layers.

        Returns:
          [batch, seq, d_model]; and the layers' keys, values and memories, stacked on axis 0, with
          the experts of each token where ``layers.routing`` is given.
        """
        make_layer = rematerialise(DecoderLayer, self.remat)
        keys_and_values: list[Any] = []  # of layers with attention, which alone are in the cache
        memories: list[Any] = []  # of linear layers
        experts_of_layers: list[Any] = []
        for i, (place, layer_indices) in enumerate(self.config.runs[self.run].items()):
            kind = self.config.kind_of(layer_indices[0])
            layer = _take_entry(layers._replace(cache=None, recurrent=None), i)
            if kind.linear:
                layer = layer._replace(recurrent=_take_entry(layers.recurrent, len(memories)))
            else:
                layer = layer._replace(cache=_take_entry(layers.cache, len(keys_and_values)))
            run_layer = make_layer(*self.options, experts=self.experts, kind=kind, name=place)
            x, (entries, experts) = run_layer(x, step, layer)
            entries_of_kind = memories if kind.linear else keys_and_values
            entries_of_kind.append(entries)
            experts_of_layers.append(experts)
        routing = None if layers.routing is None else jnp.stack(experts_of_layers)
        stacked = [_stack_trees(entries) for entries in (keys_and_values, memories) if entries]
        # Keys and values are a pair, or None without a cache; memories are one entry.
        entries = (*(stacked[0] or ()), *stacked[1:])
        return x, (entries if jax.tree.leaves(entries) else None, routing)


class Runs(ModelPart):
    """Consecutive runs of layers of different kinds; see ``DecoderConfig.runs``."""

    config: DecoderConfig
    experts: str | Experts = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, step: SharedLayerInput, layers: SingleLayerInput
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs all layers; see ``run_layers``."""
        cfg = self.config
        # A slice of the cache for each run would be a copy: all runs see the cache of all layers.
        step = step._replace(cache=layers.cache)
        layers = layers._replace(cache=None, layer_index=jnp.arange(cfg.num_hidden_layers))
        entries_of_runs = []
        experts_of_runs = []
        for run, stacks in cfg.runs.items():
            start = min(layer_indices[0] for layer_indices in stacks.values())
            stop = max(layer_indices[-1] for layer_indices in stacks.values()) + 1
            run_module = stack_layers(self, run, name=run)
            x, (entries, experts) = run_layers(
                run_module, run, x, step, _take_entry(layers, slice(start, stop))
            )
            entries_of_runs.append(entries)
            experts_of_runs.append(experts)
            # Layers of the second run reuse keys and values of the first.
            if cfg.num_kv_shared_layers and step.reused_keys is None:
                reused_keys = select_reused_keys(cfg, range(stop), entries, step.cache)
                step = step._replace(cache=None, reused_keys=reused_keys)
        routing = None if layers.routing is None else jnp.concatenate(experts_of_runs)
        if cfg.num_kv_shared_layers:  # the second run has no keys and values
            return x, (entries_of_runs[0], routing)
        entries = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *entries_of_runs)
        return x, (entries, routing)


def _take_entry(tree: Any, index: int | slice) -> Any:
    """Returns one or several entries of a tree that is stacked on axis 0."""
    return jax.tree.map(lambda x: x[index], tree)


def _stack_trees(trees: list[Any]) -> Any:
    """Stacks trees of equal structure on axis 0."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def run_layers(
    stack: nn.Module, run: str, x: jax.Array, step: SharedLayerInput, layers: SingleLayerInput
) -> Any:
    """Runs scanned layers, in periods if they are of several kinds.

    Args:
      stack: the module that ``stack_layers`` made.
      run: the name of the run.
      x, step: see ``Period``.
      layers: the layers' own input, stacked on axis 0.

    Returns:
      See ``Period``; of all layers.
    """
    config: DecoderConfig = stack.config
    layers_of_stacks = [*config.runs.get(run, {}).values()]
    has_periods = len(layers_of_stacks) > 1
    if not has_periods:
        return stack(x, step, layers)
    n_periods = len(layers_of_stacks[0])

    def split_periods(array: jax.Array) -> jax.Array:
        return array.reshape(n_periods, -1, *array.shape[1:])

    def join_periods(array: jax.Array) -> jax.Array:
        n_layers = math.prod(array.shape[:2])
        return array.reshape(n_layers, *array.shape[2:])

    x, results = stack(x, step, jax.tree.map(split_periods, layers))
    return x, jax.tree.map(join_periods, results)


def stack_layers(module: ModelPart, run: str = "", **options: Any) -> nn.Module:
    """Creates the scanned layers of a decoder's trunk, or of one of its runs.

    Args:
      module: the part of a decoder that has them.
      run: the name of the run; "" for all layers.
      **options: the name of the stack.
    """
    cfg: DecoderConfig = module.config
    options |= {"experts": module.experts}
    if run not in cfg.runs:
        return Runs(*module.options, **options)
    layer_indices = next(iter(cfg.runs[run].values()))
    if len(cfg.runs[run]) > 1:
        scanned_periods = scan_layers(Period, False, len(layer_indices))
        return scanned_periods(*module.options, run=run, **options)
    scanned_layers = scan_layers(DecoderLayer, module.remat, len(layer_indices))
    return scanned_layers(*module.options, kind=cfg.kind_of(layer_indices[0]), **options)
