"""Tests of generation_config.json: the tokens that end an answer, and defaults of sampling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.hf.generation import Generation, read_generation_config
from tests.adapted_trees import with_random_factors
from tests.train.scripts import fails
from tests.train.tiny import CONFIG, tokenizer, write_model
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.generate.options import apply_sampling, parse
from train.run.pretrained import end_tokens, read_model_info
from train.run.sampling import apply_generation_config
from train.serve import __main__ as serve

PROMPT = "3 plus 4?"
FILE = "generation_config.json"
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without ends in config.json, and the greedy answer's tokens."""
    how = {"eos_token_id": None, "tie_word_embeddings": False}
    folder = write_model(tmp_path_factory.mktemp("base") / "model", scale=1.5, **how)
    model, params = models.from_pretrained(folder)
    return folder, np.asarray(models.generate(model, params, prompt(), max_new_tokens=9))[0]


def prompt():
    chat = [{"role": "user", "content": PROMPT}]
    return jnp.asarray(
        [tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)]
    )


def end_of(tokens):
    """Returns a token, and the length of the answer that it ends."""
    n = next(n for n in range(3, len(tokens)) if tokens[n] not in tokens[:n])
    return int(tokens[n]), n + 1


def copied(base, folder, fields):
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if fields is not None:
        (folder / FILE).write_text(json.dumps(fields))
    return folder


def answers(folder, output, *args):
    line = ["--model", folder, "--prompt", PROMPT, "--max-new-tokens", 9, "--output", output]
    generate.main([str(arg) for arg in [*line, *args]])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_an_answer_ends_where_the_file_says(base, tmp_path):
    folder, tokens = base
    end, n = end_of(tokens)
    made = copied(folder, tmp_path / "made", {"eos_token_id": [end, 7]})
    (ended,) = answers(made, tmp_path / "ended.jsonl")
    assert (ended["ended"], ended["tokens"]) == ("eos", n)
    assert end_tokens(read_model_info(str(made))) == (
        end,
        7,
        258,
    )  # rollouts and the server have them
    assert end_tokens(read_model_info(str(folder))) == (258,)


@pytest.mark.slow
def test_saved_and_merged_folders_have_the_file(base, tmp_path):
    folder, tokens = base
    fields = {"eos_token_id": [end_of(tokens)[0]], **SAMPLING, "transformers_version": "5.0.0"}
    made = copied(folder, tmp_path / "made", fields)
    model, params = models.from_pretrained(made)
    assert model.config.generation == read_generation_config(made) and hash(model.config)
    models.save_pretrained(tmp_path / "saved", model, params)
    tree = with_random_factors(lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)]))
    lj.save_adapter(tmp_path / "adapter", tree, about={"model": str(made)})
    line = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--merged"]
    export.main([str(arg) for arg in line])
    for name in ("saved", "merged"):
        assert (tmp_path / name / FILE).read_text() == (made / FILE).read_text()
        kept = json.loads((tmp_path / name / "config.json").read_text())
        assert kept["eos_token_id"] is None
    model, params = models.from_pretrained(folder)
    models.save_pretrained(tmp_path / "plain", model, params)
    assert not (tmp_path / "plain" / FILE).exists() and model.config.generation is None


@pytest.mark.parity
def test_transformers_ends_the_answers_of_a_merged_folder_there(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, tokens = base
    end, n = end_of(tokens)
    made = copied(folder, tmp_path / "made", {"eos_token_id": [end], "pad_token_id": 256})
    model, params = models.from_pretrained(made)
    models.save_pretrained(tmp_path / "saved", model, params, tokenizer=str(made))
    for where in (made, tmp_path / "saved"):
        ours = transformers.GenerationConfig.from_pretrained(where)
        assert ours.eos_token_id == [end]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(where)
        ids = torch.tensor(np.asarray(prompt()))
        found = theirs.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert found.tolist() == tokens[:n].tolist()
    options = {"max_new_tokens": 9, "pad_token_id": 256}
    want = [*found.tolist(), *[256] * (9 - n)]
    assert models.generate(model, params, prompt(), **options)[0].tolist() == want
    streamed = models.stream(model, params, prompt(), **options)
    assert [int(new[0]) for new in streamed] == found.tolist()
    samples = models.sample(
        model, params, prompt(), temperature=0, key=jax.random.key(0), **options
    )
    assert (samples.tokens[0].tolist(), int(samples.lengths[0])) == (want, n)


@pytest.mark.slow
def test_its_sampling_is_shown_and_used_where_asked_for(base, tmp_path, capsys):
    fields = {**SAMPLING, "repetition_penalty": 1.1}
    made = copied(base[0], tmp_path / "made", fields)
    several = ["--num-samples", 4, "--seed", 3]
    auto = answers(made, tmp_path / "auto.jsonl", *several, "--generation-config", "auto")
    said = capsys.readouterr().err
    assert (
        "sampling with the settings of generation_config.json: temperature 1.3, top_p 0.9, top_k 40"
        in said
    )
    assert "not applied: repetition_penalty 1.1" in said
    by_hand = ["--temperature", 1.3, "--top-k", 40, "--top-p", 0.9]
    assert auto == answers(base[0], tmp_path / "hand.jsonl", *several, *by_hand)
    assert len({one["answer"] for one in auto}) > 1
    given = frozenset({"temperature"})
    options = parse(["--temperature", "0.2", "--generation-config", str(made / FILE)])
    outline, sampling = apply_generation_config(read_model_info(str(base[0])), str(made / FILE))
    assert outline.config.generation == read_generation_config(made)
    capsys.readouterr()
    apply_generation_config(
        read_model_info(str(made)), "auto", {"temperature": 0.2, "prompt": ("x",)}
    )
    assert "except --temperature: temperature 0.2, top_p 0.9, top_k 40" in (capsys.readouterr().err)
    used = apply_sampling(options, sampling, given)
    assert (used.temperature, used.top_p, used.top_k) == (0.2, 0.9, 40)
    capsys.readouterr()
    (greedy,) = answers(made, tmp_path / "greedy.jsonl")
    assert "recommends temperature 1.3, top_p 0.9, top_k 40; --generation-config auto" in (
        capsys.readouterr().err
    )
    assert greedy["answer"] == tokenizer().decode(base[1], skip_special_tokens=True).strip()


def test_it_is_refused_where_other_options_leave_it_nothing_to_say(base, tmp_path, capsys):
    made = copied(base[0], tmp_path / "made", {"temperature": 0.7, "top_p": 0.9})
    line = ["--model", made, "--prompt", PROMPT, "--generation-config", "auto", "--temperature"]
    said = fails(capsys, generate.main, *line, 0)
    assert "--generation-config has no effect, because --temperature 0 always takes" in said
    said = fails(capsys, generate.main, *line, 0.5, "--top-p", 0.5)
    assert "--generation-config auto has no effect, because --temperature, --top-p" in said


@pytest.mark.parametrize("main", [generate.main, serve.main])
def test_what_cannot_be_applied_is_refused(main, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = copied(base[0], tmp_path / "made", {"eos_token_id": 7})
    option = ["--generation-config", "auto"]
    strange = copied(base[0], tmp_path / "strange", {"temperature": 0.5, "top_p": 1.5})
    assert end_tokens(read_model_info(str(strange))) == (258,)  # as before, if nobody asks for it
    for folder, args, message in (
        (base[0], option, "the model has no such file. Remove"),
        (made, option, "the file contains no settings of sampling"),
        (made, [option[0], tmp_path / "no"], f"no: {tmp_path}/no is missing"),
        (base[0], [option[0], strange], "top_p=1.5 is not a valid value for sampling"),
    ):
        more = ["--prompt", PROMPT] if main is generate.main else []
        assert message in fails(capsys, main, "--model", folder, *args, *more)
    (made / FILE).write_text('{"eos_token_id": "x"}')
    said = fails(capsys, main, "--model", made, *more)
    assert f"{made}/{FILE}: eos_token_id='x' is not a token id" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.6, "top_k": 0}, {"temperature": 0.6}),
        ({"temperature": 0.6, "top_k": -1}, {"temperature": 0.6}),
        (SAMPLING, {"temperature": 1.3, "top_k": 40, "top_p": 0.9}),
        ({"eos_token_id": 3, "top_p": None}, {}),
    ],
)
def test_fields_of_sampling(fields, sampling):
    assert Generation(json.dumps(fields)).sampling == sampling


def test_a_file_of_a_model_that_writes_no_texts_is_not_read():
    assert not hasattr(models.EncoderConfig, "generation")
    read = models.read_config({**CONFIG, "eos_token_id": [3, 4]})
    assert read.generation is None and read.eos_token_ids == (3, 4)
