"""Layers of two kinds, with attention and linear ones, as a scan over their repeated pattern."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts
from lora_jax.models.decoder.layer import DecoderLayer, PerLayer, Step
from lora_jax.models.layers.blocks import ModelPart
from lora_jax.models.layers.trunk import rematerialise, scan_layers


class Period(ModelPart):
    """The layers of one repetition of the pattern, ``0of4`` to ``3of4``."""

    config: DecoderConfig
    experts: str | Experts = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, step: Step, layers: PerLayer) -> tuple[jax.Array, Any]:
        """Runs a scan's body: x is the carry, [batch, seq, d_model]; see ``DecoderLayer``.

        Args:
          x: [batch, seq, d_model].
          step: the input that all layers share.
          layers: the layers' own input: with as many entries on axis 0 as there are such layers.

        Returns:
          [batch, seq, d_model], and the layers' keys, values and memories, stacked on axis 0.
        """
        layer = rematerialise(DecoderLayer, self.remat)
        new: dict[bool, list[Any]] = {False: [], True: []}
        for i, (name, linear) in enumerate(self.config.pattern.items()):
            at = len(new[linear])
            cache, recurrent = (
                jax.tree.map(lambda x, at=at: x[at], part if is_mine else None)
                for part, is_mine in ((layers.cache, not linear), (layers.recurrent, linear))
            )
            mine = PerLayer(layers.windowed[i], layers.apart[i], cache, recurrent)
            x, found = layer(*self.options, experts=self.experts, linear=linear, name=name)(
                x, step, mine
            )
            new[linear].append(found)
        if layers.cache is None:
            return x, None
        stacked = [jax.tree.map(lambda *of: jnp.stack(of), *each) for each in new.values()]
        return x, (*stacked[0], stacked[1])


def run_layers(layers: Any, config: DecoderConfig, x: jax.Array, step: Step, each: PerLayer) -> Any:
    """Runs scanned layers, by periods if they are of two kinds.

    Args:
      layers: what ``stack_layers`` returned.
      config: the decoder's.
      x, step: see ``Period``.
      each: the layers' own input, stacked on axis 0.

    Returns:
      See ``Period``; of all layers.
    """
    if not config.pattern:
        return layers(x, step, each)
    n = config.num_hidden_layers // len(config.pattern)
    each = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), each)
    x, new = layers(x, step, each)
    return x, jax.tree.map(lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:]), new)


def stack_layers(module: Any) -> Any:
    """Makes the scanned layers of a decoder's trunk."""
    cfg: DecoderConfig = module.config
    if not cfg.pattern:
        scanned = scan_layers(DecoderLayer, module.remat, cfg.num_hidden_layers)
    else:
        scanned = scan_layers(Period, False, cfg.num_hidden_layers // len(cfg.pattern))
    return scanned(*module.options, experts=module.experts)
