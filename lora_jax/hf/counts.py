"""Compares the counts of layers and experts in a config.json with the tensors of the files.

A wrong configuration may name a billion layers. A key table of them would fill the memory before
the files are compared with it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, FieldTypeError

# Names of fields end so. `max_window_layers` and the experts of each token make no tensors;
# `vision_feature_layer` is the index of the layer whose output is read, and may count from the end.
_LAYER_ENDS = ("layers", "layer", "block_count", "depth")
_EXPERT_ENDS = ("experts", "expert_count")
_FIELDS_WITHOUT_TENSORS = ("max_window_layers", "expert_used_count", "feature_layer")
# Of a configuration alone. No model comes near.
_MAX_LAYERS, _MAX_EXPERTS, _MAX_EXPERTS_OF_ALL_LAYERS = 10_000, 10_000, 1_000_000
# Configurations below these need no comparison before the key table is made.
_MANY_LAYERS, _MANY_EXPERTS = 256, 1024

_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d*)?\s*")

ShapesOf = Callable[[], Mapping[str, tuple[int, ...]]]


def check_counts(fields: Fields, shapes_of_files: ShapesOf | None = None) -> None:
    """Raises a ConfigError for more layers or experts than the files can hold.

    Args:
      fields: the fields of a config.json, or the metadata of a GGUF file.
      shapes_of_files: returns the shapes of all tensors of the files. It is called only for unusual
        counts. None: there are no files.
    """
    counts = dict(_counts(fields))
    layers = {name: count for name, count in counts.items() if name.endswith(_LAYER_ENDS)}
    experts = {name: count for name, count in counts.items() if name.endswith(_EXPERT_ENDS)}
    is_usual = all(n <= _MANY_LAYERS for n in layers.values()) and all(
        n <= _MANY_EXPERTS for n in experts.values()
    )
    if is_usual:
        return
    if shapes_of_files is not None:
        shapes = shapes_of_files()
        n_tensors = len(shapes)
        largest_axis = max((max(shape, default=1) for shape in shapes.values()), default=1)
        # A layer has a tensor at least. Experts may lie along an axis of one tensor.
        limits = dict.fromkeys(layers, n_tensors)
        limits |= dict.fromkeys(experts, max(n_tensors, largest_axis))
        for name, limit in limits.items():
            if counts[name] > limit:
                raise ConfigError(
                    f"{name} is {counts[name]}, but the files hold {n_tensors} tensors, which are "
                    "too few. Correct the configuration, or download the files again."
                )
    for maximum, counts_of_kind in ((_MAX_LAYERS, layers), (_MAX_EXPERTS, experts)):
        for name, count in counts_of_kind.items():
            if count > maximum:
                raise ConfigError(
                    f"{name} is {count}, which is more than {maximum}. No such model is known. "
                    "Correct the configuration."
                )
    n_experts = max(layers.values(), default=1) * max(experts.values(), default=1)
    if n_experts > _MAX_EXPERTS_OF_ALL_LAYERS:
        names = " and ".join([*layers, *experts])
        raise ConfigError(
            f"{names} make {n_experts} experts, which is more than {_MAX_EXPERTS_OF_ALL_LAYERS}. "
            "No such model is known. Correct the configuration."
        )


def _counts(fields: Fields) -> Iterator[tuple[str, int]]:
    """Yields the names of counts and the counts, those of parts (`text_config`) too.

    Raises:
      FieldTypeError: for a number that is written as a text.
      ConfigError: for a number below 0.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            for inner_name, count in _counts(value):
                yield f"{name}.{inner_name}", count
        is_count = name.endswith((*_LAYER_ENDS, *_EXPERT_ENDS))
        if not is_count or name.endswith(_FIELDS_WITHOUT_TENSORS):
            continue
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            raise FieldTypeError(
                f"{name} ({value!r}) must be a whole number. Correct the configuration."
            )
        if isinstance(value, Integral):
            if value < 0:
                raise ConfigError(
                    f"{name} ({value}) must be a number of layers or experts, but is below 0. "
                    "Correct the configuration."
                )
            yield name, int(value)
