"""Against transformers on torch: the same tiny weights give the same logits and the same text."""

import copy
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.models import (
    Decoder,
    DecoderConfig,
    from_pretrained,
    generate,
    init_cache,
    save_pretrained,
)
from lora_jax.models.layers.blockwise import Blockwise
from tests.models import tiny, tiny_encoders
from tests.support import but_rarely

pytestmark = pytest.mark.parity


# A case of each kind of layer, of mask and of cache: what does not differ by other options.
KINDS = [
    "llama3",
    "qwen2 with some windows",
    "mixtral with a window",
    "gemma2",
    "gemma3 with every option",
    "phi3 with a long context",
    "ministral3",
    "smollm3 with every option",
    "olmo3",
    "granite",
    "gpt-oss",
    "glm4 moe",
    "deepseek v3",
    "gemma4",
    "gemma4 with layers that share keys",
    "qwen3-next",
    "qwen3.5",
    "qwen3.5 moe",
]
of_each_case = pytest.mark.parametrize("case", list(tiny.CASES))
of_each_kind = pytest.mark.parametrize("case", KINDS)
# Kinds whose masks and caches are those of others; their layers differ.
LIKE_OTHERS = [
    *("qwen2 with some windows", "phi3 with a long context", "ministral3", "olmo3", "granite"),
    *("smollm3 with every option", "qwen3.5 moe", "mixtral with a window", "gemma2"),
]
of_each_cache = pytest.mark.parametrize("case", but_rarely(KINDS, *LIKE_OTHERS))


@functools.cache
def made(case: str) -> Any:
    """(torch's model, ours, its parameters), through a folder that transformers wrote."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**tiny.fields(case))
    reference = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    rng = np.random.default_rng(3)
    with torch.no_grad():
        held = reference.state_dict()
        buffers = (pair for pair in reference.named_buffers() if pair[0] in held)
        for name, value in itertools.chain(reference.named_parameters(), buffers):
            # torch's kernels are [out, in].
            new = tiny.draw(rng, name, tuple(value.shape)[::-1]).T.copy()
            value.copy_(torch.from_numpy(new))
    with tempfile.TemporaryDirectory() as folder:
        reference.eval().save_pretrained(folder)
        return reference, *from_pretrained(folder)


@of_each_case
def test_our_config_reads_as_theirs(case: str) -> None:
    """transformers builds the same model from what to_hf writes as from the case's own fields."""
    import transformers

    config = tiny.config(case)
    given, written = (
        transformers.AutoConfig.for_model(**fields).to_dict()
        for fields in (tiny.fields(case), config.to_hf())
    )
    assert DecoderConfig.from_hf(given) == DecoderConfig.from_hf(written) == config
    for name in ("layer_types", "sliding_window", "num_local_experts", "query_pre_attn_scalar"):
        assert given.get(name) == written.get(name)


def reference_logits(reference: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        return reference(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()


def padded(side: str, seq: int = 11) -> tuple[np.ndarray, np.ndarray]:
    ids = tiny.tokens(1, 3, seq)
    lengths = np.array([[seq], [seq - 4], [4]])
    at = np.arange(seq)[None]
    mask = at < lengths if side == "right" else at >= seq - lengths
    return ids, mask.astype(np.int32)


def check_logits(case: str, side: str, attention: Any, seq: int = 11) -> None:
    reference, model, params = made(case)
    ids, mask = padded(side, seq)
    want = reference_logits(reference, ids, mask)
    got = np.asarray(tiny.run(model.clone(attention=attention), params, ids, mask))
    assert np.abs(want).max() > 1
    tiny.assert_close(got[mask == 1], want[mask == 1])


@of_each_case
def test_logits(case: str) -> None:
    check_logits(case, "left", "dense")


@pytest.mark.parametrize("case", ["llama3", "qwen3 moe", "gpt-oss", "qwen3.5", "gpt2"])
def test_a_bare_model(case: str, tmp_path: Path) -> None:
    """Saved by transformers' AutoModel, and read by AutoModelForCausalLM."""
    import torch
    import transformers

    fields = tiny_encoders.fields("gpt2") if case == "gpt2" else tiny.fields(case)
    config = transformers.AutoConfig.for_model(**fields | {"tie_word_embeddings": True})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    model, params = from_pretrained(tmp_path)
    ids, mask = padded("right")
    want = reference_logits(reference, ids, mask)
    assert np.abs(want).max() > 0.1
    got = np.asarray(tiny.run(model, params, ids, mask))
    tiny.assert_close(got[mask == 1], want[mask == 1])
    save_pretrained(tmp_path / "again", model, params)
    assert all(
        name.startswith(("model.", "transformer."))
        for name in load_file(tmp_path / "again/model.safetensors")
    )


@of_each_cache
def test_logits_by_blocks(case: str) -> None:
    check_logits(case, "right", Blockwise(block=4, spans=2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_over_several_chunks(side: str) -> None:
    """Linear layers take 64 tokens at a time; the last chunk is not full."""
    check_logits("qwen3.5", side, "dense", 150)


@pytest.mark.parametrize(
    ("case", "family", "layout"),
    [
        ("qwen3.5", "Qwen3_5", {}),
        ("qwen3.5 moe", "Qwen3_5Moe", {}),
        ("qwen3.5 moe", "Qwen3_5Moe", {"save_original_format": False}),
        ("gemma3 with every option", "Gemma3", {}),
        ("gemma3 with every option", "Gemma3", {"save_original_format": False}),
        ("gemma4 with layers that share keys", "Gemma4", {}),
        ("mistral with a window", "Mistral3", {}),
        ("ministral3", "Mistral3", {}),
    ],
)
def test_the_text_of_a_model_with_images(
    case: str, family: str, layout: dict[str, bool], tmp_path: Path
) -> None:
    """Its files have text under another name, and a vision encoder that is left out."""
    import transformers

    reference, model, params = made(case)
    vision = {"hidden_size": 12, "intermediate_size": 8, "patch_size": 2, "head_dim": 6}
    vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 24, "num_position_embeddings": 4}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    vision |= {
        "Gemma3": {"model_type": "siglip_vision_model"},
        "Mistral3": {"model_type": "pixtral"},
    }.get(family, {})
    text = reference.config.to_dict()
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, **tied
    )
    whole = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    whole.model.language_model.load_state_dict(reference.model.state_dict())
    whole.lm_head.load_state_dict(reference.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole", **layout)
    names = load_file(tmp_path / "whole/model.safetensors")
    assert any("vision" in name or "visual" in name for name in names)
    assert any(name.startswith(("language_model.", "model.language_model.")) for name in names)
    own, again = from_pretrained(tmp_path / "whole")
    assert own.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    save_pretrained(tmp_path / "text", own, again)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", attn_implementation="eager", experts_implementation="eager"
    )
    assert type(back) is type(reference)
    ids, mask = padded("left")
    np.testing.assert_array_equal(*(reference_logits(m, ids, mask) for m in (back, reference)))


@pytest.mark.parametrize("text_ties", [None, False, True])
def test_the_files_of_a_mistral3_tell_whether_its_head_is_tied(
    text_ties: bool | None, tmp_path: Path
) -> None:
    import transformers

    vision = {"model_type": "pixtral", "image_size": 8, "patch_size": 4, "hidden_size": 8}
    vision |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny.fields("mistral with a window")
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=False
    )
    whole = transformers.Mistral3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    file, described = tmp_path / "model.safetensors", tmp_path / "config.json"
    fields = json.loads(described.read_text())
    del fields["tie_word_embeddings"]
    del fields["text_config"]["tie_word_embeddings"]
    if text_ties is not None:
        fields["text_config"]["tie_word_embeddings"] = text_ties
    described.write_text(json.dumps(fields))
    tensors = load_file(file)
    head, table = (
        next(name for name in tensors if name.endswith(f"{end}.weight"))
        for end in ("lm_head", "embed_tokens")
    )
    equal = {**tensors, head: tensors[table].copy()}
    none = {name: x for name, x in tensors.items() if name != head}
    ids, mask = padded("left")
    for held, is_tied in ((tensors, False), (equal, True), (none, True)):
        save_file(held, file, metadata={"format": "pt"})
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path, attn_implementation="eager"
        )
        model, params = from_pretrained(tmp_path)
        assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) is is_tied
        assert (model.config.tie_word_embeddings, "lm_head" in params) == (is_tied, not is_tied)
        got = np.asarray(tiny.run(model, params, ids, mask))
        tiny.assert_close(got[mask == 1], reference_logits(theirs, ids, mask)[mask == 1])


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe", "qwen3-next", "deepseek v3"])
def test_both_layouts_of_experts(case: str, tmp_path: Path) -> None:
    reference, _, params = made(case)
    reference.save_pretrained(tmp_path, save_original_format=False)
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize(
    "case", ["gpt-oss", "olmo3", "qwen3.5", "qwen3-next", "qwen3.5 moe", "glm4 moe"]
)
def test_files_are_theirs(case: str, tmp_path: Path) -> None:
    reference, model, params = made(case)
    save_pretrained(tmp_path / "ours", model, params)
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def check_cached_decoding(case: str, side: str, attention: Any) -> None:
    """Prefill of seven slots, then one token at a time: after padding on the right, too."""
    reference, model, params = made(case)
    ids, mask = padded(side)
    mask[:, 7:] = 1
    cache = init_cache(model.config, 3, 11)
    first = model.clone(attention=attention)
    logits, cache = tiny.run(first, params, ids[:, :7], mask[:, :7], cache=cache)
    parts = [logits]
    for i in range(7, 11):
        logits, cache = tiny.run(model, params, ids[:, i : i + 1], mask[:, i : i + 1], cache=cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    # The reference sees each row's real tokens together, since its window counts padding.
    order = np.argsort(mask, axis=1, kind="stable")
    packed = np.take_along_axis(mask, order, axis=1)
    want = reference_logits(reference, np.take_along_axis(ids, order, axis=1), packed)
    tiny.assert_close(got[mask == 1], want[packed == 1])


@of_each_kind
def test_cached_decoding(case: str) -> None:
    check_cached_decoding(case, "right", "dense")


@of_each_cache
def test_cached_decoding_after_a_prompt_by_blocks(case: str) -> None:
    check_cached_decoding(case, "left", Blockwise(block=4))


def check_greedy_generation(reference: Any, model: Any, params: Any) -> None:
    import torch

    ids, mask = padded("left")
    want = reference.generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
    )
    got = generate(model, params, ids, mask, max_new_tokens=9)
    np.testing.assert_array_equal(got, want.numpy()[:, 11:])


@of_each_cache
def test_greedy_generation(case: str) -> None:
    check_greedy_generation(*made(case))


@of_each_kind
def test_bfloat16(case: str) -> None:
    """bf16 on both sides: as near to each other as rounding lets them, a bf16 being 8 bits."""
    import torch

    reference, model, params = made(case)
    ids, mask = padded("left")
    half = Decoder(model.config, jnp.bfloat16, jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = reference_logits(reference, ids, mask)
    with torch.no_grad():
        want = copy.deepcopy(reference).to(torch.bfloat16)(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        )
    got = np.asarray(tiny.run(half, rounded, ids, mask))
    # The median of tokens: rounding sends some to other experts, on either side.
    theirs = np.median(np.abs(want.logits.float().numpy() - exact)[mask == 1].mean(axis=-1))
    ours = np.median(np.abs(got - exact)[mask == 1].mean(axis=-1))
    assert got.dtype == np.float32
    assert ours <= 1.25 * theirs, f"median error {ours}, the reference's {theirs}"
