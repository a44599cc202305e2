"""The tokenizers of scripts: the option --tokenizer, and those inside GGUF files."""

from types import SimpleNamespace

import pytest

import lora_jax as lj
from lora_jax import models
from tests.hf.test_gguf import write as write_gguf
from tests.hf.vocabularies import byte_level, metadata_of, sentencepiece
from tests.train.scripts import begun, fails
from tests.train.test_classify import write_encoder
from tests.train.tiny import CHATML, decoder, tokenizer, write_jsonl, write_model, write_rows
from train import classify, distill, sft
from train.adapters.source import find_adapter
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.generate.shared_base import choose_tokenizer
from train.live.distillation import teacher_outline
from train.predict import __main__ as predict
from train.run.classifiers import read_classifier_info
from train.run.costs import ask_words
from train.run.pretrained import read_model_info
from train.serve.engine.base import ServedBase
from train.serve.protocol.requests import RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without a tokenizer, a tokenizer beside it, rows, and an adapter that names both."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / file).unlink()
    tokenizer().save_pretrained(folder / "tokens")
    write_rows(folder / "rows.jsonl")
    outline = read_model_info(str(model), str(folder / "tokens"))
    module, params = models.from_pretrained(model)
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)])
    lj.save_adapter(folder / "adapter", tree, about=outline.about)
    return SimpleNamespace(
        path=folder,
        model=str(model),
        tokens=str(folder / "tokens"),
        adapter=str(folder / "adapter"),
        base=(module, params),
    )


def test_a_run_reads_rows_with_it_and_its_adapter_says_so(folder, tmp_path, capsys):
    args = ["--model", folder.model, "--dataset", folder.path / "rows.jsonl"]
    args += ["--output", tmp_path / "run"]
    said = fails(capsys, sft.main, *args)
    assert (
        "the tokenizer cannot be read" in said and "pass another tokenizer with --tokenizer" in said
    )
    assert begun(sft.main, *args, "--tokenizer", folder.tokens)
    assert find_adapter(folder.adapter).tokenizer == folder.tokens
    ahead = sft.parse(["--init-adapter", folder.adapter])
    assert (ahead.data.model, ahead.data.tokenizer) == (folder.model, folder.tokens)


@pytest.mark.slow
def test_answers_and_a_merged_model_have_it(folder, tmp_path, capsys):
    prompt = ["--prompt", "1 plus 1?", "--max-new-tokens", "2"]
    generate.main(["--adapter", folder.adapter, *prompt])
    generate.main(["--model", folder.model, "--tokenizer", folder.tokens, *prompt])
    merged = ["--adapter", folder.adapter, "--output", str(tmp_path / "out"), "--merged"]
    export.main(merged)
    ids = models.load_tokenizer(tmp_path / "out").encode("1 plus 1?")
    assert ids == tokenizer().encode("1 plus 1?")
    said = fails(capsys, export.main, *merged[:-1], "--overwrite", "--tokenizer", folder.tokens)
    assert "--tokenizer needs --merged" in said


def test_a_teacher_reads_with_it_and_tells_the_day_of_the_student(folder, tmp_path, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "1?"}])
    (tmp_path / "day.jinja").write_text(CHATML + '{{ strftime_now("%d %b %Y") }}')
    line = ["--model", folder.model, "--dataset", tmp_path / "prompts.jsonl", "--teacher-model"]
    line = [str(arg) for arg in [*line, folder.model, "--tokenizer", folder.tokens]]
    day = ["--chat-template", str(tmp_path / "day.jinja"), "--template-date", "2025-08-05"]
    config = distill.parse([*line, *day])
    teacher = teacher_outline(config.data, distill.task_of(config).outline(config, None))
    chat = [{"role": "user", "content": "?"}]
    assert "05 Aug 2025" in teacher.tokenizer.apply_chat_template(chat, tokenize=False)
    gone = [*line, "--teacher-model", str(tmp_path / "gone"), "--output", tmp_path / "run"]
    assert fails(capsys, distill.main, *gone).startswith(f"--teacher-model {tmp_path / 'gone'}: ")


def test_one_that_does_not_fit_is_refused(folder, tmp_path, capsys):
    args = ["--model", folder.model, "--dataset", folder.path / "rows.jsonl"]
    larger = tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(3)])
    larger.save_pretrained(tmp_path / "larger")
    said = fails(capsys, sft.main, *args, "--tokenizer", tmp_path / "larger")
    assert (
        "has token ids up to 261, but the vocabulary of --model" in said and "ends at 258" in said
    )
    said = fails(capsys, sft.main, *args, "--tokenizer", tmp_path / "none")
    assert said.startswith(f"--tokenizer {tmp_path / 'none'}: ")


@pytest.mark.slow
def test_adapters_say_which_one_they_were_trained_with(folder, tmp_path, capsys, monkeypatch):
    module, params = folder.base
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)])
    lj.save_adapter(tmp_path / "other", tree, about={"model": folder.model})
    sources = [find_adapter(folder.adapter), find_adapter(str(tmp_path / "other"))]
    assert choose_tokenizer(sources[:1], None) == folder.tokens
    assert choose_tokenizer(sources, "mine") == "mine"
    with pytest.raises(Exception, match="or name the tokenizer with --tokenizer"):
        choose_tokenizer(sources, None)
    with pytest.raises(RequestError, match="Start it with --tokenizer"):
        ServedBase(module, params, folder.model, 4).read_state(folder.path / "adapter")
    monkeypatch.chdir(folder.path)
    ServedBase(module, params, folder.model, 4, tokenizer="tokens").read_state(
        folder.path / "adapter"
    )
    outline = read_model_info(folder.model, folder.tokens)
    about = {**outline.about, "tokenizer": "/nowhere/tokens"}
    lj.save_adapter(tmp_path / "moved", tree, about=about)
    prompt = ["--adapter", tmp_path / "moved", "--prompt", "x", "--max-new-tokens", "1"]
    said = fails(capsys, generate.main, *prompt)
    assert (
        "trained with the tokenizer in /nowhere/tokens, which does not exist on this machine"
        in said
    )
    generate.main([*map(str, prompt), "--tokenizer", folder.tokens])


def test_the_command_that_asks_a_model_is_one_that_it_answers(folder, tmp_path):
    """A chat needs a template."""
    chats = read_model_info(folder.model, folder.tokens)
    assert ask_words(chats) == ("train.generate", "--interactive")
    assert ask_words(chats.quantized("nf4").scaled({"rope_type": "linear", "factor": 2.0}))[1:] == (
        "--interactive",
    )
    write_encoder(tmp_path / "encoder")
    assert ask_words(read_classifier_info(str(tmp_path / "encoder"), 2)) == (
        "train.predict",
        "TEXT",
    )
    chats.tokenizer.chat_template = None
    assert ask_words(chats) == ("train.generate", "--prompt", "TEXT")


@pytest.mark.slow
def test_a_classifier_reads_texts_with_it(tmp_path, capsys):
    """As a run and `train.predict` do; images have none."""
    base = write_encoder(tmp_path / "base")
    (tmp_path / "tokens").mkdir()
    for file in base.glob("*token*"):
        file.rename(tmp_path / "tokens" / file.name)
    model, params = models.from_pretrained(base, head="classification", num_labels=2)
    tree = lj.lorafy(params, [lj.TrainRule(targets=["classifier"])])
    outline = read_classifier_info(str(base), 2, tokenizer=str(tmp_path / "tokens"))
    lj.save_adapter(tmp_path / "adapter", tree, about={**outline.about, "labels": ["a", "b"]})
    predict.main(["--adapter", str(tmp_path / "adapter"), "a text"])
    assert '"label"' in capsys.readouterr().out
    args = ["--dataset", write_jsonl(tmp_path / "rows.jsonl", [{"image": "1", "label": "a"}])]
    args += ["--image", "image", "--model", base, "--tokenizer", tmp_path / "tokens"]
    assert "hold images, not texts. Remove --tokenizer" in fails(capsys, classify.main, *args)


@pytest.mark.parametrize(
    "kind",
    ["qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama-bpe", "llama"))],
)
def test_a_gguf_file_is_trained_on_and_answers_with_its_own(kind, folder, tmp_path):
    found = sentencepiece() if kind == "llama" else metadata_of(byte_level(kind), kind)
    model_type = "qwen2" if kind == "qwen2" else "llama"
    model, params = decoder(vocab_size=len(found["tokenizer.ggml.tokens"]), model_type=model_type)
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, params, tokenizer=found)
    args = ["--model", path, "--dataset", folder.path / "rows.jsonl", "--output", tmp_path / "run"]
    assert begun(sft.main, *args)
    if kind == "llama":
        generate.main(["--model", str(path), "--prompt", "x", "--max-new-tokens", "2"])
