"""Patterns in adapter_config.json are read as `re` reads them, in bounded time."""

import json
import re
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax.peft as lp
from lora_jax import models
from lora_jax.peft import patterns
from lora_jax.peft.config import read_config
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import list_modules, select_modules
from lora_jax.peft.patterns import fullmatch, limit_matches, match
from tests.support import draw

PROJ = models.Row(
    path="blocks/w",
    hf="decoder.block.{}.self_attention.proj.weight",
    shape=(5, 7),
    stack=(4,),
    transpose=True,
)
PARAMS = {"blocks": {"w": draw(1, (4, 5, 7))}}
BACKTRACKING = r"(\w|\.|[a-z]|o)*[A-Z]"
NAMES = ["decoder.block.0.proj", "decoder.block.12.proj", "lm_head", "", "a{e<=1}", "proj\n"]
PATTERNS = [
    r".*\.(q_proj|proj)$",
    r".*\.1[0-9]\.proj",
    r"(?i)DECODER.*",
    r"(?x) decoder .* # a comment",
    r"(lm_hea){e<=1}",  # braces that `regex` reads as the number of errors
    r"(a){e<=1}",
    r"a{1,2}|.{3,}",
    r"(?P<layer>decoder)\.block.*",
    r"[[a-z]+\.?.*",
    r"(?=decoder).*proj",
    r"proj|lm_head",
    r"(de)?coder.*+",
    r"[\w.]*(?<!x)",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # `re` on nested sets
def test_patterns_match_as_by_re(pattern):
    for name in NAMES:
        assert fullmatch("field", pattern, name) == (re.fullmatch(pattern, name) is not None)
        if not pattern.startswith("(?"):
            expected = re.match(rf"(.*\.)?({pattern})$", name)
            found = match("field", pattern, name, form=r"(.*\.)?({})$")
            assert (found and found.group(0)) == (expected and expected.group(0))


def write_adapter(folder, **fields):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["proj"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(4):
        stem = f"base_model.model.decoder.block.{layer}.self_attention.proj"
        tensors[f"{stem}.lora_A.weight"] = draw(1, (2, 5))
        tensors[f"{stem}.lora_B.weight"] = draw(2, (7, 2))
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


FIELDS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "modules_to_save": lambda pattern: [pattern],
    "rank_pattern": lambda pattern: {pattern: 3},
    "alpha_pattern": lambda pattern: {pattern: 3},
    "layers_pattern": lambda pattern: pattern,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_broken_pattern_is_an_error_of_one_line(field, tmp_path):
    fields = {field: FIELDS[field]("(proj"), "layers_to_transform": [1]}
    folder = write_adapter(tmp_path / "adapter", **fields)
    with pytest.raises(
        PeftError, match=rf"{field} has the pattern '\(proj', which is no"
    ) as caught:
        lp.load(folder, [PROJ], PARAMS)
    assert "\n" not in str(caught.value)
    with pytest.raises(PeftError, match=field):
        lp.rules(folder, [PROJ])


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_backtracks_ends(field, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.2)
    fields = {field: FIELDS[field](BACKTRACKING), "layers_to_transform": [1]}
    folder = write_adapter(tmp_path / "adapter", **fields)
    start = time.monotonic()
    with pytest.raises(PeftError, match=rf"{field} has the pattern .*it backtracks") as caught:
        lp.load(folder, [PROJ], PARAMS)
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value)


def test_all_matches_of_a_configuration_share_their_time(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    with limit_matches():
        for _ in range(20):
            with pytest.raises(PeftError):
                fullmatch("field", BACKTRACKING, "model.layers.0.self_attn.q_proj")
    assert time.monotonic() - start < 3


BROKEN = ["(" * 5000 + "a" + ")" * 5000, "a{99999999999}", "(?P<a>b)(?P<a>c)", "*", r"\p{L}"]


@pytest.mark.parametrize("pattern", BROKEN, ids=range(len(BROKEN)))
def test_whatever_re_does_not_read_is_an_error_of_one_line(pattern):
    with pytest.raises(PeftError, match="which is no regular expression") as caught:
        fullmatch("field", pattern, "a")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_pattern_may_stand_in_every_field():
    fields = {
        "target_modules": r"decoder\.block\.\d\..*pro.",
        "exclude_modules": r".*\.3\..*",
        "rank_pattern": {r"block\.[12]\..*proj": 3},
        "r": 2,
    }
    config = read_config(fields)
    names = [module.name for module in select_modules(config, list_modules([PROJ]), None)]
    assert names == [f"decoder.block.{layer}.self_attention.proj" for layer in range(3)]
    assert [rule.rank for rule in lp.rules(fields, [PROJ])] == [2, 3]
    layered = {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": ["blo.k"]}
    names = [m.name for m in select_modules(read_config(layered), list_modules([PROJ]), None)]
    assert names == ["decoder.block.1.self_attention.proj"]
