"""A family of decoders: its differences from Llama in models and files."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.types import Fields

CORRECTION = "e_score_correction_bias"  # Hugging Face's name of what moves a router's choice

# (a field of config.json, a default) -> its value in the file, else the family's default.
Get = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """The declaration of one family.

    Attributes:
      model_type: Hugging Face's name.
      other_types: other names under which configurations are published that are read as its own.
      architecture: transformers' class of its language models.
      reads: the fields of config.json that its forward pass reads, beyond those of all families.
        The readers go by their names: a family that reads "layer_types" has layers with and without
        a window, one that reads "hidden_activation" names its activation so.
      defaults: transformers' defaults for fields of config.json, where they are not Llama's.
      refuses: further fields in its files that would change the forward pass, and the only value of
        each that is supported.
      declines: fields in its files with which none of our code runs them: scripts take
        transformers' torch module instead.
      traits: the fields of ``DecoderConfig`` that are the same in all its models.
      windowed: (get, number of layers) -> the layers with a window in a file that has a window and
        no layer_types.
      rope_free: (get, number of layers) -> the layers without RoPE.
      linear: (get, number of layers) -> the linear layers in a file that has no layer_types; None
        in families without such layers.
      windows_rotate_apart: True if RoPE in layers with a window has a base of its own, and is never
        scaled.
      experts: get -> the number of experts and their inner size; None for dense MLPs.
      writes: fields that config.json has under another name than ``DecoderConfig``.
      mlp_name: Hugging Face's name of a layer's MLP.
      router_name: its name of the router in it.
      expert_names: its names of an expert's gate, up and down projections; of the one projection
        to gate and up, whose outputs take turns, and of down, where its files hold all experts of a
        layer in one tensor of each.
      shared_name: its name of the MLP that all tokens share beside experts.
      shared_is_gated: True if a gate weighs that MLP's output.
      rope_kinds: the only types of scaled RoPE that it has; () for any.
      rope_aliases: other names of these types in its files.
      with_images: the model_type of models with images whose text_config is of this family, or of
        one of several; their files are read without what is for images.
      tied_with_images: True if a config.json of `with_images` without tie_word_embeddings ties the
        head, unless the files hold another one.
      left_out: matches tensors in its files that are no part of the decoder.
      gguf: its architecture in GGUF files; None if such files are neither read nor written.
      reads_gguf: True if such files are read, too.
      gguf_pairs_rows: True if GGUF's q and k rotate neighbouring rows, (0, 1), where Hugging Face's
        rotate row i with i + head_dim/2.
      default_targets: PEFT's default target_modules; None if it has none.
    """

    model_type: str
    other_types: tuple[str, ...] = ()
    architecture: str
    reads: frozenset[str]
    defaults: Fields = dataclasses.field(default_factory=dict)
    refuses: Fields = dataclasses.field(default_factory=dict)
    declines: tuple[str, ...] = ()
    traits: Fields = dataclasses.field(default_factory=dict)
    windowed: Callable[[Get, int], range | tuple[int, ...]] = lambda get, n_layers: range(n_layers)
    rope_free: Callable[[Get, int], tuple[int, ...]] = lambda get, n_layers: ()
    linear: Callable[[Get, int], tuple[int, ...]] | None = None
    windows_rotate_apart: bool = False
    experts: Callable[[Get], tuple[int, int]] | None = None
    writes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mlp_name: str = "mlp"
    router_name: str = "gate"
    expert_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared_name: str = "shared_expert"
    shared_is_gated: bool = True
    rope_kinds: tuple[str, ...] = ()
    rope_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    with_images: str | None = None
    tied_with_images: bool = False
    left_out: re.Pattern[str] | None = None
    gguf: str | None = None
    reads_gguf: bool = False
    gguf_pairs_rows: bool = False
    default_targets: tuple[str, ...] | None = ("q_proj", "v_proj")
