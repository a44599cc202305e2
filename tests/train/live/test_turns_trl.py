"""Completions of several turns beside TRL's GRPOTrainer, in templates of TRL's (extra `parity`).

The turns are given, since a tiny model calls no tool: both sides read their calls, run the same
tools, put what these answer between the turns, mask it, reward the chats and learn from them.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.models import hf_tensors, key_table
from lora_jax.models.sampling.slots import DrawnTokens
from lora_jax.models.sampling.turns import TokenBlock
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, but_rarely
from tests.train.live.local import LocalHost
from tests.train.live.test_turn_runs import recorded
from tests.train.test_trl_runs import RULES, SHARED, of_peft, theirs
from tests.train.tiny import CONFIG, decoder, write_jsonl
from train import grpo
from train.adapters.source import find_adapter
from train.live.turns.programs import TurnPrograms
from train.run.log import read_metrics
from train.tasks import tool_use

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
GROUP, NEW, STEPS, LR = 2, 700, 2, 1.0
# The token that ends an answer, and the one that ends a call: template by template.
ENDS = {
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "glm4moe": ("<|endoftext|>", "<|endoftext|>"),
    "lfm2_v2": ("<|im_end|>", "<|im_end|>"),
}


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


def look_up(key: str) -> str:
    """
    Looks something up.

    Args:
        key: What to look up.
    """
    return {"sun": "a star", "all": "x" * NEW}[key]


TIMES, SUN = ("multiply", {"a": 6, "b": 7}), ("look_up", {"key": "sun"})
CHATS = [  # the turns of ten completions: calls, or texts
    ["It is 42."],
    [TIMES, "It is 42."],
    [SUN, TIMES, "A star, and 42."],
    [("look_up", {"key": "moon"}), "Nobody knows."],
    [("divide", {"a": 1}), "There is no such tool."],
    [TIMES, TIMES, TIMES, "Always 42."],
    ["y" * (NEW + 5)],
    [("look_up", {"key": "all"}), "never said"],
    [SUN, "z" * NEW],
    [("multiply", {"a": 6}), SUN, "One failed."],
]
REWARD = """
def judged(completions, bonus, **others):
    return [worth(chat) + x for chat, x in zip(completions, bonus)]

def worth(chat):
    tools = [len(turn["content"]) for turn in chat if turn["role"] == "tool"]
    calls = sum(len(turn.get("tool_calls", ())) for turn in chat)
    return len(chat) + sum(tools) / 50 + 0.3 * calls + len(chat[-1]["content"]) / 90
"""


def tokenizer(name):
    """One token a byte, and the special tokens of a template."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    special = {*re.findall(r"<\|[a-z_A-Z]+\|>", template), *ENDS[name], "<|pad|>", "[gMASK]"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(tokenizer_models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in sorted(special)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token=ENDS[name][0]
    )
    made.chat_template = template
    return made


def turn_ids(made, name, turn):
    """The tokens of a turn as the template renders it, up to the token that ends it."""
    asked = [{"role": "user", "content": "q"}]
    said = {"role": "assistant", "content": turn if isinstance(turn, str) else ""}
    if not isinstance(turn, str):
        function = {"name": turn[0], "arguments": turn[1]}
        said["tool_calls"] = [{"type": "function", "function": function}]
    before = made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = made.apply_chat_template([*asked, said], tokenize=False)
    assert text.startswith(before)
    end = ENDS[name][not isinstance(turn, str)]
    body = text[len(before) :].rsplit(end, 1)[0]
    return made(body.rstrip("\n") + end, add_special_tokens=False)["input_ids"]


class ScriptedRows:
    """Rows whose turns are given, in the place of a sampler's."""

    def __init__(self, scripts):
        self.n, self.scripts = len(scripts), [iter(script) for script in scripts]
        self.left = {}

    def prefill(self, params, prompt):
        return None, None

    def extend(self, params, place, n, ids):
        return None, None

    def begin(self, place, *_):
        first, *self.left[place] = next(self.scripts[place])
        return DrawnTokens(np.array([first]), np.zeros(1, np.float32), ())

    def decode(self, params, active):
        drawing = np.flatnonzero(active.drawing).tolist()
        n = min(min(len(self.left[place]), active.room[place]) for place in drawing)
        ids = np.zeros((self.n, max(n, 1)), np.int32)
        for place in drawing:
            ids[place, :n] = self.left[place][:n]
            del self.left[place][:n]
        return TokenBlock(np.int32(n), ids, np.zeros(ids.shape, np.float32))


@pytest.mark.parametrize("name", but_rarely(ENDS, "qwen3", "glm4moe", "lfm2_v2"))
def test_ten_conversations_are_those_of_trl(tmp_path, monkeypatch, name):
    import trl
    from datasets import Dataset

    made = tokenizer(name)
    fields = {"vocab_size": len(made), "pad_token_id": made.pad_token_id}
    fields["eos_token_id"] = tuple(dict.fromkeys(made.convert_tokens_to_ids(ENDS[name])))
    write_model(tmp_path / "model", made, fields)
    scripts = [[turn_ids(made, name, turn) for turn in chat] for chat in CHATS]
    prompts = [
        {"prompt": [{"role": "user", "content": f"Ask {i}?"}], "bonus": i / 5} for i in range(7)
    ]
    found = recorded(monkeypatch)
    monkeypatch.setattr(TurnPrograms, "empty", lambda *_: ScriptedRows(scripts))
    monkeypatch.setattr(tool_use, "find_tools", lambda data: LocalHost(tools=[multiply, look_up]))
    run = ours(tmp_path, prompts)

    class Replayed(trl.GRPOTrainer):
        batches, live, left = [], [], []

        def _generate_single_turn(self, prompt_ids, *_, **__):
            if len(prompt_ids) == len(CHATS):
                self.left, self.live = [[*script] for script in scripts], [*prompt_ids]
                numbers = [*range(len(CHATS))]
            else:
                begun = {tuple(ids): i for i, ids in enumerate(self.live)}
                numbers = [
                    next(i for ids, i in begun.items() if tuple(new[: len(ids)]) == ids)
                    for new in prompt_ids
                ]
            turns = [self.left[i].pop(0)[:NEW] for i in numbers]
            for i, ids, turn in zip(numbers, prompt_ids, turns, strict=True):
                self.live[i] = [*ids, *turn]
            return [[*turn] for turn in turns], None

        def _generate(self, prompts):
            self.batches.append(out := super()._generate(prompts))
            return out

    exec(REWARD, scope := {})
    rows = np.concatenate([rows for rows, *_ in found])
    trainer = Replayed(
        of_peft(tmp_path, "used"),
        scope["judged"],
        args=trl.GRPOConfig(
            tmp_path / "trl",
            **SHARED | {"beta": 0.0, "learning_rate": LR, "optim": "sgd"},
            per_device_train_batch_size=len(CHATS),
            num_generations=GROUP,
            max_completion_length=NEW,
            max_steps=STEPS,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([prompts[row] for row in rows]),
        processing_class=made,
        tools=[multiply, look_up],
    )
    logged, expected = theirs(trainer)
    for (_, drawn, batch), (prompt_ids, completion_ids, mask, chats, *_) in zip(
        found, trainer.batches, strict=True
    ):
        turns = drawn.turns.ravel()
        assert [x.prompt for x in turns] == prompt_ids
        assert [x.ids for x in turns] == completion_ids
        assert [[*map(int, x.is_own)] for x in turns] == mask
        weights = batch["weights"].reshape(len(turns), -1)
        assert [w[: len(m)].tolist() for w, m in zip(weights, mask, strict=True)] == mask
        tools = [[t["content"] for t in chat if t["role"] == "tool"] for chat in chats]
        mine = [[t["content"] for t in x.messages if t["role"] == "tool"] for x in turns]
        assert mine == tools and sum(map(len, tools)) > 8
    lines, adapter, begun = run
    names = {"loss": "loss", "reward": "reward", "length": "completions/mean_length"}
    names |= {"truncated": "completions/clipped_ratio"}
    names |= {f"tools/{x}_frequency": f"tools/{x}_frequency" for x in ("call", "failure")}
    for mine, other in names.items():
        got, want = ([line[key] for line in log] for log, key in ((lines, mine), (logged, other)))
        assert_close(np.array(got), np.array(want), 1e-5)
    assert_close(adapter, expected, 1e-5)
    assert min(np.abs(adapter[x] - begun[x]).max() for x in begun) > 1e-3


def write_model(folder, made, fields):
    import json

    model, params = decoder(**fields)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(0.5), params)
    made.save_pretrained(folder)
    save_file(dict(hf_tensors(params, key_table(model.config))), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    model, params = models.from_pretrained(folder)
    tree = with_random_factors(lj.lorafy(params, RULES))
    lp.save(folder.parent / "used", model, tree, base_model=str(folder), task_type="CAUSAL_LM")


def ours(folder, rows):
    """Runs train.grpo; returns its metrics, its adapter and the first, as PEFT's."""
    (folder / "reward.py").write_text(REWARD)
    output = folder / "run"
    line = ["--model", folder / "model", "--init-adapter", folder / "used", "--output", output]
    line += ["--dataset", write_jsonl(folder / "rows.jsonl", rows), "--tools", "tools.py:multiply"]
    line += ["--lr", LR, "--optimizer", "sgd", "--momentum", 0, "--schedule", "constant"]
    line += ["--warmup", 0, "--grad-clip", 0, "--steps", STEPS, "--batch-size", len(CHATS)]
    line += ["--group", GROUP, "--max-new-tokens", NEW, "--seq-len", 3000, "--eval-questions", 0]
    line += ["--reward", f"{folder / 'reward.py'}:judged", "--report-to", "none"]
    line += ["--max-tool-output", 2 * NEW]
    grpo.main([str(arg) for arg in line])
    model, params = models.from_pretrained(folder / "model")
    exported = output / "of PEFT"
    lp.save(exported, model, find_adapter(str(output)).load(model, params, "the base"))
    ends = (load_file(of / "adapter_model.safetensors") for of in (exported, folder / "used"))
    return read_metrics(output), *ends
