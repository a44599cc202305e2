"""Keras 3 on JAX: `stateless_call(trainable, non_trainable, x)`; variables are lists, unnamed."""

import os
from collections.abc import Callable
from typing import Any

from tests.foreign.case import Case, Made, rule
from tests.support import array, draw

X = draw(9, (2, 13, 6))
IMAGES = draw(9, (2, 9, 8, 6))
IDS = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])


def keras() -> Any:
    """The library, told to run on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(1)
    return keras


def kernels(
    model: Any,
    pattern: str = r".*(kernel|(?<!reverse_)embeddings)(?<!position_embedding/embeddings)",
) -> Any:
    """A rule for the trainable variables whose Keras path ends so: targets are list indices."""
    import re

    found = [i for i, v in enumerate(model.trainable_variables) if re.fullmatch(pattern, v.path)]
    return rule("|".join(map(str, found)))


def made(model: Any, *inputs: Any, training: bool = False, **calls: Any) -> Made:
    """A built model's `stateless_call`, with the variables that do not train."""
    trainable, rest = (
        [v.value for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )

    def fn(trainable: Any, rest: Any, *inputs: Any) -> Any:
        return model.stateless_call(trainable, rest, *inputs, training=training, **calls)

    return Made(fn, trainable, (rest, *inputs), kernels(model))


def _case(
    model: str, weights: int, build: Callable[[Any], Any], x: Any, training: bool = False
) -> Case:
    def make() -> Made:
        built = build(keras())
        return made(built, x, training=training)

    how = "stateless_call, training" if training else "stateless_call"
    return Case("keras", model, how, weights, make)


def _sequential(*shape: int) -> Callable[[Any, Callable[..., Any]], Any]:
    def build(keras: Any, layers: Callable[..., Any]) -> Any:
        return keras.Sequential([keras.Input(shape), *layers(keras.layers)])

    return build


def _dense(keras: Any) -> Any:
    return _sequential(13, 6)(keras, lambda nn: [nn.Dense(7, activation="gelu"), nn.Dense(5)])


def _convolutional(keras: Any) -> Any:
    def layers(nn: Any) -> Any:
        return [
            nn.Conv2D(10, (3, 2), strides=2),
            nn.BatchNormalization(),
            nn.ReLU(),
            nn.SeparableConv2D(11, 2),
            nn.GlobalAveragePooling2D(),
            nn.Dense(7),
        ]

    return _sequential(9, 8, 6)(keras, layers)


def _attention(keras: Any) -> Any:
    x = keras.Input((13, 6))
    y = keras.layers.MultiHeadAttention(3, 5, flash_attention=False)(x, x, use_causal_mask=True)
    return keras.Model(x, y)


def _lstm(keras: Any) -> Any:
    return _sequential(13, 6)(keras, lambda nn: [nn.LSTM(7, return_sequences=True), nn.GRU(5)])


def _transformer(keras: Any) -> Any:
    nn = keras.layers
    ids = keras.Input((5,), dtype="int32")
    x = nn.Embedding(11, 6)(ids)
    for _ in range(2):
        y = nn.LayerNormalization()(x)
        x = x + nn.MultiHeadAttention(2, 5)(y, y, use_causal_mask=True)
        y = nn.LayerNormalization()(x)
        x = x + nn.Dense(6)(nn.Dense(17, activation="gelu")(y))
    return keras.Model(ids, nn.Dense(11)(nn.LayerNormalization()(x)))


CASES = (
    _case("Dense, Dense", 2, _dense, X),
    _case("Conv2D, BatchNormalization, SeparableConv2D, Dense", 4, _convolutional, IMAGES),
    _case("Conv2D, BatchNormalization, SeparableConv2D, Dense", 4, _convolutional, IMAGES, True),
    _case("MultiHeadAttention", 4, _attention, X),
    _case("LSTM, GRU", 4, _lstm, X),
    _case("functional transformer, two blocks", 14, _transformer, IDS),
)
