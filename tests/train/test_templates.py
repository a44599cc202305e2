"""The option --chat-template: what renders chats in every script, and goes with the adapter."""

import json
import shutil
import urllib.request
from types import SimpleNamespace

import pytest
import transformers

import lora_jax as lj
from lora_jax import models
from tests.train.scripts import fails
from tests.train.serve.scripted import ScriptedEngine, ids, serving
from tests.train.tiny import CHATML, tokenizer, write_jsonl, write_model
from train import distill, dpo, grpo, sft
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.run.output import begin, check_output
from train.serve import __main__ as serve
from train.serve.routes.openai.models import AdapterLookup
from train.settings.table import read_table

OWN = "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}" + CHATML
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
ROW = {"messages": [{"role": "user", "content": "Where?"}], "tools": TOOLS}
ANSWER = {"role": "assistant", "content": "There."}
FILE = "chat_template.jinja"
WITHOUT = "the model's chat template shows no tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose template knows no tools, one that does, rows with tools, and a run of both."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model")
    (folder / "own.jinja").write_text(OWN)
    rows = [{**ROW, "messages": [*ROW["messages"], ANSWER]} for _ in range(8)]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", [ROW])
    line = ["--model", model, "--dataset", folder / "rows.jsonl", "--seq-len", 256]
    line += ["--steps", 1, "--batch-size", 2, "--report-to", "none", "--output", folder / "run"]
    line += ["--targets", "q_proj", "--rank", 2, "--chat-template", folder / "own.jinja"]
    sft.main([str(arg) for arg in line])
    args = [str(arg) for arg in line]
    return SimpleNamespace(path=folder, model=str(model), run=str(folder / "run"), line=args)


@pytest.mark.slow
def test_a_run_renders_with_it_and_keeps_it_with_its_adapter(folder, tmp_path, capsys):
    at = folder.line.index("--chat-template")
    without = [*folder.line[:at], "--output", str(tmp_path / "run")]
    assert WITHOUT in fails(capsys, sft.main, *without)
    sft.main([*without, *folder.line[at:], "--dry-run"])
    assert "<tool>look_up</tool>" in capsys.readouterr().out
    assert (folder.path / "run/adapter" / FILE).read_text() == OWN
    about = lj.adapter_info(folder.path / "run/adapter")
    assert about["chat_template"] == OWN and about["model"] == folder.model
    assert "chat_template: " in (folder.path / "run/config.yaml").read_text()


def ask(folder, output, *args):
    prompts = ["--prompts", folder.path / "prompts.jsonl", "--max-new-tokens", 2]
    generate.main([str(arg) for arg in [*args, *prompts, "--output", output]])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_what_loads_the_adapter_renders_with_it(folder, tmp_path, capsys):
    given = ["--chat-template", folder.path / "own.jinja"]
    prompts = ["--prompts", folder.path / "prompts.jsonl"]
    assert WITHOUT in fails(capsys, generate.main, "--model", folder.model, *prompts)
    assert ask(folder, tmp_path / "base.jsonl", "--model", folder.model, *given)
    own = ask(folder, tmp_path / "own.jsonl", "--adapter", folder.run)
    more = ["--output", str(tmp_path / "peft"), "--base-name", "owner/name"]
    export.main(["--adapter", folder.run, *more])
    assert (tmp_path / "peft" / FILE).read_text() == OWN
    args = ["--adapter", tmp_path / "peft", "--model", folder.model, "--allow-base-mismatch"]
    (of_peft,) = ask(folder, tmp_path / "peft.jsonl", *args)
    assert of_peft["answer"] == own[0]["answer"]
    ahead = dpo.parse(["--init-adapter", folder.run])
    assert ahead.data.chat_template == str(folder.path / "run/adapter" / FILE)


@pytest.mark.slow
def test_a_merged_model_has_it_in_the_place_of_its_own(folder, tmp_path):
    """Also where the base's stands in tokenizer_config.json, as older folders have it."""
    config = folder.path / "model/tokenizer_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"chat_template": CHATML}))
    try:
        merged = ["--output", str(tmp_path / "out"), "--merged"]
        export.main(["--adapter", folder.run, *merged])
    finally:
        config.write_text(before)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = made.apply_chat_template(ROW["messages"], tools=TOOLS, tokenize=False)
    assert made.chat_template == OWN and said.startswith("<tool>look_up</tool>")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == OWN


def peft_folder(folder, template):
    """Parses a command line that names a PEFT adapter with a chat template."""
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/name"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / FILE).write_text(template)
    return str(folder)


@pytest.mark.slow
def test_a_run_of_before_goes_on_with_the_template_of_its_base(folder, tmp_path):
    """It began when adapters of PEFT did not give theirs."""
    given = ["--init-adapter", peft_folder(tmp_path / "peft", OWN), "--model", folder.model]
    given += ["--dataset", str(folder.path / "rows.jsonl"), "--output", str(tmp_path / "run")]
    begun = sft.parse(given)
    assert begun.data.chat_template == str(tmp_path / "peft" / FILE)
    (tmp_path / "run").mkdir()
    begin(tmp_path / "run", begun, "train.sft", {})
    assert sft.parse([*given, "--resume"]).data.chat_template == begun.data.chat_template
    kept = tmp_path / "run/config.yaml"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(line for line in lines if "chat_template" not in line))
    older = sft.parse([*given, "--resume"])
    assert older.data.chat_template is None and check_output(older) == tmp_path / "run"
    own = sft.parse([*given, "--resume", "--chat-template", str(folder.path / "own.jinja")])
    with pytest.raises(UserError, match="--chat-template was None and is now"):
        check_output(own)


def test_the_adapters_of_a_table_go_with_one_template(folder, tmp_path):
    for name, template in {"one": OWN, "same": OWN, "other": CHATML}.items():
        shutil.copytree(folder.path / "run/adapter", tmp_path / name)
        (tmp_path / name / FILE).write_text(template)

    def asked(*names):
        rows = [{"name": name, "init_adapter": str(tmp_path / name)} for name in names]
        table = write_jsonl(tmp_path / "runs.jsonl", rows)
        line = ["--model", folder.model, "--dataset", folder.path / "rows.jsonl", "--many", table]
        config, on_line, _ = sft.SCRIPT._read([str(arg) for arg in line])
        return sft.SCRIPT.asked_for(read_table(config, sft.SCRIPT.plain, on_line))

    first, second = asked("one", "same")
    assert first.options.data.chat_template != second.options.data.chat_template
    with pytest.raises(UserError, match="line 2: .*uses another chat template"):
        asked("one", "other")


@pytest.mark.parametrize("script", [sft, dpo, grpo, distill])
def test_every_script_that_renders_chats_has_it(script, folder):
    args = ["--model", folder.model, "--dataset", str(folder.path / "rows.jsonl")]
    config = script.SCRIPT.parse([*args, "--chat-template", str(folder.path / "own.jinja")])
    outline = script.SCRIPT.task_of(config).outline(config, None)
    assert outline.tokenizer.chat_template == outline.about["chat_template"] == OWN
    plain = script.SCRIPT.parse(args)
    assert "chat_template" not in script.SCRIPT.task_of(plain).outline(plain, None).about


@pytest.mark.parametrize("main", [sft.main, dpo.main, grpo.main, generate.main, serve.main])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "wrong.jinja: The template cannot be read (No such file or directory"),
        (
            "{% for m in messages %}\n{{ m.content }}",
            "wrong.jinja: line 2 of the chat template is not valid Jinja (Unexpected",
        ),
        (
            "{{ messages | nothing }}",
            "wrong.jinja: line 1 of the chat template is not valid Jinja (No filter named 'not",
        ),
        ("Hello", "the chat template does not read `messages`"),
    ],
)
def test_a_wrong_one_is_refused_before_any_work(main, text, message, tmp_path, capsys, folder):
    file, output = tmp_path / "wrong.jinja", tmp_path / "out"
    if text is not None:
        file.write_text(text)
    args = ["--model", folder.model, "--output", output, "--chat-template", file]
    if main is generate.main:
        args += ["--prompt", "?"]
    elif main is not serve.main:
        args += ["--dataset", folder.path / "rows.jsonl"]
    if main is grpo.main:
        args += ["--reward", "length"]
    assert message in fails(capsys, main, *args)
    assert not output.exists()


def test_adapters_with_different_ones_are_asked_one_after_the_other(folder, tmp_path, capsys):
    source = find_adapter(folder.run)
    model, params = models.from_pretrained(folder.model)
    tree = source.load(model, params, folder.model)
    about = {"model": folder.model}
    for name, template in (("plain", None), ("same", OWN), ("base", CHATML)):
        facts = about if template is None else about | {"chat_template": template}
        lj.save_adapter(tmp_path / name, tree, about=facts)
    both = ["--adapter", folder.run, f"other={tmp_path / 'plain'}", "--prompt", "?"]
    said = fails(capsys, generate.main, *both)
    assert "were trained with different chat templates" in said and "--chat-template" in said
    for first, other in ((folder.run, "same"), (str(tmp_path / "plain"), "base")):
        named = generate.find_adapters([first, f"other={tmp_path / other}"])
        outline = generate.read_model_info(folder.model)
        sources = [adapter.source for adapter in named]
        assert generate.outline_with_template(outline, sources, None).tokenizer.chat_template


def test_a_server_renders_the_chats_of_an_adapter_with_its_own(folder):
    engine = ScriptedEngine(lambda sample, index: ids("well"))

    def adopt(name, folder, done):
        engine.adapters[name] = folder
        done(None)

    engine.adopt = adopt

    def prompt(model):
        body = json.dumps({**ROW, "model": model}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20):
            return tokenizer().decode(engine.drawn[-1].prompt)

    lookup = AdapterLookup(folder.path, template_of=serve._template_of)
    with serving(engine, lookup=lookup) as url:
        assert prompt("run").startswith("<tool>look_up</tool><|im_start|>user\nWhere?")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            prompt("tiny/base")
