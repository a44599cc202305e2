"""RoPE scaled by a call: what is refused, what is written, and transformers' logits."""

import dataclasses

import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import ConfigError, Decoder, with_rope_scaling
from tests.models import tiny

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 2.5, "beta_fast": 16.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "high_freq_factor": 3.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_scaled_configuration_is_written_and_read(kind):
    config = tiny.config("qwen3")
    scaled = with_rope_scaling(config, SCALINGS[kind])
    assert models.read_config(scaled.to_hf()) == scaled != config
    assert scaled.max_position_embeddings == round(64 * SCALINGS[kind]["factor"])
    assert scaled.rope_scaling.kind == kind
    if kind != "linear":
        assert scaled.rope_scaling.original_max_position_embeddings == 64
    ids = tiny.tokens(0, 2, 9)
    model, params = tiny.decoder("qwen3")
    assert np.abs(tiny.run(Decoder(scaled), params, ids) - tiny.run(model, params, ids)).max() > 0.1


@pytest.mark.parametrize(
    ("case", "scaling", "message"),
    [
        ("gpt2", {"rope_type": "linear", "factor": 2.0}, "gpt2 model has no RoPE to scale"),
        ("llama3", SCALINGS["yarn"], r"scales its RoPE already \(llama3, factor 4\)"),
        ("qwen3", {"rope_type": "dynamic", "factor": 2.0}, "Use 'yarn'"),
        ("qwen3", {"rope_type": "ntk", "factor": 2.0}, "RoPE type 'ntk' is not supported"),
        ("qwen3", {"rope_type": "yarn", "factor": 1.0}, "factor is 1, but it must be above 1"),
        ("qwen3", {"rope_type": "linear", "factor": 2.0, "beta": 1}, "with beta is not supported"),
        ("phi3", SCALINGS["yarn"], "RoPE type 'yarn' is not supported for phi3"),
    ],
)
def test_what_does_not_go_is_refused(case, scaling, message):
    if case == "gpt2":
        config = models.read_config({"model_type": "gpt2", "n_embd": 8, "n_head": 2})
    else:
        config = tiny.config(case)
    with pytest.raises(ConfigError, match=message):
        with_rope_scaling(config, scaling)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("smollm2", "yarn"),
        ("gemma3 unscaled", "linear"),
        ("gemma3 unscaled", "yarn"),
        ("qwen3", "llama3"),
    ],
)
def test_transformers_computes_the_same_on_longer_rows(case, kind, tmp_path):
    """From its own rope_parameters, with rows that the model has no positions for without them."""
    import torch
    import transformers

    fields = {**tiny.SIZES, **tiny.CASES[case.split()[0]], "max_position_embeddings": 24}
    if case == "gemma3 unscaled":
        del fields["rope_scaling"]
    config = models.read_config(fields)
    factor = SCALINGS[kind]["factor"]
    theirs = {"rope_theta": config.rope_theta, "low_freq_factor": 1.0, **SCALINGS[kind]}
    if kind != "llama3":
        del theirs["low_freq_factor"]
    if kind != "linear":
        theirs["original_max_position_embeddings"] = 24
    rope = {"rope_parameters": theirs}
    if case == "gemma3 unscaled":
        local = {"rope_type": "default", "rope_theta": fields.pop("rope_local_base_freq")}
        rope = {"rope_parameters": {"full_attention": theirs, "sliding_attention": local}}
        fields.pop("rope_theta")
    fields |= rope | {"max_position_embeddings": round(24 * factor)}
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields), attn_implementation="eager"
    )
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for name, value in reference.named_parameters():
            new = tiny.draw(rng, name, tuple(value.shape)[::-1]).T.copy()
            value.copy_(torch.from_numpy(new))
    reference.eval().save_pretrained(tmp_path)
    read, params = models.from_pretrained(tmp_path)
    scaled = Decoder(with_rope_scaling(config, SCALINGS[kind]))
    written = dataclasses.replace(read.config, generation=None)  # transformers writes that, too
    assert scaled.config == written
    ids = tiny.tokens(2, 2, 40)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long()).logits.numpy()
    tiny.assert_close(tiny.run(scaled, params, ids), want)
    far = np.abs(np.asarray(tiny.run(Decoder(config), params, ids)) - want).max()
    assert far > 0.1, "without the scaling, it is another model"
