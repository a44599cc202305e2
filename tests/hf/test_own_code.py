"""Folders of models whose tokenizer is damaged, or wants code of its own to run."""

import json

import pytest

from lora_jax.hf.fields import ConfigError
from lora_jax.models import load_tokenizer
from tests.train.tiny import CONFIG, tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_code_of_a_model_is_not_run_and_the_remedy_can_be_followed(folder):
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps(fields | own))
    with pytest.raises(ConfigError, match="Python code .`auto_map`.*remove `auto_map`") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "trust_remote_code" not in str(caught.value)
    path.write_text(json.dumps(fields | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert load_tokenizer(folder)("a")["input_ids"] == tokenizer()("a")["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_names_its_folder(folder, name):
    (folder / name).write_text('{"a')
    with pytest.raises(ConfigError, match="the tokenizer cannot be read from tokenizer.json and"):
        load_tokenizer(folder)
