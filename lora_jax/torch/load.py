"""Loads a transformers model or a torch module as a JAX function and its parameters."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.hub import find_model
from lora_jax.hf.keys import Params, Row, nest_leaves, reorder_axes
from lora_jax.hf.load import ShardingOf, load_params
from lora_jax.models.layers.attend import Attend
from lora_jax.torch.config import TorchConfig
from lora_jax.torch.diffusion import check_folder, check_hub_name, find_part
from lora_jax.torch.examples import Example
from lora_jax.torch.files import DiffusionFolder, TorchFolder
from lora_jax.torch.model import TorchModel
from lora_jax.torch.packages import TorchModelError
from lora_jax.torch.recipe import CAUSAL
from lora_jax.torch.structure import sharding_lines


def from_torch(
    source: Any,
    *,
    subfolder: str | None = None,
    auto: str = CAUSAL,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool | str = False,
    attention: str | Attend = "auto",
    scan: bool = True,
    example: Mapping[str, Any] | None = None,
    sharding: ShardingOf | None = None,
    print_plan: Callable[[str], None] | None = None,
) -> tuple[TorchModel, Params]:
    """Returns a torch module as a function of a parameter tree, and the tree.

    A folder's weights are read tensor by tensor, each straight to its devices; the module itself is
    built without memory for weights. Paths are the module's own names: a linear layer's weight is a
    ``kernel`` [in, out], a table an ``embedding``, a norm's weight a ``scale``, and everything else
    has the name that torch gives it. A tensor that several modules share is there once.

    Layers that compute the same program are stacked on axis 0 and run as one scan; kinds that take
    turns have a stack each. Those that differ run one after another. Modules other than causal
    language models need an example for that.

    Args:
      source: a folder or hub name with config.json and safetensors files, or a torch module.
      subfolder: name of the part to read from a pipeline of diffusers, such as "transformer". None
        if `source` is not a pipeline.
      auto: the class of transformers that builds a folder's model: "AutoModel",
        "AutoModelForSeq2SeqLM", ...
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters; `dtype` by default.
      remat: what is recomputed in the backward pass, layer by layer; see ``models.Decoder``.
      attention: implementation of attention; see ``models.Decoder``. It replaces transformers'
        `AttentionInterface` and ``torch.nn.functional.scaled_dot_product_attention``.
      scan: whether layers that are alike are stacked.
      example: arguments of the module's forward by name, of any small sizes. With them, layers of
        modules other than causal language models are compared, and stacked if they are alike. Flux,
        SD3 and Qwen-Image need none.
      sharding: (path, shape) -> the sharding of that parameter; None for the default device.
      print_plan: gets a line for each sharding of the table that ``models.partition_specs`` gives.

    Returns:
      (fn, params): ``fn(params, input_ids)`` gives a causal language model's logits; of another
      module ``fn(params, *args, **kwargs)`` gives what its forward gives. ``fn.apply`` has the
      arguments of ``models.Decoder``'s.

    Raises:
      ConfigError: transformers has no such model.
      TorchModelError: the module cannot run as a JAX function; names the operator and the module.
      WeightsError: weights that cannot be read or do not fit; one error lists all of them.
    """
    param_dtype = dtype if param_dtype is None else param_dtype
    if example is not None and not scan:
        raise TorchModelError(
            "example has no effect with scan=False, because layers are not compared then. Remove "
            "one of the two arguments."
        )
    recipe_example = None if example is None else Example(example)
    folder = None
    if isinstance(source, str | os.PathLike):
        if subfolder:
            path = find_part(source, subfolder)
        else:
            check_hub_name(source)
            path = find_model(Path(source)).path
        is_diffusion = check_folder(path)
        if is_diffusion and auto != CAUSAL:
            raise TorchModelError(
                f"auto={auto!r} has no effect, because {path} holds a module of diffusers. Remove "
                "the argument auto."
            )
        folder_class = DiffusionFolder if is_diffusion else TorchFolder
        folder = folder_class(path, auto=auto, scan=scan, example=recipe_example)
        config = folder.config
    elif subfolder is not None:
        raise TorchModelError(
            "subfolder has no effect, because the source is a module. Remove the argument."
        )
    else:
        config = TorchConfig("", auto, scan, source, recipe_example)
        if config.hf is not None:
            text = config.hf.to_json_string(use_diff=False)
            config = dataclasses.replace(config, text=text)
    if example is not None and config.continues:
        raise TorchModelError(
            "example has no effect, because a short row is the example of a causal language model. "
            "Remove the argument example."
        )
    model = TorchModel(config, dtype, param_dtype, remat, attention)
    if attention != "auto" and not model.built.may_attend:
        raise TorchModelError(
            f"attention={attention!r} has no effect, because a {config.model_type} model does not "
            "use transformers' AttentionInterface. Remove the argument attention."
        )
    if print_plan is not None:
        for line in sharding_lines(config.key_rows()):
            print_plan(line)
    if folder is not None:
        return model, load_params(folder, param_dtype, sharding)
    tensors = source.state_dict()

    def read_row(row: Row) -> jax.Array:
        """Returns the array of one key table row."""
        layers = [tensors[name].detach().float().cpu().numpy() for name in row.hf_names]
        layers = [reorder_axes(row, layer) for layer in layers]
        values = np.stack(layers).reshape(row.stacked_shape) if row.stack else layers[0]
        row_sharding = None if sharding is None else sharding(row.path, row.stacked_shape)
        array: jax.Array = jax.device_put(values.astype(param_dtype), row_sharding)
        return array

    return model, nest_leaves((row.path, read_row(row)) for row in config.key_rows())
