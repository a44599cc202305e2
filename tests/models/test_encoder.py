"""Encoders against themselves: shapes, padding, positions, heads, dtypes, config.json."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import GPT2, ConfigError, Encoder, EncoderConfig, key_table, read_config
from lora_jax.models.layers.placement import Placement
from tests.models import tiny, tiny_encoders
from tests.support import over

CASES = [(case, head) for case in tiny_encoders.ENCODERS for head in tiny_encoders.HEADS]


# One case for each tree of parameters: other options change no shape.
TREES = {
    tuple((x.path, x.stacked_shape) for x in key_table(tiny_encoders.config(*case))): case
    for case in reversed(CASES)
}


@pytest.mark.parametrize(("case", "head"), TREES.values())
def test_parameters_are_the_key_table(case: str, head: str) -> None:
    model = Encoder(tiny_encoders.config(case, head))
    got = {path: leaf.shape for path, leaf in tiny_encoders.init_shapes(model).items()}
    assert got == {row.path: row.stacked_shape for row in key_table(model.config)}


@pytest.mark.parametrize(("case", "head"), CASES)
def test_configurations_round_trip(case: str, head: str) -> None:
    config = tiny_encoders.config(case, head)
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config
    config = dataclasses.replace(config, head="embedding", pooling="cls", normalize=True)
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config


def read(**changes: Any) -> EncoderConfig:
    return EncoderConfig.from_hf({"model_type": "bert", "vocab_size": 61, **changes})


@pytest.mark.parametrize(
    ("fields", "head"),
    [
        ({}, "none"),
        ({"architectures": ["BertModel"]}, "none"),
        ({"architectures": ["BertForPreTraining"]}, "masked_lm"),
        ({"architectures": ["BertForMaskedLM"]}, "masked_lm"),
        ({"architectures": ["BertForSequenceClassification"]}, "classification"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "masked_lm"),
    ],
)
def test_the_architecture_tells_the_head(fields: dict[str, Any], head: str) -> None:
    assert read(**fields).head == head


def test_defaults_are_those_of_transformers() -> None:
    config = read()
    assert (config.hidden_size, config.layer_norm_eps, config.hidden_act) == (768, 1e-12, "gelu")
    assert (config.pad_token_id, config.max_tokens, config.num_labels) == (0, 512, 2)
    roberta = read(model_type="roberta", max_position_embeddings=514)
    assert (roberta.pad_token_id, roberta.max_tokens) == (1, 512)
    named = read(id2label={"0": "no", "2": "yes", "1": "so so"})
    assert (named.num_labels, named.label_names) == (3, ("no", "so so", "yes"))
    assert named.to_hf()["label2id"] == {"no": 0, "so so": 1, "yes": 2}
    assert read(id2label={"0": "LABEL_0", "1": "LABEL_1"}).label_names == ()
    # Dropout acts in training only, and gradient_checkpointing saves memory.
    assert read(hidden_dropout_prob=0.5, gradient_checkpointing=True, pooler_fc_size=768) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"embedding_size": 128}, "embedding_size=128 is not known for bert"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported"),
        ({"hidden_size": 25}, r"hidden_size \(25\) must be a multiple"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"type_vocab_size": 0}, r"type_vocab_size \(0\)"),
        ({"model_type": "roberta", "pad_token_id": None}, "positions from pad_token_id"),
        ({"model_type": "electra"}, "'electra' is not supported"),
        (
            {"architectures": ["BertForTokenClassification"]},
            "BertForTokenClassification.*Pass head=.*masked_lm",
        ),
    ],
)
def test_refusals_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "ner"}, "head 'ner' is not supported.*classification"),
        ({"num_labels": 3}, "num_labels needs head='classification', but the head is 'none'"),
        ({"head": "masked_lm", "pooling": "cls"}, "pooling needs head='embedding'"),
        ({"head": "embedding", "pooling": "max"}, "pooling 'max' is not supported"),
        ({"head": "classification", "num_labels": 0}, r"num_labels \(0\)"),
        ({"layers": 3}, "A bert model has no option layers"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config({"model_type": "bert", "vocab_size": 61}, **options)


def test_decoders_have_no_head_to_choose() -> None:
    with pytest.raises(ConfigError, match="A gpt2 model has no option head"):
        read_config({"model_type": "gpt2"}, head="classification")


def test_a_head_can_be_chosen_for_an_architecture_that_has_none_of_ours() -> None:
    fields = {"model_type": "bert", "vocab_size": 9, "architectures": ["BertForQuestionAnswering"]}
    assert read_config(fields, head="embedding").head == "embedding"


@pytest.mark.parametrize(
    ("case", "head"),
    [
        pytest.param("bert", "none", marks=pytest.mark.slow),
        ("bert", "embedding"),
        pytest.param("roberta with other options", "masked_lm", marks=pytest.mark.slow),
        pytest.param("roberta with other options", "classification", marks=pytest.mark.slow),
    ],
)
def test_padding_changes_nothing(case: str, head: str) -> None:
    model, params = tiny_encoders.model(case, head)
    pad = model.config.pad_token_id
    ids = tiny_encoders.tokens(0, 2, 7, pad)
    padded = np.pad(ids, ((0, 0), (0, 4)), constant_values=pad)
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 4)))
    want = jax.tree.leaves(tiny.run(model, params, ids))
    got = jax.tree.leaves(tiny.run(model, params, padded, mask))
    for a, b in zip(got, want, strict=True):
        per_token = head == "masked_lm" or (head == "none" and a.ndim == 3)
        tiny.assert_close(a[:, :7] if per_token else a, b, 1e-5)
    unmasked = jax.tree.leaves(tiny.run(model, params, padded, np.ones_like(mask)))
    assert np.abs(unmasked[0][:, :7] - got[0][:, :7]).max() > 1e-2


def test_every_token_sees_every_other() -> None:
    model, params = tiny_encoders.model("bert", "masked_lm")
    ids = tiny_encoders.tokens(0, 2, 7)
    changed = ids.copy()
    changed[:, 6] = (ids[:, 6] + 1) % 61
    difference = np.subtract(*(np.asarray(tiny.run(model, params, x)) for x in (ids, changed)))
    assert np.abs(difference).max(-1).min() > 1e-2


@pytest.mark.slow
def test_positions_and_token_types_are_honoured() -> None:
    bert, params = tiny_encoders.model("bert")
    ids = tiny_encoders.tokens(0, 2, 7, 0)
    want = np.asarray(tiny.run(bert, params, ids).hidden)
    at, types = np.broadcast_to(np.arange(7), ids.shape), np.zeros_like(ids)

    def told(at: np.ndarray, types: np.ndarray) -> np.ndarray:
        return np.asarray(tiny.run(bert, params, ids, positions=at, token_type_ids=types).hidden)

    np.testing.assert_array_equal(told(at, types), want)
    for other in (told(at + 1, types), told(at, types + 1)):
        assert np.abs(other - want).max() > 1e-2
    roberta, params = tiny_encoders.model("roberta with other options")
    ids = tiny_encoders.tokens(0, 2, 7, 4)
    ids[0, 2] = 4  # padding within: it is not counted
    at = np.array([[5, 6, 4, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11]])
    want = tiny.run(roberta, params, ids).hidden
    np.testing.assert_array_equal(tiny.run(roberta, params, ids, positions=at).hidden, want)


def test_too_many_tokens_are_refused() -> None:
    for case, most in (("bert", 29), ("roberta with other options", 24)):
        model, params = tiny_encoders.model(case)
        assert np.isfinite(tiny.run(model, params, tiny_encoders.tokens(0, 1, most)).hidden).all()
        with pytest.raises(ValueError, match=f"{most + 1} tokens are more than the model's {most}"):
            tiny.run(model, params, tiny_encoders.tokens(0, 1, most + 1))


@pytest.mark.slow
def test_hidden_states_and_chosen_logits() -> None:
    model, params = tiny_encoders.model("bert", "masked_lm")
    ids = tiny_encoders.tokens(0, 2, 7)
    full = np.asarray(tiny.run(model, params, ids))
    hidden = tiny.run(model, params, ids, return_hidden=True)
    assert hidden.shape == (2, 7, 24)
    tiny.assert_close(tiny.run(model, params, hidden, method="head"), full, 1e-6)
    at = np.array([[6, 0], [2, 3]])
    chosen = tiny.run(model, params, ids, logits_at=at)
    tiny.assert_close(chosen, np.take_along_axis(full, at[..., None], axis=1), 1e-6)


def test_logits_are_chosen_only_of_a_head_that_has_them() -> None:
    bare, params = tiny_encoders.model("bert")
    ids, at = tiny_encoders.tokens(0, 2, 7), np.array([[6, 0], [2, 3]])
    with pytest.raises(ValueError, match="logits_at needs the head 'masked_lm'"):
        tiny.run(bare, params, ids, logits_at=at)


def test_normalised_embeddings_have_norm_one() -> None:
    config = tiny_encoders.config("bert", "embedding", normalize=True)
    model, params = tiny_encoders.model("bert", "embedding")
    ids = tiny_encoders.tokens(0, 2, 7)
    got = np.asarray(tiny.run(Encoder(config), params, ids))
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-6)
    plain = np.asarray(tiny.run(model, params, ids))
    tiny.assert_close(got, plain / np.linalg.norm(plain, axis=-1, keepdims=True), 1e-6)


@pytest.mark.parametrize(("case", "kind"), [("bert", Encoder), ("gpt2", GPT2)])
def test_layers_are_scanned_and_rematerialised(case: str, kind: type) -> None:
    """The program does not grow with the depth. (test_decoder.py compares gradients.)"""

    def program(layers: int, remat: bool) -> str:
        config = dataclasses.replace(tiny_encoders.config(case), num_hidden_layers=layers)
        model, ids = kind(config, remat=remat), jnp.zeros((2, 5), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)
        return str(jax.make_jaxpr(model.apply)(params, ids))

    two = program(2, False)
    assert len(two.splitlines()) == len(program(9, False).splitlines())
    activation, layer = (text.count("prevent_cse") for text in (two, program(2, True)))
    assert 1 <= activation < layer


@pytest.mark.slow
@over(
    ("case", "head"),
    [("bert", "classification"), ("roberta", "masked_lm")],
    often=["masked_lm"],
    called=lambda case: case[1],
)
def test_bfloat16_computation(case: str, head: str) -> None:
    model, params = tiny_encoders.model(case, head)
    half = model.clone(dtype=jnp.bfloat16)
    ids = tiny_encoders.tokens(0, 2, 7)
    exact, got = (np.asarray(tiny.run(m, params, ids)) for m in (model, half))
    assert got.dtype == jnp.float32
    hidden = jax.eval_shape(lambda p: half.apply({"params": p}, ids, return_hidden=True), params)
    assert hidden.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize(("case", "kind"), [("bert", Encoder), ("gpt2", GPT2)])
def test_activations_can_be_constrained(case: str, kind: type) -> None:
    config = read_config(tiny_encoders.fields(case))
    seen = set()

    class Seen(Placement):
        def constrain(self, x: jax.Array, kind: str) -> jax.Array:
            seen.add((kind, x.shape))
            return x

    model = kind(config, placement=Seen())
    jax.eval_shape(model.init, jax.random.key(0), tiny_encoders.tokens(0, 2, 5))
    width, heads = config.hidden_size, config.num_attention_heads
    assert seen == {
        *((kind, (2, 5, width)) for kind in ("residual", "inputs", "features")),
        ("heads", (2, 5, heads, width // heads)),
        ("features", (2, 5, config.intermediate_size)),
    }
