"""`train.export --gguf`: the files of the command, and what it refuses before the work."""

import re
import shutil

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

import lora_jax as lj
from lora_jax import models
from tests.hf.vocabularies import byte_level
from tests.models.tiny_gguf import make, words
from tests.support import with_random_factors
from tests.train.tiny import tokenizer
from train.export.__main__ import main
from train.export.modelfile import CHAT_FORMATS, find_chat_format, find_default_system_prompt
from train.run import pretrained

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    models.save_pretrained(folder, *make("qwen2"), tokenizer=words())
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of an adapter."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    _, params = models.from_pretrained(base)
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2, alpha=3)])
    lj.save_adapter(folder, with_random_factors(tree), about={"model": str(base)})
    return folder


def export(*args):
    main([str(arg) for arg in args])


def fails(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        export(*args)
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and said.startswith("error: ") and said.count("\n") == 0
    return said


def test_an_adapter(base, adapter, tmp_path, capsys):
    file = tmp_path / "new" / "mine.gguf"
    export("--adapter", adapter, "--gguf", file)
    said = capsys.readouterr().out
    assert (
        f"--lora {file}" in said and f"ollama create mine -f {tmp_path}/new/mine.Modelfile" in said
    )
    assert "with Ollama before 0.34.1" in said
    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    assert names[:2] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    modelfile = (tmp_path / "new" / "mine.Modelfile").read_text()
    assert modelfile.splitlines()[:2] == [f"FROM {base}", "ADAPTER ./mine.gguf"]
    assert modelfile.endswith(
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n'
    )
    assert {path.name for path in file.parent.iterdir()} == {"mine.gguf", "mine.Modelfile"}
    assert "replace it with --overwrite" in fails(capsys, "--adapter", adapter, "--gguf", file)
    export("--adapter", adapter, "--gguf", file, "--overwrite", "--gguf-type", "f16")


@pytest.mark.slow
def test_a_whole_model_over_a_gguf_base(base, adapter, tmp_path, capsys):
    file, again = tmp_path / "one.gguf", tmp_path / "two.gguf"
    export("--adapter", adapter, "--gguf", file, "--merged", "--gguf-type", "q8_0")
    export(
        "--adapter", adapter, "--model", file, "--allow-base-mismatch", "--merged", "--gguf", again
    )
    said = capsys.readouterr().out
    assert "byte for byte" in said and "with Ollama: ollama create two -f" in said
    one, two = ({t.name: t for t in gguf.GGUFReader(f).tensors} for f in (file, again))
    ends = words().eos_token_id, 7, 8
    assert [models.from_pretrained(f)[0].config.eos_token_ids for f in (file, again)] == [ends] * 2
    for name, tensor in one.items():
        assert (two[name].data.tobytes() == tensor.data.tobytes()) == ("attn_q.weight" not in name)
    assert two["blk.0.attn_q.weight"].tensor_type.name == "F16"
    args = ["--adapter", adapter, "--model", file, "--allow-base-mismatch", "--merged"]
    export(*args, "--gguf", again, "--overwrite", "--quantize", "none", "--gguf-type", "f32")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(again).tensors}
    assert kinds == {"F32"}
    for given, in_codes in ((base, False), (file, True)):  # the card says what it trained over
        out = tmp_path / f"peft-{in_codes}"
        export("--adapter", adapter, "--model", given, "--allow-base-mismatch", "--output", out)
        assert ("weights are quantized as Q8_0" in (out / "README.md").read_text()) == in_codes
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    args = [
        "--adapter",
        adapter,
        "--allow-base-mismatch",
        "--merged",
        "--gguf",
        tmp_path / "x.gguf",
    ]
    assert "cut.gguf is damaged or cut short" in fails(capsys, *args, "--model", cut)
    assert "is or holds" in fails(
        capsys, "--adapter", adapter, "--model", file, "--gguf", file, "--overwrite"
    )


@pytest.mark.parametrize(
    "args, said",
    [
        (["--gguf", "a.gguf", "--output", "b"], "--output cannot be used with --gguf"),
        (["--gguf", "a.gguf", "--merged", "--dtype", "float16"], "Use --gguf-type"),
        (["--gguf", "a.gguf", "--gguf-type", "q8_0"], "needs --merged"),
        (["--gguf", "a.bin"], "ends in .gguf"),
        (["--output", "b", "--gguf-type", "f16"], "Name the file with --gguf"),
    ],
)
def test_options_that_make_no_sense(args, said, adapter, capsys):
    assert said in fails(capsys, "--adapter", adapter, *args)


def test_what_is_no_export_is_not_replaced(adapter, tmp_path, capsys):
    (tmp_path / "a.gguf").write_text("mine")
    args = ["--adapter", adapter, "--gguf", tmp_path / "a.gguf", "--overwrite"]
    assert "something other than an earlier export" in fails(capsys, *args)


def test_a_tokenizer_without_a_form_is_refused_before_weights_are_read(
    adapter, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    tokenizer().save_pretrained(tmp_path / "bytes")
    args = ["--adapter", adapter, "--merged", "--gguf", tmp_path / "a.gguf"]
    assert "needs merges" in fails(capsys, *args, "--tokenizer", tmp_path / "bytes")


LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
)
OTHER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    "template, chat",
    [(None, CHAT_FORMATS[0]), (LLAMA3, CHAT_FORMATS[1]), (GEMMA, CHAT_FORMATS[2]), (OTHER, None)],
)
def test_formats_of_chats(template, chat):
    assert find_chat_format(words(), template) == chat


def test_a_format_whose_turns_begin_with_bos():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level("llama-bpe"), bos_token="<|im_start|>"
    )
    assert find_chat_format(tokenizer, words().chat_template) == CHAT_FORMATS[0]


PROMPT = 'You are Ada.\nAnswer in "one" line.'
CHATML = (
    "{% for m in messages %}FIRST<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT = "{% if loop.first and m.role != 'system' %}BEGIN{% endif %}"
ADDS = CHATML.replace(
    "FIRST", WITHOUT.replace("BEGIN", f"<|im_start|>system\n{PROMPT}<|im_end|>\n")
)
DATED = (  # as Llama 3's, whose system turn begins with a day, whatever the prompt is
    "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}"
    "{% else %}DEFAULT{% endif %}<|eot_id|>"
) + LLAMA3
UNCLEAR = CHATML.replace(
    "FIRST", WITHOUT.replace("BEGIN", "<|im_start|>user\nBe kind.<|im_end|>\n")
)
JOINED = (  # as Mistral's: a system prompt is a part of the first message
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "[{{ m.role }}] {{ s if loop.first else '' }}{{ m.content }} {% endfor %}"
)


@pytest.mark.parametrize(
    "template, prompt",
    [
        (None, ""),
        (CHATML.replace("FIRST", ""), ""),
        (ADDS, PROMPT),
        (ADDS.replace("loop.first and", "loop.first and messages | length < 9 and"), PROMPT),
        (LLAMA3, ""),
        (GEMMA, ""),
        (JOINED, ""),
        (OTHER, ""),
        (DATED.replace("DEFAULT", ""), ""),
        (DATED.replace("DEFAULT", "Be brief."), "Be brief."),
        (UNCLEAR, None),
        (JOINED.replace("set s = ''", "set s = 'Be kind. '"), None),
        (
            OTHER.replace(
                "{% for", "{{ raise_exception('no') if messages[0].role == 'system' }}{% for"
            ),
            None,
        ),
        (ADDS.replace(PROMPT, 'Three """ quotes'), None),
        (ADDS.replace(PROMPT, 'Say "yes"'), None),
    ],
)
def test_the_system_prompt_that_a_template_adds(template, prompt):
    assert (
        find_default_system_prompt(words(), template, find_chat_format(words(), template)) == prompt
    )


def rendered_by_ollama(modelfile, chat):
    """Returns a chat by TEMPLATE, with the turn of SYSTEM before it, as Ollama begins one."""
    parts = dict(
        re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    )
    ((turn, end),) = re.findall(
        r"^{{ range .Messages }}(.*){{ end }}(.*)$", parts["TEMPLATE"], re.DOTALL
    )
    system = [{"role": "system", "content": parts["SYSTEM"]}] if "SYSTEM" in parts else []
    turns = [
        turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in [*system, *chat]
    ]
    return "".join(turns) + end


@pytest.mark.parametrize("merged", [True, False])
def test_ollama_shows_the_system_prompt_of_training(merged, base, adapter, tmp_path, capsys):
    model, file = tmp_path / "model", tmp_path / "mine.gguf"
    shutil.copytree(base, model)
    chat = [{"role": "user", "content": "Hi."}]
    line = ["--adapter", adapter, "--model", model, "--allow-base-mismatch", "--gguf", file]
    for template in (ADDS, CHATML.replace("FIRST", ""), UNCLEAR):
        (model / "chat_template.jinja").write_text(template)
        export(*line, "--overwrite", *["--merged"] * merged)
        said = capsys.readouterr().out.replace("\n", " ")
        assert ("warning: " in said and "has no SYSTEM" in said) == (template is UNCLEAR)
        text = rendered_by_ollama((tmp_path / "mine.Modelfile").read_text(), chat)
        own = models.load_tokenizer(model)
        want = own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert (text == want) == (template is not UNCLEAR)
