"""Chats with tools: rendered as transformers renders them, and what the loss counts of them."""

import json

import numpy as np
import pytest

from lora_jax.training.data.chats import tokenize
from lora_jax.training.data.rows import PlacedRow, check_rows, conversation
from lora_jax.training.errors import TrainingError
from tests.train.tiny import CHATML, tokenizer

# Four ways of writing tools, as the models named write them; {% generation %} is added where a
# model's users add it.
QWEN = """
{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{{- BEGIN }}{{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}{{- '}\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>' }}{{- END }}{{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA = """
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{{- BEGIN }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}{{- END }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{{- BEGIN }}
        {{- message.content | trim + '<|eot_id|>' }}{{- END }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
        {%- if tools and message == (messages | selectattr('role', 'equalto', 'user') | first) %}
            {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}
        {%- endif %}{{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
MISTRAL = """
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}{{- BEGIN }}{{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('nine letters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']</s>' }}
        {%- endfor %}{{- END }}
    {%- elif message.role == 'assistant' %}
        {{- BEGIN }}{{- ' ' + message.content + '</s>' }}{{- END }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
GPT_OSS = """
{%- if tools %}{{- '<|start|>developer<|message|>namespace functions {' }}
    {%- for tool in tools %}{{- '\ntype ' + tool.function.name + ' = (_: ' }}
        {{- tool.function.parameters | tojson + ') => any;' }}{%- endfor %}{{- '\n}<|end|>' }}
{%- endif %}
{%- set last = namespace(call=none) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- '<|start|>assistant' }}{{- BEGIN }}
        {%- if message.tool_calls %}
            {%- if message.thinking %}
                {{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
                {{- '<|start|>assistant' }}{%- endif %}
            {%- set last.call = message.tool_calls[0].function.name %}
            {{- ' to=functions.' + last.call + '<|channel|>commentary json<|message|>' }}
            {{- message.tool_calls[0].function.arguments | tojson + '<|call|>' }}
        {%- elif loop.last and not add_generation_prompt %}
            {{- '<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}{{- '<|channel|>final<|message|>' + message.content + '<|end|>' }}
        {%- endif %}{{- END }}
    {%- elif message.role == 'tool' %}
        {%- if last.call is none %}{{- raise_exception('no call') }}{%- endif %}
        {{- '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL, "gpt-oss": GPT_OSS}
CALLS = {
    "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ürümqi", "days": 2}}\n'
    "</tool_call><|im_end|>",
    "llama": '{"name": "weather", "parameters": {"city": "Ürümqi", "days": 2}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ürümqi", "days": 2}, '
    '"id": "abcdefghi"}]</s>',
    "gpt-oss": "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant to=functions."
    'weather<|channel|>commentary json<|message|>{"city": "Ürümqi", "days": 2}<|call|>',
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <the> weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"name": "weather", "arguments": {"city": "Ürümqi", "days": 2}}
USER = {"role": "user", "content": "Rain in Ürümqi?"}
NAMES_IT = {"role": "user", "content": "What is the weather?"}
CALLING = {
    "role": "assistant",
    "content": None,
    "thinking": "Look it up.",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
}
TOLD = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"wet": 0}'}
ANSWER = {"role": "assistant", "content": "No rain."}
CHAT = {"messages": [USER, CALLING, TOLD, ANSWER], "tools": TOOLS}


def chat_of(name):
    """A chat with tools; with thoughts, where the template shows them."""
    if name == "gpt-oss":
        return CHAT
    calling = {field: value for field, value in CALLING.items() if field != "thinking"}
    return {**CHAT, "messages": [USER, calling, TOLD, ANSWER]}


def made(name, *, generation=False):
    """A tokenizer with one of the templates, with or without marks."""
    template = TEMPLATES[name]
    tags = ("{%- generation %}", "{%- endgeneration %}") if generation else ("", "")
    for word, tag in zip(("{{- BEGIN }}", "{{- END }}"), tags, strict=True):
        template = template.replace(word, tag)
    return tokenizer(template)


def texts(row, made):
    """For each sequence of a row: (its text, the text of the tokens that count)."""
    return [(made.decode(t.ids), made.decode(t.ids[t.counts])) for t in tokenize([row], made, "d")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_rendered_as_transformers_renders_them_and_count(name):
    judge, chat = made(name), chat_of(name)
    rendered = [
        judge.apply_chat_template(chat["messages"][:n], tools=TOOLS, tokenize=False).rstrip()
        for n in (2, 4)
    ]
    answer = rendered[1][rendered[1].rindex("No rain.") :]
    found = texts(chat, judge)
    assert [text for text, _ in found] in (rendered, rendered[1:])
    counted = "".join(counts for _, counts in found)
    assert counted.startswith(CALLS[name]) and counted.endswith(answer)
    assert "wet" not in counted and "Rain" not in counted
    # The same call as people have it: arguments as the JSON of an object, tools as text.
    quoted = {**CALL, "arguments": json.dumps(CALL["arguments"])}
    calling = chat["messages"][1]
    calling = {**calling, "tool_calls": [{**calling["tool_calls"][0], "function": quoted}]}
    row = {"messages": [USER, calling, TOLD, ANSWER], "tools": json.dumps(TOOLS)}
    assert texts(row, judge) == found


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_of_a_template_are_the_mask(name):
    judge, chat = made(name, generation=True), chat_of(name)
    expected = judge.apply_chat_template(
        chat["messages"], tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    (tokens,) = tokenize([chat], judge, "data")
    n, mask = len(tokens), np.array(expected["assistant_masks"], bool)
    assert mask.any() and not mask[n:].any()
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"][:n])
    np.testing.assert_array_equal(tokens.counts, mask[:n])
    (last,) = tokenize([chat], judge, "data", train_on="last")
    assert "weather" not in judge.decode(last.ids[last.counts])


def test_the_loss_counts_all_the_last_turn_or_the_assistants():
    judge = tokenizer()
    row = {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "None."}]}
    (every,) = tokenize([row], judge, "data", train_on="all")
    assert every.counts.all()
    (last,) = tokenize([row], judge, "data", train_on="last")
    assert judge.decode(last.ids[last.counts]) == "None.<|im_end|>"
    assert judge.decode(last.ids) == judge.decode(every.ids)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (
            {"messages": [USER, CALLING]},
            CHATML,
            "row 1: the model's chat template shows no tool calls.* does .--chat-template FILE;",
        ),
        (
            {**CHAT, "messages": [USER, ANSWER]},
            CHATML,
            "shows no tools: 'weather' is not in.* does .--chat-template FILE;",
        ),
        ({**CHAT, "messages": [NAMES_IT, ANSWER]}, CHATML, "shows no tools: 'weather' is only"),
        (
            {"messages": [USER, ANSWER, TOLD, ANSWER]},
            "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "does not show this turn of the role 'tool'",
        ),
        ({**CHAT, "messages": [USER, ANSWER]}, None, "row 1 has `tools`, but the model has no"),
    ],
)
def test_what_a_template_would_drop_is_refused(row, template, message):
    with pytest.raises(TrainingError, match=message):
        tokenize([row], tokenizer(template), "data")


def calling(**call):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (calling(type="function"), "`tool_calls` of turn 1 has .*a call needs `function` with"),
        (calling(function={"name": "f", "arguments": "{'a': 1}"}), "`arguments` of f is \"{'a'"),
        (
            {"messages": [{**USER, "tool_calls": [{"name": "f"}]}]},
            "belong to the role 'user', but only",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "audio"}]}]},
            "`content` of turn 0 is .*audio",
        ),
        ({**CHAT, "tools": "none"}, "`tools` is 'none'; a list of objects"),
        ({"\ufeffprompt": "a", "completion": "b"}, r"has `\\ufeffprompt`, `completion`; a row"),
        (
            {"conversations": [{"from": "cat", "value": "x"}]},
            "`from` of turn 0 is 'cat', but it must be one of",
        ),
    ],
)
def test_a_call_that_cannot_be_used_says_why(row, message):
    with pytest.raises(TrainingError, match=message):
        conversation(row, "row 7")


PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "id": 3},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"messages": json.dumps(PAIR), "prompt": None},
        {"messages": [{**turn, "name": None, "tool_calls": None} for turn in PAIR]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, PAIR[1]]},
    ],
)
def test_each_form_is_the_same_chat(row):
    assert conversation(row, "row 1").messages == PAIR


def test_other_forms_have_their_own_parts():
    row = {"instruction": "a", "input": "b", "output": "c", "text": "all of it"}
    assert conversation(row, "row 1").messages[0]["content"] == "a\n\nb"
    (tokens,) = tokenize([{"text": "abc"}], tokenizer(), "data")
    assert tokenizer().decode(tokens.ids) == "abc<|im_end|>" and tokens.counts.all()
    turns = [
        ("human", "a"),
        ("function_call", json.dumps(CALL)),
        ("observation", "0"),
        ("gpt", "b"),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    called, told = conversation(row, "row 1").messages[1:3]
    assert called["tool_calls"] == [CALL] and told == {"role": "tool", "content": "0"}


def test_plain_texts_and_chats_are_not_mixed():
    rows = [PlacedRow({"prompt": "a", "completion": "b"}), PlacedRow({"text": "c"})]
    for row, line in zip(rows, (3, 8), strict=True):
        row.place = ("a.csv", f"line {line}")
    with pytest.raises(TrainingError, match="a.csv, line 8 has `text`; a row needs `messages`"):
        check_rows(rows, "data")
