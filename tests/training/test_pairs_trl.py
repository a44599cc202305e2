"""Token sequences of preferences against those that TRL's trainers see (extra `parity`)."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_jax.training.data.chats import check_lengths
from lora_jax.training.data.pairs import tokenize_pairs
from lora_jax.training.errors import TrainingError
from tests.train.tiny import CHATML
from tests.train.tiny import tokenizer as bytes_of
from tests.training.test_tools import TOOLS, made

pytestmark = pytest.mark.parity
ROWS = 200
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Puts an empty thought before the last answer, and before none that others follow.
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama": "{{- bos_token }}" + made("llama").chat_template,
    "mistral": "{{- bos_token }}" + made("mistral").chat_template,
    "gemma": GEMMA,
    "thought": THOUGHT,
    "qwen": made("qwen").chat_template,
}
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import dpo_trainer, kto_trainer

        return SimpleNamespace(dpo=dpo_trainer, kto=kto_trainer)


def said(draw, most=12):
    """Words of few letters, spaces and ends of lines: tokens merge across all of them."""
    letters = draw.choice(list("ab  \né"), draw.integers(1, most))
    return "".join([draw.choice(list("abc")), *letters, draw.choice(list("abc"))])


def tokenizer(template, *, bos=True):
    """A BPE whose tokens go across spaces, with a beginning of text unless a template writes it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    draw = np.random.default_rng(5)
    texts = [said(draw, 40) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.chat_template = template
    return found


def turn(role, content):
    return {"role": role, "content": content}


def rows_of(form, seed, *, system=True, tools=False):
    """Random pairs: chats with their prompt apart or not ("implicit"), or texts."""
    draw = np.random.default_rng(seed)
    rows = []
    while len(rows) < ROWS:
        chosen, rejected = said(draw), said(draw)
        if draw.random() < 0.1:
            rejected = chosen + rejected
        if chosen == rejected:
            continue
        if "texts" in form:
            prompt = said(draw, 20) + draw.choice(["", " ", "\n"])
            ends = (chosen, f"{rejected}</s>")
        else:
            prompt = [turn("system", said(draw))] if system and draw.random() < 0.4 else []
            for _ in range(draw.integers(0, 3)):
                prompt += [turn("user", said(draw)), turn("assistant", said(draw))]
            prompt += [turn("user", said(draw, 20))]
            ends = ([turn("assistant", chosen)], [turn("assistant", rejected)])
        row = {"prompt": prompt, "chosen": ends[0], "rejected": ends[1]}
        if "implicit" in form:
            row = {"chosen": prompt + ends[0], "rejected": prompt + ends[1]}
        rows.append({**row, "tools": json.dumps(TOOLS)} if tools else row)
    return rows


def of_trl(module, rows, made, seq_len, **settings):
    """For each sequence that the trainer sees: (its tokens, where the completion is, its label)."""
    from datasets import Dataset

    trainer, collator = (
        (module.DPOTrainer, module.DataCollatorForPreference)
        if hasattr(module, "DPOTrainer")
        else (module.KTOTrainer, module.DataCollatorForUnpairedPreference)
    )
    stub = SimpleNamespace(
        _tokenizer=made, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0
    )
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=seq_len, truncation_mode="keep_start", **settings
    )
    prepared = trainer._prepare_dataset(stub, Dataset.from_list(rows), made, args, "train")
    batch = collator(pad_token_id=made.pad_token_id, max_length=seq_len)([*prepared])
    labels = batch.get("label", [None] * len(batch["input_ids"]))
    arrays = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [
        (ids[there == 1].tolist(), mask[there == 1].tolist(), label)
        for ids, there, mask, label in zip(*arrays, labels, strict=True)
    ]


def ours(tokens, seq_len, *, a_unit):
    """The same of tokenised rows, without labels."""
    kept = check_lengths(tokens, seq_len, truncate=True, a_unit=a_unit)
    return [(one.ids.tolist(), one.counts.astype(int).tolist()) for one in kept]


CASES = [
    *((name, form) for name in TEMPLATES for form in ("chats", "implicit chats")),
    *((None, form) for form in ("texts", "implicit texts")),
    ("chatml", "implicit texts"),
    ("bytes", "implicit texts"),
]


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_pairs(trl, name, form, truncate):
    made = tokenizer(TEMPLATES.get(name), bos=form != "implicit texts")
    made = bytes_of(None) if name == "bytes" else made
    rows = rows_of(form, 7, system=name not in ("mistral", "gemma"), tools=name == "qwen")
    tokens = tokenize_pairs(rows, made, "rows")
    seq_len = int(np.median(tokens.lengths) if truncate else tokens.lengths.max())
    want = of_trl(trl.dpo, rows, made, seq_len)
    got = ours(tokens, seq_len, a_unit=2)
    assert [(ids, mask) for ids, mask, _ in want] == got[::2] + got[1::2]
    assert (len(got) < 2 * ROWS) == truncate


def test_boundaries_of_the_tests_are_hard():
    """Counts prompts whose tokens change when a completion follows."""
    for template, form in ((CHATML, "chats"), (None, "texts")):
        made, changed = tokenizer(template), 0
        for row in rows_of(form, 7):
            asked, answered = row["prompt"], row["prompt"] + row["chosen"]
            if template:
                asked = made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
                answered = made.apply_chat_template(answered, tokenize=False)
            alone, both = (made(text)["input_ids"] for text in (asked, answered))
            changed += both[: len(alone)] != alone
        assert changed > 5, (form, changed)


@pytest.mark.parametrize("name", ["chatml", "gemma", None])
@pytest.mark.parametrize("paired", [False, True])
def test_labelled_completions(trl, name, paired):
    made = tokenizer(TEMPLATES.get(name))
    form = "implicit " * (paired and name == "gemma") + ("chats" if name else "texts")
    rows = rows_of(form, 11, system=name != "gemma")
    if not paired:
        good = np.random.default_rng(2).random(ROWS) < 0.3
        rows = [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if label else "rejected"],
                "label": bool(label),
            }
            for row, label in zip(rows, good, strict=True)
        ]
    tokens = tokenize_pairs(rows, made, "rows", labelled=True)
    seq_len = int(np.median(tokens.lengths))
    want = of_trl(trl.kto, rows, made, seq_len, per_device_train_batch_size=4)
    kept = check_lengths(tokens, seq_len, truncate=True)
    labels = kept.labels.tolist()
    got = [
        (ids, mask, label)
        for (ids, mask), label in zip(ours(tokens, seq_len, a_unit=1), labels, strict=True)
    ]
    if paired:  # TRL has all chosen completions before all rejected ones
        got.sort(key=lambda one: not one[2])
        want.sort(key=lambda one: not one[2])
    assert [(ids, mask, bool(label)) for ids, mask, label in want] == got
    assert len(got) < len(tokens) and 0 < sum(labels) < len(labels)


def test_what_a_tool_says_within_a_completion_is_not_learned(trl):
    """TRL counts it. All else is alike."""
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "ab"}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [called]}
    said_by_tool = turn("tool", "it rains")
    row = {
        "prompt": [turn("user", "rain?")],
        "chosen": [calls, said_by_tool, turn("assistant", "yes")],
        "rejected": [calls, said_by_tool, turn("assistant", "no, none")],
    }
    made = tokenizer(TEMPLATES["qwen"])
    tokens = tokenize_pairs([row], made, "rows")
    (ids, mask, _), (other, *_) = of_trl(trl.dpo, [row], made, 512)
    assert [one.ids.tolist() for one in tokens] == [ids, other]
    learned, theirs = (
        made.decode([one for one, counts in zip(ids, of, strict=True) if counts])
        for of in (tokens[0].counts, mask)
    )
    result = "\n<|im_start|>user\n<tool_response>\nit rains\n</tool_response><|im_end|>\n"
    assert theirs.replace(result + "<|im_start|>assistant\n", "") == learned
    assert result in theirs and learned.count("<|im_end|>") == 2


def test_a_prompt_that_announces_another_answer_is_refused(trl):
    """TRL drops the empty thought at the end of such a prompt, which the model sees when asked."""
    template = CHATML + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    made = tokenizer(template)
    rows = rows_of("chats", 3)[:2]
    (ids, *_), *_ = of_trl(trl.dpo, rows, made, 512)
    prompt = made.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert "<think>" in prompt and "<think>" not in made.decode(ids)
    with pytest.raises(TrainingError, match="row 1: .* differently from its prompt"):
        tokenize_pairs(rows, made, "rows")
