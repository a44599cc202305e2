"""Tells Flax's msgpack files what to hold in the place of an adapted tree."""

import sys
import traceback

from lora_jax.core.weight import LoraWeight, Node, Trained, TrainedRows

_FLAX = "flax.serialization"


def refuse_bytes() -> None:
    """Makes ``flax.serialization.to_bytes`` of an adapted tree say what to save instead.

    Flax's state dictionaries, which its Orbax checkpoints use, keep nodes as they did.
    """
    flax = sys.modules.get(_FLAX)  # imported by those who use it
    if flax is None:
        return
    for kind in (LoraWeight, Trained, TrainedRows):
        if not flax.is_serializable(kind):
            flax.register_serialization_state(kind, _keep, lambda node, state: state)


def _keep(node: Node) -> Node:
    """Returns a node for a state dictionary.

    Raises:
      TypeError: the dictionary is to be bytes.
    """
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == (_FLAX, "to_bytes"):
            raise TypeError(
                "to_bytes: the tree is adapted, and its nodes are no arrays. Save the adapter with "
                "its ranks and scales, lora_jax.save_adapter(folder, params); or its arrays alone, "
                "to_bytes(lora_jax.split(params)[0]), which from_bytes reads and lora_jax.join "
                "puts back; or a plain model, to_bytes(lora_jax.merge(params))"
            )
    return node
