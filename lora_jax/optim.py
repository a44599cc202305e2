"""Optax parts for adapted trees."""

from typing import Any

import jax
import optax

from lora_jax.lorafy import trainable_mask


def freeze_base(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` for a whole adapted tree: it sees a, b and trained leaves; all else stands still.

    The frozen arrays get updates of zero (weight decay included) and no optimiser state. For
    those who differentiate the whole tree; to differentiate the adapter alone
    (`lora_jax.split`) costs less, since no gradient of the base is asked for.
    (`optax.masked` alone would pass the base's gradients through as updates.)
    """

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda trains: "train" if trains else "freeze", trainable_mask(params))

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
