"""Decoder-only language models in Flax Linen, from Llama to Phi-3: see ``DecoderConfig``."""

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
from lora_jax.models.decoder.gemma4 import keep_last, layer_inputs
from lora_jax.models.decoder.layer import DecoderLayer, PerLayer, Step
from lora_jax.models.decoder.rope import RopeAngles, rotations
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
    """A causal language model whose layers are scanned, so compile time is flat in the depth.

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
    """Embedding, scanned layers and the final norm: everything but the head.

    ``vectors`` stand in the places ``at`` of embedded tokens; see ``insert_vectors``. ``routing``,
    [batch, seq, layers, k] int, are the experts that tokens go through, such as those of a sampler;
    -1 stands for the router's choice.
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
        at: jax.Array | None = None,
        vectors: jax.Array | None = None,
        routing: jax.Array | None = None,
    ) -> tuple[jax.Array, NewEntries]:
        self._check_routing(routing)
        positions = placed.positions
        length = jnp.max(positions) + 1 if cache is None else cache.max_len
        rotated = positions if placed.rotated is None else placed.rotated
        rope = rotations(rotated, self.config, length)
        other_rope = None
        if self.config.rope_free_layers:
            other_rope = RopeAngles(jnp.ones_like(rope.cos), jnp.zeros_like(rope.sin))
        elif self.config.rope_local_theta is not None:
            other_rope = rotations(positions, self.config, length, local=True)
        tokens = RecurrentTokens(placed.present, mask.queries.segments)
        step = Step(rope, other_rope, mask, placed.first, tokens)

        x = add_noise(self.embed_tokens(input_ids), embedding_noise)
        if self.config.scale_embeddings:
            x = x * self.config.hidden_size**0.5
        own = None
        if self.config.hidden_size_per_layer_input:
            own = layer_inputs(self, self.embed_tokens_per_layer(input_ids), x)
        x = self.placement.constrain(
            insert_vectors(multiply(x, self.config.embedding_multiplier), at, vectors), "residual"
        )
        windowed, apart = (
            jnp.asarray(np.isin(np.arange(self.config.num_hidden_layers), some))
            for some in (self.config.windowed_layers, self.config.layers_rotated_apart)
        )
        if routing is not None:
            routing = jnp.moveaxis(routing, 2, 0)
        elif cache is not None and cache.routing is not None:
            shape = (self.config.num_hidden_layers, *input_ids.shape, cache.routing.shape[-1])
            routing = jnp.full(shape, -1, jnp.int32)
        of_cache = (cache and cache.layers, cache and cache.recurrent)
        each = PerLayer(windowed, apart, *of_cache, inputs=own, routing=routing)
        x, (new, chosen) = run_layers(self.layers, "", x, step, each)
        if cache is not None:
            new = (*new, *[None] * (3 - len(new)), chosen)
        return self.placement.constrain(self.norm(x), "inputs"), new

    def _check_routing(self, routing: jax.Array | None) -> None:
        """Raises a ValueError for experts of another number of layers, or of a dense model."""
        cfg = self.config
        want = (cfg.num_hidden_layers, cfg.num_experts_per_tok if cfg.num_experts else 0)
        if routing is not None and routing.shape[2:] != want:
            raise ValueError(
                f"routing has the experts of {routing.shape[2:]} layers and choices, and the model "
                f"has {want}: give [batch, seq, layers, k], to a mixture of experts"
            )


class Period(ModelPart):
    """The layers of one repetition of a run's pattern, ``0of4`` to ``3of4``."""

    config: DecoderConfig
    experts: str | Experts = "auto"
    run: str = ""  # see ``DecoderConfig.runs``

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, layers: PerLayer
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs a scan's body: x is the carry, [batch, seq, d_model]; see ``DecoderLayer``.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layers: the layers' own input: with as many entries on axis 0 as there are such layers.

        Returns:
          [batch, seq, d_model]; and the layers' keys, values and memories, stacked on axis 0, with
          the experts of each token where ``layers.routing`` is given.
        """
        layer = rematerialise(DecoderLayer, self.remat)
        new: dict[bool, list[Any]] = {False: [], True: []}
        chosen: list[Any] = []
        for i, (name, numbers) in enumerate(self.config.runs[self.run].items()):
            kind = self.config.kind_of(numbers[0])
            linear, at = kind.linear, len(new[kind.linear])
            cache, recurrent = (
                jax.tree.map(lambda x, at=at: x[at], part if is_mine else None)
                for part, is_mine in ((layers.cache, not linear), (layers.recurrent, linear))
            )
            others = layers._replace(cache=None, recurrent=None)
            others = jax.tree.map(lambda x, i=i: x[i], others)
            mine = others._replace(cache=cache, recurrent=recurrent)
            x, (entries, experts) = layer(
                *self.options, experts=self.experts, kind=kind, name=name
            )(x, step, mine)
            new[linear].append(entries)
            chosen.append(experts)
        routing = None if layers.routing is None else jnp.stack(chosen)
        stacked = [jax.tree.map(lambda *of: jnp.stack(of), *each) for each in new.values() if each]
        entries = (*(stacked[0] or ()), *stacked[1:])
        return x, (None if not jax.tree.leaves(entries) else entries, routing)


class Runs(ModelPart):
    """Runs of layers of different kinds, one behind the other; see ``DecoderConfig.runs``."""

    config: DecoderConfig
    experts: str | Experts = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, step: Step, each: PerLayer
    ) -> tuple[jax.Array, tuple[NewEntries, jax.Array | None]]:
        """Runs all layers; see ``run_layers``."""
        # A slice of the cache for each run would be a copy: all see the whole.
        step = step._replace(cache=each.cache)
        each = each._replace(cache=None, number=jnp.arange(self.config.num_hidden_layers))
        new, chosen = [], []
        for run, places in self.config.runs.items():
            numbers = [number for stack in places.values() for number in stack]
            part = slice(min(numbers), max(numbers) + 1)
            mine = jax.tree.map(lambda x, part=part: x[part], each)
            x, (entries, experts) = run_layers(
                stack_layers(self, run, name=run), run, x, step, mine
            )
            new.append(entries)
            chosen.append(experts)
            if self.config.num_kv_shared_layers and step.kept is None:
                kept = keep_last(self.config, range(max(numbers) + 1), new[0], step.cache)
                step = step._replace(cache=None, kept=kept)
        routing = None if each.routing is None else jnp.concatenate(chosen)
        if self.config.num_kv_shared_layers:
            return x, (new[0], routing)
        return x, (jax.tree.map(lambda *of: jnp.concatenate(of), *new), routing)


def run_layers(layers: nn.Module, run: str, x: jax.Array, step: Step, each: PerLayer) -> Any:
    """Runs scanned layers, by periods if they are of several kinds.

    Args:
      layers: what ``stack_layers`` returned.
      run: the name of the run.
      x, step: see ``Period``.
      each: the layers' own input, stacked on axis 0.

    Returns:
      See ``Period``; of all layers.
    """
    config: DecoderConfig = layers.config
    if run not in config.runs or len(config.runs[run]) == 1:
        return layers(x, step, each)
    n = len(next(iter(config.runs[run].values())))
    each = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), each)
    x, new = layers(x, step, each)
    return x, jax.tree.map(lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:]), new)


def stack_layers(module: ModelPart, run: str = "", **more: Any) -> nn.Module:
    """Makes the scanned layers of a decoder's trunk, or of one of their runs.

    Args:
      module: the part of a decoder that has them.
      run: the name of the run; "" for all layers.
      **more: the name of the stack.
    """
    cfg: DecoderConfig = module.config
    more |= {"experts": module.experts}
    if run not in cfg.runs:
        return Runs(*module.options, **more)
    numbers, *others = cfg.runs[run].values()
    if others:
        return scan_layers(Period, False, len(numbers))(*module.options, run=run, **more)
    scanned = scan_layers(DecoderLayer, module.remat, len(numbers))
    return scanned(*module.options, kind=cfg.kind_of(numbers[0]), **more)
