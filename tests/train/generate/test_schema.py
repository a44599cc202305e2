"""`train.generate --schema`: each answer is JSON that the schema describes."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.sampling.adjust import pack_mask
from tests.models import tiny
from tests.train.tiny import write_model
from train.generate import __main__ as generate

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}, "s": {"enum": ["ü", 3]}},
    "required": ["n", "s"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("made") / "base-model", scale=1.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="extra 'structured'")
def test_answers_are_what_the_schema_describes(base, tmp_path):
    """Prompts run in batches, whose rows end at different times."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    output = tmp_path / "answers.jsonl"
    args = ["--model", base, "--schema", tmp_path / "schema.json", "--output", output]
    args += ["--prompt", "3?", "7, and 8?", "nine", "--max-new-tokens", 60, "--batch-size", 2]
    generate.main([*map(str, args), "--temperature", "1.5"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["ended"] == "eos", row
        value = json.loads(row["answer"])
        assert value.keys() == {"n", "s"} and 0 <= value["n"] <= 99 and value["s"] in ("ü", 3)


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="extra 'structured'")
def test_a_schema_that_cannot_be_is_named(base, tmp_path, capsys):
    for text, problem in (
        ('{"properties": {"a": {"not": {}}}}', "properties.a: Unimplemented keys"),
        ("{", "is not valid JSON"),
        ("[]", "The JSON schema is not an object"),
    ):
        (tmp_path / "schema.json").write_text(text)
        with pytest.raises(SystemExit):
            generate.main(["--model", str(base), "--schema", str(tmp_path / "schema.json")])
        assert problem in capsys.readouterr().err


@pytest.mark.slow
def test_a_stream_draws_from_the_tokens_that_are_allowed():
    """All of them: the tokens of `generate`; and of some, each row its own."""
    model, params = tiny.decoder("llama3")
    prompts, vocab, seen = np.array([[5, 6, 7], [8, 9, 4]]), model.config.vocab_size, []
    options = {"max_new_tokens": 9, "temperature": 1.3, "key": jax.random.key(3)}
    options["eos_token_id"] = []

    def streamed(allow):
        steps = models.stream(model, params, prompts, allow=allow, **options)
        return np.stack(list(steps), axis=1)

    free = streamed(lambda newest: np.stack([pack_mask(range(vocab), vocab)] * 2))
    assert (free == np.asarray(models.generate(model, params, prompts, **options))).all()

    def some(newest):
        seen.append(newest)
        return np.stack([pack_mask([3, 11, 20], vocab), pack_mask([2, 40], vocab)])

    tokens = streamed(some)
    assert {*tokens[0].tolist()} <= {3, 11, 20} and {*tokens[1].tolist()} <= {2, 40}
    assert seen[0] is None and (np.stack(seen[1:], axis=1) == tokens[:, :-1]).all()
