"""Pairs of completions, and completions with labels: their tokens, their rows, and bad ones."""

import dataclasses
import json

import numpy as np
import pytest

from lora_jax import training
from lora_jax.training.data.chats import check_lengths
from lora_jax.training.data.pairs import check_pairs, tokenize_pairs, tokenize_prompts
from lora_jax.training.data.preferences import pack_pairs
from lora_jax.training.errors import TrainingError
from tests.train.tiny import CHATML, FORGETFUL, tokenizer, write_jsonl
from tests.training.test_dropped import BY_TEXT
from tests.training.test_tools import TOOLS, made
from train.console.errors import UserError
from train.data.chats import tokenize
from train.data.dataset import find_dataset

USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "hi"), ("assistant", "yo!"), ("assistant", "no"))
)
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def learned(row, template=CHATML, **how):
    """For each sequence of a row: (the text before the tokens that count, the text of these)."""
    made = tokenizer(template)
    return [
        (made.decode(one.ids[~one.counts]), made.decode(one.ids[one.counts]))
        for one in tokenize_pairs([row], made, "data", **how)
    ]


PAIR = [(ASKED, "yo!<|im_end|>\n"), (ASKED, "no<|im_end|>\n")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yo!", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "messages": [USER, GOOD]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": "no"},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, {**BAD, "name": None}]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_each_form_is_the_same_pair(row):
    assert learned(row) == learned(row, labelled=True) == PAIR


def test_only_the_completion_counts_and_in_it_only_the_assistant():
    prompt = [USER, {**GOOD, "content": "before"}, USER]
    row = {"prompt": prompt, "chosen": [GOOD, USER, BAD], "rejected": [BAD]}
    (_, chosen), (asked, rejected) = learned(row)
    assert chosen == "yo!<|im_end|>no<|im_end|>\n" and rejected == "no<|im_end|>\n"
    assert asked == ASKED[: -len("<|im_start|>assistant\n")] + (
        "<|im_start|>assistant\nbefore<|im_end|>\n" + ASKED
    )
    muted = {**row, "chosen": [{**GOOD, "weight": 0}, USER, BAD]}
    assert learned(muted)[0][1] == "no<|im_end|>\n"


def test_a_system_that_the_prompt_begins_with_counts_once():
    system = {"role": "system", "content": "be kind"}
    row = {"prompt": [system, USER], "chosen": [GOOD], "rejected": [BAD]}
    assert learned({**row, "system": "be kind"}) == learned(row)
    assert learned({**row, "prompt": [USER], "system": "be kind"}) == learned(row)


@pytest.mark.parametrize(
    "field",
    [{"input": "en"}, {"query": "a search", "problem": "another"}, {"question": "anything"}],
)
def test_a_field_beside_a_question_of_the_user_is_something_else(field):
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert learned({**field, **row}) == learned(row)


def test_a_question_that_the_texts_begin_with_is_read_whatever_its_white_space():
    row = {"chosen": "Q: one\n two A: so", "rejected": "Q: one\n two A: no"}
    assert learned({**row, "question": "one two\n"}) == learned(row)
    with pytest.raises(TrainingError, match="its `question` would not be read"):
        learned({**row, "question": "onetwo"})


@pytest.mark.parametrize("template", [None, CHATML])
def test_texts_without_a_prompt_are_taken_as_they_are(template):
    row = {"chosen": "Q: 1+1? A: two", "rejected": "Q: 1+1? A: three"}
    assert learned(row, template) == [
        ("Q: 1+1? A: t", "wo<|im_end|>"),
        ("Q: 1+1? A: t", "hree<|im_end|>"),
    ]


def test_without_a_template_texts_are_prompt_completion_and_end():
    row = {"prompt": "ab", "chosen": "cd", "rejected": "e<|im_end|>"}
    assert learned(row, None) == [("ab", "cd<|im_end|>"), ("ab", "e<|im_end|>")]
    row = {"prompt": "ab", "completion": "cd", "label": False}
    assert learned(row, None, labelled=True) == [("ab", "cd<|im_end|>")]


BOTH = {"prompt": "a", "chosen": "b", "rejected": "c"}
ONE = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2 has `prompt`, `chosen`; a row needs `prompt`, `ch"),
        (ONE, "row 2 has `prompt`, `completion` and `label`, which only the loss kto reads"),
        ({**ONE, "label": None}, "row 2 has `prompt`, `completion`, `label`"),
        ({**BOTH, "chosen": "c"}, "row 2: `chosen` and `rejected` are the same. Remove the row"),
        ({**BOTH, "chosen": " "}, "row 2: `chosen` is empty"),
        ({**BOTH, "rejected": []}, r"row 2: `rejected` is \[\], but it must be a list of turns"),
        ({**BOTH, "rejected": [{**BAD, "content": ""}]}, "says nothing in `rejected`"),
        ({**BOTH, "rejected": [{**BAD, "weight": 0}]}, "says nothing in `rejected`"),
        ({**BOTH, "prompt": ""}, "row 2: `prompt` is empty"),
        ({**BOTH, "prompt": [USER, GOOD]}, "row 2 ends with an assistant's turn"),
        ({**BOTH, "prompt": 3}, "row 2: `prompt` is 3"),
        ({**BOTH, "chosen": [{"role": "user"}]}, "`content` of turn 0 is None; a turn needs"),
        (
            {**BOTH, "chosen": [USER]},
            "after the prompt, `chosen` has the turns user, but these must",
        ),
        ({**BOTH, "chosen": [GOOD, USER]}, "`chosen` has the turns assistant, user, but these"),
        ({"chosen": "yes", "rejected": "no"}, "row 2 has no `prompt`, and `chosen` and `rejected`"),
        ({**BOTH, "chosen": None}, "row 2: `chosen` is null. Fill it in, or remove the row"),
        ({**BOTH, "rejected": None}, "row 2: `rejected` is null. Fill it in"),
        ({**BOTH, "system": 3}, "row 2: `system` is 3, but it must be a text"),
        (
            {**BOTH, "prompt": [{"role": "system", "content": "s"}, USER], "system": "t"},
            "row 2 has a `system`, but its prompt begins with another system turn",
        ),
        (
            {"question": "a", "chosen": "so b", "rejected": "so c"},
            r"row 2 has no `prompt`, and its `question` would not be read. .*--fields prompt=quest",
        ),
        (
            {
                "instruction": "a",
                "chosen": [{"role": "system", "content": "s"}, GOOD],
                "rejected": [{"role": "system", "content": "s"}, BAD],
            },
            "row 2 has no `prompt`, and its `instruction` would not be read",
        ),
        ({"chosen": "\n\nyes", "rejected": "\n\nno"}, "row 2 has no `prompt`, and `chosen` and"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "row 2 has no `prompt`, and `chosen` and"),
        ({"chosen": "I do", "rejected": "I don't"}, "row 2 has `chosen`, `rejected`; a row needs"),
        ({**BOTH, "tools": "x"}, "row 2: `tools` is 'x'; a list of objects"),
    ],
)
def test_a_row_that_is_no_pair_is_named_with_what_it_has(row, message):
    with pytest.raises(TrainingError, match=message):
        check_pairs([BOTH, row], "data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "label": True}, "row 2 has `prompt`, `label`; a row needs `prompt`, `com"),
        ({**ONE, "label": 1}, "row 2: `label` is 1, but it must be true or false"),
        ({**ONE, "completion": ""}, "row 2: `completion` is empty"),
        ({**ONE, "completion": None}, "row 2: `completion` is null. Fill it in"),
        ({**ONE, "label": None, "chosen": None}, "row 2: `chosen` is null. Fill it in"),
    ],
)
def test_a_row_without_a_label_is_named(row, message):
    check_pairs([ONE, BOTH], "data", labelled=True)
    with pytest.raises(TrainingError, match=message):
        check_pairs([ONE, row], "data", labelled=True)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({**BOTH, "tools": TOOLS}, CHATML, "row 1: .* shows no tools: 'weather' is not in"),
        ({**BOTH, "tools": TOOLS}, None, "row 1 has `tools`, but the model has no chat template"),
        ({**BOTH, "chosen": [GOOD, USER, GOOD]}, None, "row 1 is a chat, but the model has no"),
        ({**BOTH, "chat_template_kwargs": {"x": 1}}, CHATML, "row 1: .* does not read `x`"),
        (
            {**BOTH, "chosen": [{**GOOD, "content": "hm|a"}, USER, GOOD]},
            FORGETFUL,
            "row 1: .* renders an assistant's turn differently if other turns follow",
        ),
        (
            {**BOTH, "system": "s"},
            None,
            "`system` is a turn of a chat template, and not of a model",
        ),
        (
            {"chosen": "a b", "rejected": "a c", "system": "s"},
            CHATML,
            "`system` is a turn of a chat template, and not of texts without a `prompt`",
        ),
        (
            BOTH,
            "{{ raise_exception('no') }}",
            "row 1: the model's chat template refuses the chat .no",
        ),
        ({**BOTH, "chosen": "\ud83d"}, CHATML, "row 1 has .*one half of a surrogate pair"),
    ],
)
def test_what_the_template_does_not_take_is_refused(row, template, message):
    with pytest.raises(TrainingError, match=message):
        tokenize_pairs([row], tokenizer(template), "data")


def test_a_system_text_is_the_first_turn():
    """As axolotl reads Intel/orca_dpo_pairs; an empty one is none."""
    system = {"role": "system", "content": "Be brief."}
    turns = {"prompt": [system, USER], "chosen": [GOOD], "rejected": [BAD]}
    row = {"system": "Be brief.", "prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]}
    repeating = row | {"chosen": [USER, GOOD]}
    whole = row | {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    for one, other in (
        (row, turns),
        (repeating, turns),
        (whole, turns),
        (row | {"system": ""}, turns | {"prompt": [USER]}),
        (row | {"system": None}, turns | {"prompt": [USER]}),
    ):
        got, want = (tokenize_pairs([x], tokenizer(), "data") for x in (one, other))
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.counts, want.counts)


def test_fields_that_the_template_leaves_out_are_told_of():
    thought = {**GOOD, "reasoning_content": "a rather long chain of thoughts"}
    row = {"prompt": [USER, thought, USER], "chosen": [thought], "rejected": [BAD]}
    with pytest.warns(UserWarning, match="leaves out `reasoning_content` of 1 of") as caught:
        training.pairs([row], tokenizer(BY_TEXT), seq_len=512)
    assert caught[0].filename == __file__


def random_rows(n, draw):
    """Rows of different lengths; none is the other's completion."""
    texts = ["".join(draw.choice(list("ab c"), k)) + "." for k in draw.integers(1, 30, 3 * n)]
    return [
        {"prompt": a, "chosen": f"x{b}", "rejected": f"y{c}"}
        for a, b, c in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]


DRAW = np.random.default_rng(4)
ROWS = random_rows(40, DRAW)
LABELS = DRAW.random(40) < 0.5
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(label)}
    for row, label in zip(ROWS, LABELS, strict=True)
]


def in_batch(packs):
    """For each unit: its row of the data, and of each sequence its tokens, positions and targets.

    They are read out of a batch of all rows, segment by segment.
    """
    batch, found = packs.take(np.arange(len(packs))), []
    for row in range(len(packs)):
        segments, ids = batch["segment_ids"][row], batch["ids"][row]
        there = batch["weights"][row] > 0
        at, targets = batch["predict_at"][row][there], batch["targets"][row][there]
        assert (ids[at + 1] == targets).all() and (segments[at + 1] == segments[at]).all()
        sequences = [
            (
                ids[segments == segment].tolist(),
                batch["positions"][row][segments == segment].tolist(),
                targets[segments[at] == segment].tolist(),
            )
            for segment in range(1, segments.max() + 1)
        ]
        numbers = packs.table.rows[packs.firsts[row] : packs.firsts[row + 1]]
        found += [
            (int(numbers[i]), sequences[i : i + packs.a_unit])
            for i in range(0, len(sequences), packs.a_unit)
        ]
    return batch, found


@pytest.mark.parametrize("labelled", [False, True])
def test_packing_changes_no_unit(labelled):
    rows, a_unit, seq_len = (LABELLED, 1, 90) if labelled else (ROWS, 2, 70)
    made = tokenizer(None)
    alone, packed = (
        training.pairs(rows, made, seq_len=seq_len, packing=packing, labelled=labelled)
        for packing in (False, True)
    )
    (one, of_alone), (many, of_packed) = in_batch(alone), in_batch(packed)
    assert of_alone == sorted(of_packed) and [number for number, _ in of_alone] == [*range(1, 41)]
    for (_, unit), row in zip(of_alone, rows, strict=True):
        for (ids, positions, targets), field in zip(
            unit, ["completion"] if labelled else ["chosen", "rejected"], strict=True
        ):
            assert made.decode(ids) == row["prompt"] + row[field] + "<|im_end|>"
            assert positions == [*range(len(ids))]
            assert made.decode(targets) == row[field] + "<|im_end|>"
    assert alone.segments_a_row == a_unit < packed.segments_a_row
    assert len(alone) == 40 and len(packed) < 30
    assert many["ids"].shape[1] <= a_unit * seq_len and one["segment_ids"].max() == a_unit
    assert alone.name(3) == "row 4" and packed.digest() != alone.digest()
    for batch in (one, many):
        at = np.take_along_axis(batch["segment_ids"], batch["predict_at"], axis=1)
        segments = np.arange(1, batch["counts"].shape[1] + 1)[:, None, None]
        counts = ((at == segments) & (batch["weights"] > 0)).sum(-1).T
        np.testing.assert_array_equal(batch["counts"], counts)
        assert batch["counts"].dtype == np.int32 and (counts == 0).any() == (batch is many)
    if labelled:
        assert one["labels"].dtype == np.int32 and one["labels"][:, 0].tolist() == LABELS.tolist()
        numbers = np.split(packed.table.rows, packed.firsts[1:-1])
        for labels, of_row in zip(many["labels"], numbers, strict=True):
            rest = packed.segments_a_row - len(of_row)
            assert labels.tolist() == [*LABELS[of_row - 1], *[0] * rest]
        others = [{**row, "label": not row["label"]} for row in rows]
        other = training.pairs(others, made, seq_len=seq_len, labelled=True)
        assert other.digest() != alone.digest()
    else:
        mean = np.mean([len(row["chosen"]) + 1 for row in rows])  # and the end
        for batch in (one, many):
            np.testing.assert_allclose(batch["mean_tokens"], mean, rtol=1e-6)


def test_log_probabilities_of_the_reference_go_with_their_rows():
    packed = training.pairs(ROWS, tokenizer(None), seq_len=70, packing=True)
    assert "reference" not in packed.take(np.arange(2)) and "labels" not in packed.by_name()
    reference = DRAW.normal(size=(len(packed), packed.segments_a_row)).astype(np.float32)
    packed = dataclasses.replace(packed, reference=reference)
    rows = np.array([[3, 1], [0, 3]])
    np.testing.assert_array_equal(packed.take(rows)["reference"], reference[rows])
    (first, *_, last) = packed.parts(4)
    np.testing.assert_array_equal(first["reference"], reference[packed.by_length[:4]])
    filled_up = -len(packed) % 4
    assert filled_up and not last["weights"][-filled_up:].any()
    assert last["counts"].any(axis=1).tolist() == [True] * (4 - filled_up) + [False] * filled_up
    assert packed.take(rows)["mean_tokens"].shape == rows.shape


def test_a_pair_of_which_one_has_no_token_left_is_dropped():
    rows = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c" * n} for n in (2, 4, 7, 9)]
    rows += [{"prompt": "a", "chosen": "b" * 3, "rejected": "c" * 30}]
    tokens = tokenize_pairs(rows, tokenizer(None), "data")
    with pytest.raises(TrainingError, match="7 of 10 sequences are longer than seq_len=8. The lon"):
        check_lengths(tokens, 8, truncate=False, a_unit=2)
    kept = check_lengths(tokens, 8, truncate=True, a_unit=2)
    assert kept.rows.tolist() == [1, 1, 2, 2, 3, 3, 5, 5]
    assert kept.lengths.tolist() == [5, 5, 8, 8, 8, 8, 5, 8]
    tokens.counts[tokens.starts[2] : tokens.starts[3]] = False  # of one of the second pair
    assert check_lengths(tokens, 8, truncate=True, a_unit=2).rows.tolist() == [1, 1, 3, 3, 5, 5]
    packs = pack_pairs(kept, 8, packing=True)
    assert packs.lengths == (16,) and packs.segments_a_row == 2
    labelled = tokenize_pairs(rows, tokenizer(None), "data", labelled=True)
    kept = check_lengths(labelled, 8, truncate=True)
    assert kept.labels.tolist() == [True, False] * 4
    with pytest.raises(TrainingError, match="the rows is empty"):
        training.pairs([], tokenizer(None), seq_len=8)


def test_prompts_are_rendered_up_to_the_answer():
    judge = made("qwen")
    rows = [
        {"prompt": "rain?", "tools": TOOLS, "answer": "no"},
        {"prompt": [{"role": "system", "content": "Be brief."}, USER], "tools": None},
    ]
    messages = [[{"role": "user", "content": "rain?"}], rows[1]["prompt"]]
    assert tokenize_prompts(rows, judge, "data") == [
        judge.apply_chat_template(
            turns, tools=row["tools"], add_generation_prompt=True, return_dict=False
        )
        for row, turns in zip(rows, messages, strict=True)
    ]
    plain = tokenizer(None)
    assert tokenize_prompts([{"prompt": "a b"}], plain, "data") == [plain("a b")["input_ids"]]
    for row, message in (
        ({"question": "a"}, "row 1 has `question`, but a row needs `prompt`"),
        (rows[1], "row 1 is a chat, but the model has no chat template"),
        (rows[0], "row 1 has `tools`, but the model has no chat template"),
    ):
        with pytest.raises(TrainingError, match=message):
            tokenize_prompts([row], plain, "data")
    with pytest.raises(TrainingError, match="row 1: .* shows no tools"):
        tokenize_prompts(rows, tokenizer(), "data")


def test_files_of_pairs_have_their_fields_renamed_and_their_tokens_kept(tmp_path, capsys):
    rows = [
        {"question": row["prompt"], "chosen": row["chosen"], "no": row["rejected"]} for row in ROWS
    ]
    path, kept = write_jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "kept")
    fields = ["prompt=question,rejected=no"]
    for labelled in (False, True, False):
        data = find_dataset(str(path), fields=fields, check=check_pairs, kept_in=kept)
        data.check()
        found = tokenize(data, tokenizer(), work=tokenize_pairs, labelled=labelled)
        want = tokenize_pairs(ROWS, tokenizer(), "rows", labelled=labelled)
        for name in ("ids", "counts", "starts", "rows", "labels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    assert "are cached in" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="line 1 has .*; a row needs `prompt`, `chosen` and"):
        find_dataset(str(path), check=check_pairs).check()
    with pytest.raises(UserError, match="names: chosen, completion, .*label, .*rejected"):
        find_dataset(str(path), fields=["preferred=chosen"])
