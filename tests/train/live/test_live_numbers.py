"""The numbers of drawn completions that a step learns from, by hand, with stubs for the models."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lora_jax.training.data.preferences import Preferences
from lora_jax.training.data.sequences import Sequences, TokenSequence
from tests.support import assert_close
from train.console.errors import UserError
from train.live.distillation import DistillationRollouts
from train.live.external.check import SamplerCheck, _importance_of_tokens
from train.live.external.sampler import ExternalSampler
from train.live.preferences import divergence, mismatch_completions, with_room_for_mismatches
from train.live.prompts import GroupedCompletions, PromptFeed, TokenizedPrompts
from train.live.records import turns_of
from train.live.reference import reference_line
from train.live.reinforcement import RewardedRollouts
from train.live.rollouts import group_completions
from train.live.turn_groups import GroupedTurns, group_turns, shown_texts
from train.live.turns.rows import TurnCompletion, TurnRequest, opened_row, tool_metrics
from train.options.scripts.sampler import ImportanceWeighting
from train.rewards.ask import RewardAnswer

GROUP, NEW = 2, 3
PROMPTS = TokenizedPrompts(
    [{"prompt": text, "answer": n} for n, text in enumerate("abcd")],
    [[11], [12, 13], [14, 15, 16], [17]],
)


# ---- KTO's divergence -----------------------------------------------------------------------


def preferences(*rows, lengths=(8,), predicted=(8,)):
    """Labelled completions; each row is a prompt and a completion."""
    table = [
        TokenSequence(np.array([*prompt, *answer]), np.arange(n) >= len(prompt), at + 1)
        for at, (prompt, answer) in enumerate(rows)
        for n in [len(prompt) + len(answer)]
    ]
    return Preferences(
        table=Sequences.from_list(table),
        firsts=np.arange(len(rows) + 1),
        lengths=lengths,
        predicted=predicted,
        a_unit=1,
    )


THREE = preferences(([1, 2], [3]), ([4], [5, 6]), ([7, 8, 9], [10, 11]))


def test_each_prompt_gets_the_completion_of_the_row_before_it():
    """Rows in the order of the data, whatever the order of the batch; the first has the last's."""
    mixed = mismatch_completions(THREE, np.array([2, 0, 1]))
    assert [row.ids.tolist() for row in mixed.table] == [[1, 2, 10, 11], [4, 3], [7, 8, 9, 5, 6]]
    assert [row.counts.tolist() for row in mixed.table] == [
        [False, False, True, True],
        [False, True],
        [False, False, False, True, True],
    ]
    assert mixed.table.rows.tolist() == [1, 2, 3]
    assert mixed.firsts.tolist() == [0, 1, 2, 3] and mixed.reference is None
    pair = mismatch_completions(THREE, np.array([2, 1]))
    assert [row.ids.tolist() for row in pair.table] == [[4, 10, 11], [7, 8, 9, 5, 6]]
    short = dataclasses.replace(THREE, lengths=(4,))
    assert [len(row.ids) for row in mismatch_completions(short, np.arange(3)).table] == [4, 2, 4]


def test_room_for_any_prompt_with_any_completion():
    """The longest prompt has 3 tokens, and the longest completion 2: 8 suit a device."""
    narrow = with_room_for_mismatches(
        dataclasses.replace(THREE, lengths=(4, 7), predicted=(2, 3)), 64
    )
    assert (narrow.lengths, narrow.predicted) == ((4, 7, 8), (2, 3, 3))
    assert with_room_for_mismatches(narrow, 64) is narrow
    short = with_room_for_mismatches(dataclasses.replace(THREE, lengths=(4,), predicted=(2,)), 6)
    assert short.lengths == (4, 6), "no row is longer than a sequence"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ([[-1.0, -2.0], [-3.0, 50.0]], (1.0 + 2.0 + 0.0) / 3),
        ([[-4.0, -6.0], [-3.0, 50.0]], 0.0),  # a mean below 0 counts as 0
    ],
)
def test_the_divergence_is_a_mean_over_rows_that_are_there(policy, expected):
    reference, counts = np.float32([[-2, -4], [-3, 9]]), np.array([[3, 1], [2, 0]])
    assert divergence(np.float32(policy), reference, counts) == pytest.approx(expected)


# ---- Weights of a server's completions ------------------------------------------------------


def test_weights_of_a_servers_draws_and_their_metrics():
    """exp(old − drawn) within bounds; a weight at a bound is told as one that was cut off."""
    old = np.log(np.float32([[[2.0, 0.25, 8.0], [1.0, 4.0, 1.0]]]))
    counted = np.array([[[True, True, True], [True, True, False]]])
    by = ImportanceWeighting("token", masked=False, cap=3.0, floor=0.5)
    weights, metrics = _importance_of_tokens(by, old, np.zeros_like(old), counted)
    expected = np.array([[[2, 0.5, 3], [1, 3, 1]]])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == np.float32
    assert metrics == {
        "importance_mean": pytest.approx(9.5 / 5),
        "importance_min": pytest.approx(0.5),
        "importance_capped": pytest.approx(3 / 5),
    }
    masked = by._replace(masked=True, floor=0.0)
    weights, metrics = _importance_of_tokens(masked, old, np.zeros_like(old), counted)
    np.testing.assert_allclose(weights, [[[2, 0.25, 0], [1, 0, 1]]], rtol=1e-6)
    assert metrics["importance_capped"] == pytest.approx(2 / 5)
    _, metrics = _importance_of_tokens(by, old, np.zeros_like(old), np.zeros_like(counted))
    assert metrics == dict.fromkeys(("importance_mean", "importance_min", "importance_capped"))


def server_check(bound, version, *, staleness=0, score=None):
    """A check of a server, without a server."""
    check = SamplerCheck.__new__(SamplerCheck)
    data = SimpleNamespace(max_mismatch=bound, staleness=staleness, top_p=0.9, top_k=None)
    outline = SimpleNamespace(name="tiny")
    check._context = SimpleNamespace(config=SimpleNamespace(data=data), outline=outline)
    check._sampler = SimpleNamespace(version=version, server=SimpleNamespace(url="http://there"))
    check._score, check._bound, check._importance, check._has_checked_batch = (
        score,
        bound,
        None,
        False,
    )
    return check


def drawn_logps(values):
    return SimpleNamespace(logps=np.float32(values).reshape(2, 2))


OLD = {"old": np.float32([[[0, 0]], [[0, 0]]]), "weights": np.int32([[[1, 1]], [[1, 0]]])}


def test_a_batch_at_the_bound_of_mismatch_is_learned_from():
    """The mean distance over tokens that count; a first batch beyond the bound ends the run."""
    now = SimpleNamespace(step=4, adapter=None)
    check = server_check(0.5, now)
    assert check.weigh(dict(OLD), drawn_logps([0.25, -0.5, 0.75, 9]), {}, 4) == ({}, None)
    metrics, why = check.weigh(dict(OLD), drawn_logps([0.25, -0.5, 0.765625, 9]), {}, 4)
    assert metrics == {} and "before step 5" in why and "the adapter's by 0.505 on average" in why
    fresh = server_check(0.5, now)
    none = OLD | {"weights": np.zeros_like(OLD["weights"])}
    assert fresh.weigh(none, drawn_logps([9, 9, 9, 9]), {}, 4) == ({}, None)
    with pytest.raises(UserError, match="before step 5.*Remove --top-p"):
        fresh.weigh(dict(OLD), drawn_logps([0.25, -0.5, 0.765625, 9]), {}, 4)


def test_an_earlier_adapters_batch_is_compared_with_that_adapter():
    """One part of the batch is scored again, by the adapter that drew."""
    seen = []

    def score(params, part):
        seen.append((params, part["old"].shape))
        return np.float32([[[0.5, 0.5]]])

    version = SimpleNamespace(step=3, adapter={})
    check = server_check(0.5, version, staleness=1, score=score)
    metrics, why = check.weigh(dict(OLD), drawn_logps([0.25, 0.5, 90, 90]), {"w": 1}, 4)
    assert metrics == {"staleness": 1.0, "sampler_mismatch": pytest.approx(0.125)}
    assert why is None and seen == [({"w": 1}, (1, 1, 2))]


def external(updates, staleness, steps):
    """A server's client that publishes and asks nobody."""
    sampler, published, asked = ExternalSampler.__new__(ExternalSampler), [], []

    def publish(params, name, keeps=False):
        published.append((name, keeps))
        return SimpleNamespace(name=name, step=None, last=None)

    config = SimpleNamespace(
        optim=SimpleNamespace(updates=updates), data=SimpleNamespace(staleness=staleness)
    )
    sampler._context = SimpleNamespace(config=config)
    sampler._feed = SimpleNamespace(steps=steps, rows=lambda number: number * 10)
    sampler._publisher = SimpleNamespace(publish=publish)
    sampler._ahead, sampler._versions, sampler._current = {}, [], None
    dropped = []
    sampler._drop = None
    sampler._pool = SimpleNamespace(submit=lambda _, version: dropped.append(version.name))

    def ask(version, rows, number, attempt):
        asked.append((version.name, rows, number, attempt))
        return SimpleNamespace(version=version)

    sampler._ask, sampler._hear = ask, lambda request: request.version.name
    return sampler, published, asked, dropped


def test_a_server_draws_ahead_as_far_as_staleness_and_steps_allow():
    """Two updates a batch, one batch ahead: steps 0 and 2 of the first adapter, then 4 of it."""
    sampler, published, asked, dropped = external(updates=2, staleness=1, steps=5)
    assert sampler.draw({}, 0, 0) == "step0"
    assert asked == [("step0", 0, 0, 0), ("step0", 20, 2, 0)]
    assert (sampler.version.step, sampler.version.last) == (0, 2)
    assert sampler.draw({}, 0, 2) == "step0"
    assert asked[2:] == [("step2", 40, 4, 0)]
    assert dropped == [] and sampler.draw({}, 7, 2, attempt=1) == "step0"
    assert asked[3:] == [("step0", 7, 2, 1)]
    assert sampler.draw({}, 0, 4) == "step2"
    assert published == [("step0", True), ("step2", True)] and dropped == ["step0"]


def test_without_staleness_each_batch_has_its_adapter():
    sampler, published, asked, dropped = external(updates=1, staleness=0, steps=2)
    assert [sampler.draw({}, 0, number) for number in (0, 1)] == ["step0", "step1"]
    assert published == [("step0", False), ("step1", False)] and dropped == ["step0"]
    assert asked == [("step0", 0, 0, 0), ("step1", 10, 1, 0)]


# ---- Completions in groups ------------------------------------------------------------------


def test_completions_are_cut_at_their_first_stop_text():
    """A cut one has ended; the others keep their lengths and whether they have ended."""
    stops = SimpleNamespace(cut=lambda ids: ("cut", ids.index(9)) if 9 in ids else (str(ids), None))
    tokens = np.int32([[1, 9, 2], [3, 9, 9], [4, 5, 6], [7, 0, 0]])
    logps = -np.arange(12, dtype=np.float32).reshape(4, 3)
    lengths, ended = np.array([3, 1, 3, 1]), np.array([False, True, False, True])
    drawn = group_completions(tokens, logps, lengths, ended, stops=stops, group=2)
    assert drawn.lengths.tolist() == [[1, 1], [3, 1]]
    assert drawn.ended.tolist() == [[True, True], [False, True]]
    assert drawn.texts.tolist() == [["cut", "[3]"], ["[4, 5, 6]", "[7]"]]
    np.testing.assert_array_equal(drawn.tokens, tokens.reshape(2, 2, 3))
    np.testing.assert_array_equal(drawn.logps, logps.reshape(2, 2, 3))


ASKED = TurnRequest(0, {}, "row 1", [1])


def turn_completion(ids, *, own, ended=False, text="said", lost=None):
    made = TurnCompletion(ASKED, [1, 2], turn_starts=[0], ended=ended, lost=lost)
    made.draw(ids[:own], [-0.5] * own)
    made.answer(ids[own:])
    made.say(text)
    made.hear([SimpleNamespace(name="look", content="seen", failed=True)])
    made.count([SimpleNamespace(failed=True), SimpleNamespace(failed=False)])
    return made


def test_completions_of_several_turns_as_arrays():
    made = [
        turn_completion([5, 6, 7], own=2, ended=True),
        turn_completion([8], own=1),
        TurnCompletion(ASKED, lost="gone"),
        turn_completion([3, 4], own=0, text="later"),
    ]
    drawn = group_turns(made, group=2, max_new_tokens=4)
    assert drawn.tokens.tolist() == [[[5, 6, 7, 0], [8, 0, 0, 0]], [[0] * 4, [3, 4, 0, 0]]]
    assert drawn.logps.tolist() == [[[-0.5, -0.5, 0, 0], [-0.5, 0, 0, 0]], [[0] * 4, [0] * 4]]
    assert (drawn.tokens.dtype, drawn.logps.dtype) == (np.int32, np.float32)
    assert drawn.lengths.tolist() == [[3, 1], [0, 2]]
    assert drawn.ended.tolist() == [[True, False], [False, False]]
    assert drawn.texts.tolist() == [["said", "said"], ["", "later"]]
    assert drawn.turns[0, 0] is made[0] and drawn.turns[1, 1] is made[3]
    expected = [[[1, 1, 0, 0], [1, 0, 0, 0]], [[0] * 4, [0] * 4]]
    np.testing.assert_array_equal(drawn.is_own, np.array(expected, bool))
    decode = SimpleNamespace(decode=lambda ids, skip_special_tokens: (*ids, skip_special_tokens))
    assert shown_texts(drawn, decode) == [(5, 6, 7, True), (8, True), (True,), (3, 4, True)]
    assert shown_texts(drawn._replace(turns=None), None) == ["said", "said", "", "later"]
    assert tool_metrics(made) == {
        "tools/call_frequency": 6 / 4,
        "tools/failure_frequency": 3 / 6,
        "tools/turns": 3 / 4,
        "tools/lost": 1 / 4,
    }
    assert tool_metrics(made[2:3])["tools/failure_frequency"] == 0.0


def test_environments_of_one_prompt_have_one_seed():
    """Completions of a prompt are compared; prompts differ, and each completion has a number."""
    asked = []

    def draw(model, params, rows, key, n_rows, max_prompt_tokens):
        asked.append((model, params, rows, n_rows, max_prompt_tokens))
        return [turn_completion([at], own=1) for at in range(len(rows))]

    feed = SimpleNamespace(
        config=SimpleNamespace(
            data=SimpleNamespace(group=GROUP, dataset="data", max_new_tokens=NEW),
            optim=SimpleNamespace(batch_size=6),
        ),
        prompts=PROMPTS,
        widths=SimpleNamespace(prompt=lambda longest: longest + 100),
        routing=None,
    )
    drawer = SimpleNamespace(draw=draw)
    turns = GroupedTurns(drawer, "model", feed)
    drawn = turns.draw({"w": 1}, np.array([2, 0]), jax.random.key(3))
    ((model, params, rows, places, longest),) = asked
    assert (model, params, places, longest) == ("model", {"w": 1}, 6, 103)
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert [list(row.prompt) for row in rows] == [[14, 15, 16]] * 2 + [[11]] * 2
    assert [row.row["answer"] for row in rows] == [2, 2, 0, 0]
    assert [("3" in row.name, "1" in row.name) for row in rows] == [(True, False)] * 2 + [
        (False, True)
    ] * 2
    seeds = [row.seed for row in rows]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert drawn.tokens[..., 0].tolist() == [[0, 1], [2, 3]]
    feed.routing = (1, 1)
    feed.widths.prompts = (4,)
    routed = turns.draw({}, np.array([2, 0]), jax.random.key(3))
    assert routed.routing.shape == (2, GROUP, 4 + NEW - 1, 1, 1) and (routed.routing == -1).all()


@pytest.mark.parametrize(
    ("row", "opened"),
    [
        ({"prompt": "ask", "n": 1}, {"prompt": "ask!", "n": 1}),
        ({"n": 1}, {"prompt": "!", "n": 1}),
        (
            {"messages": [{"role": "a", "content": "b"}, {"role": "user", "content": "c"}]},
            {"messages": [{"role": "a", "content": "b"}, {"role": "user", "content": "c!"}]},
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "!"}]}
                ]
            },
        ),
    ],
)
def test_what_an_environment_says_first_ends_the_prompt(row, opened):
    assert opened_row(row, "!") == opened


# ---- The feed -------------------------------------------------------------------------------


def options(**changes):
    optim = {"seed": 1, "grad_accum": 1, "batch_size": 4, "updates": 2, "loss": "grpo"}
    data = {"group": GROUP, "max_new_tokens": NEW, "redraw": 2, "mask_truncated": False}
    data |= {"dataset": "data", "seq_len": 64}
    known = {name: changes.pop(name) for name in [*changes] if name in data}
    return SimpleNamespace(
        optim=SimpleNamespace(**optim | changes), data=SimpleNamespace(**data | known)
    )


def feed_of(config, **fields):
    return PromptFeed(config, PROMPTS, SimpleNamespace(tokenizer=None), **fields)


def drawn_of(seed, n=2, lengths=((3, 1), (2, 3))):
    rng = np.random.default_rng(seed)
    return GroupedCompletions(
        tokens=rng.integers(20, 90, (n, GROUP, NEW)).astype(np.int32),
        logps=rng.normal(-1, 0.3, (n, GROUP, NEW)).astype(np.float32),
        lengths=np.array(lengths[:n]),
        ended=np.array([[True, True], [False, True]][:n]),
        texts=np.array([[f"{seed}.{i}.{j}" for j in range(GROUP)] for i in range(n)], object),
    )


def test_a_batch_in_use_goes_on_after_an_interruption():
    """Between the updates of one batch, its completions are part of the position in the data."""
    config = options()
    feed = feed_of(config, per_token=("old",), steps=8)
    batch = {"old": np.float32([[1.5, -2.25]]), "ids": np.int32([[3, 4]])}
    feed.held_batch, feed.metrics = (2, batch), {"reward": 0.5}
    after = feed.cursor(3)
    again = feed_of(config, per_token=("old",), steps=8)
    assert again.seek(dict(after), 3)
    assert (again.held_batch[0], again.done, again.metrics) == (2, 3, {"reward": 0.5})
    assert again.held_batch[1].keys() == batch.keys()
    for name, array in batch.items():
        np.testing.assert_array_equal(again.held_batch[1][name], array)
        assert again.held_batch[1][name].dtype == array.dtype
    between = feed.cursor(4)
    assert "completions" not in between
    fresh = feed_of(config, per_token=("old",), steps=8)
    assert fresh.seek(dict(between), 4) and fresh.metrics == {} and fresh.done == 4
    assert not fresh.seek(dict(between), 6), "of another step"


def test_a_batch_holds_the_sampler_s_experts_of_the_tokens_that_ran():
    """The last token of a completion was drawn, and did not run: it has no experts."""
    feed = feed_of(options(), per_token=("old",), routing=(2, 1))
    rows = np.array([1, 3])
    slots = 4 + NEW - 1  # the prompt ends before the completion's NEW - 1 slots
    routing = np.arange(4 * slots * 2, dtype=np.int16).reshape(2, GROUP, slots, 2, 1)
    drawn = drawn_of(1)._replace(routing=routing)
    batch = feed.batch_from_completions(rows, drawn)
    lengths, flat = [3, 1, 2, 3], routing.reshape(4, slots, 2, 1)
    for at, (n_prompt, n) in enumerate(zip([2, 2, 1, 1], lengths, strict=True)):
        found = batch["routing"][0, at]
        wanted = np.full_like(found, -1)
        n_run = n_prompt + n - 1
        wanted[:n_run] = flat[at, 4 - n_prompt : 4 - n_prompt + n_run]
        np.testing.assert_array_equal(found, wanted)
    other = TokenizedPrompts(PROMPTS.rows, [[1, 2], [3], [4], [5]])
    shown = feed.batch_from_completions(rows, drawn, other)
    assert (shown["routing"] == -1).all(), "other prompts ran nowhere"
    assert shown["ids"][0, 0, 0] == 3


# ---- What a step learns from ----------------------------------------------------------------


def rollouts(kind, config, feed, logps):
    """Rollouts whose log-probabilities are those of a table, by the tree's name."""
    made = kind.__new__(kind)
    made.feed, made.config = feed, config
    made.context = SimpleNamespace(outline=SimpleNamespace(tokenizer=None), console=None, stop=None)
    made._external, made._check, made._turns, made._reference = None, None, None, None
    made.log_probabilities = lambda params, batch, score=None, replays=True: logps[params]
    return made


def table(seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(-1, 0.4, (1, 4, NEW)).astype(np.float32) for _ in range(2))


LOGPS = {"policy": table(1), "reference": table(2), "teacher": table(3)}
ROWS = np.array([1, 3])


def answer(*rewards, **extra):
    total = np.float32(rewards)
    return RewardAnswer(total, None, {"reward_x": 1.0}, extra, {"half": total / 2})


def test_rloo_takes_the_divergence_from_the_reward():
    """TRL's RLOO: r − β Σ(log π − log π_ref) over a completion, less the mean of the others."""
    config = options(loss="rloo", beta=0.5, redraw=0)
    feed = feed_of(config, per_token=("old",), per_completion=("advantages",))
    made = rollouts(RewardedRollouts, config, feed, LOGPS)
    made._reference = "reference"
    made._ask_rewards = lambda rows, drawn, number: answer(1.0, 2.0, 0.5, 0.5, fact=[1, 2, 3, 4])
    drawn, batch, metrics = made.score("policy", ROWS, drawn_of(1), 0)
    old, entropy = LOGPS["policy"]
    counted = batch["weights"] > 0
    np.testing.assert_array_equal(counted.sum(-1), [[3, 1, 2, 3]])
    apart = np.where(counted, old - LOGPS["reference"][0], 0).sum(-1).ravel()
    shaped = np.array([1.0, 2.0, 0.5, 0.5]) - 0.5 * apart
    wanted = shaped.reshape(2, 2) - shaped.reshape(2, 2)[:, ::-1]
    assert_close(batch["advantages"].reshape(2, 2), wanted, 1e-5)
    assert "reference" not in batch
    np.testing.assert_array_equal(batch["old"], old)
    assert metrics["kl"] == pytest.approx(apart.sum() / 9, rel=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy[counted].mean(), rel=1e-5)
    assert (metrics["reward"], metrics["zero_spread"], metrics["reward_x"]) == (1.0, 0.5, 1.0)
    assert [sample.reward for sample in feed.new_samples] == [1.0, 2.0, 0.5, 0.5]
    assert feed.new_samples[2].extra == {"fact": 3}
    assert [sample.advantage for sample in feed.new_samples] == pytest.approx(wanted.ravel(), 1e-5)


def test_a_sample_tells_what_happened_to_its_completion():
    """Where it stands, what each reward gave, and its advantage; what is not known is None."""
    config = options(loss="grpo", redraw=0, scale="none", mask_truncated=True)
    feed = feed_of(config, per_token=("old",), per_completion=("advantages",))
    made = rollouts(RewardedRollouts, config, feed, LOGPS)
    made._ask_rewards = lambda rows, drawn, number: answer(1.0, 3.0, 0.5, np.nan)
    made.score("policy", ROWS, drawn_of(1), 0)
    samples = feed.new_samples
    assert [(one.group, one.place) for one in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [one.row for one in samples] == ["data, row 2"] * 2 + ["data, row 4"] * 2
    assert [one.rewards for one in samples] == [{"half": 0.5}, {"half": 1.5}, {"half": 0.25}, {}]
    assert [one.advantage for one in samples] == [-1, 1, 0, None]
    assert [one.cut for one in samples] == [False, False, True, False]
    assert [one.masked for one in samples] == [False, False, True, False]
    assert [one.redrawn for one in samples] == [False] * 4
    assert samples[3].turns == [{"role": "assistant", "text": "1.1.1"}]
    assert {one.lost for one in samples} == {None} == {one.context for one in samples}


def test_the_turns_of_a_completion_are_told_apart():
    """The model's tokens as they were drawn, with calls; the environment's, by their source."""
    decode = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids))
    made = turn_completion([5, 6, 7], own=2, ended=True)
    made.opening = "a riddle"
    made.turn_starts.append(3)
    made.draw([8, 9], [-0.5] * 2)
    made.say("later")
    expected = [
        {"role": "environment", "text": "a riddle"},
        {"role": "assistant", "text": "[5, 6]"},
        {"role": "tool", "name": "look", "text": "seen"},
        {"role": "assistant", "text": "[8, 9]"},
    ]
    assert turns_of(made, decode) == expected
    never_begun = TurnCompletion(ASKED, lost="gone")
    never_begun.say("")
    assert turns_of(never_begun, decode) == []


def test_only_a_prompt_of_several_turns_has_a_context():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompts = TokenizedPrompts(
        [{"messages": chat}, {"prompt": "Why?"}, {"prompt": chat[1:]}], [[1]]
    )
    assert prompts.context_of(0) == [{"role": "system", "text": "Be brief."}]
    assert prompts.context_of(1) is None and prompts.context_of(2) is None


def test_other_losses_get_the_reference_and_the_groups_deviation():
    """(r − mean) / (deviation + 1e-4); the reference's log-probabilities go to the loss."""
    config = options(loss="grpo", beta=0.5, redraw=0, scale="group")
    feed = feed_of(config, per_token=("old",), per_completion=("advantages",))
    made = rollouts(RewardedRollouts, config, feed, LOGPS)
    made._reference = "reference"
    made._ask_rewards = lambda rows, drawn, number: answer(1.0, 3.0, 0.5, 0.5)
    _, batch, metrics = made.score("policy", ROWS, drawn_of(1), 0)
    np.testing.assert_array_equal(batch["reference"], LOGPS["reference"][0])
    one = 1 / (np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(batch["advantages"], [[-one, one, 0, 0]], rtol=1e-5)
    assert "kl" not in metrics
    made._ask_rewards = lambda rows, drawn, number: answer(*[np.nan] * 4)._replace(lost="why")
    _, batch, _ = made.score("policy", ROWS, drawn_of(1), 0)
    assert np.isnan(batch["advantages"]).all()
    assert feed.lost == "no completion has a reward (why)"


def test_groups_without_spread_are_drawn_again():
    """Those groups alone, by the number of the attempt, until they differ or attempts end."""
    config = options(redraw=2)
    made = rollouts(RewardedRollouts, config, feed_of(config), LOGPS)
    calls, answers = (
        [],
        [
            answer(1, 1, 0, 2, fact=list("abcd"))._replace(lost="first"),
            answer(5, 5, fact=["e", "f"])._replace(lost="second", metrics={}),
            answer(3, 4, fact=["g", "h"])._replace(metrics={}),
        ],
    )

    def draw(params, rows, number, attempt=0):
        calls.append((params, rows.tolist(), number, attempt))
        return drawn_of(10 + attempt, n=1)

    made.draw, made._ask_rewards = draw, lambda rows, drawn, number: answers.pop(0)
    drawn = drawn_of(1)
    rewarded = made._reward_groups("policy", ROWS, drawn, 7)
    assert calls == [("policy", [1], 7, 1), ("policy", [1], 7, 2)]
    np.testing.assert_array_equal(rewarded.rewards, [[3, 4], [0, 2]])
    np.testing.assert_array_equal(rewarded.rewards_by_name["half"], [[1.5, 2], [0, 1]])
    assert rewarded.redrawn.tolist() == [True, False]
    assert [fact["fact"] for fact in rewarded.facts.ravel()] == list("ghcd")
    assert rewarded.lost is None and rewarded.metrics == {"reward_x": 1.0}
    first, last = drawn_of(1), drawn_of(12, n=1)
    for name in ("tokens", "logps", "lengths", "ended", "texts"):
        np.testing.assert_array_equal(getattr(drawn, name)[0], getattr(last, name)[0])
        np.testing.assert_array_equal(getattr(drawn, name)[1], getattr(first, name)[1])
    answers[:] = [answer(1, 2, 0, 2)]
    made._reward_groups("policy", ROWS, drawn_of(1), 7)
    assert len(calls) == 2, "all groups differ"


def test_a_student_gains_what_the_teacher_thinks_likelier():
    """The reverse KL's gradient: coefficient·(log π_teacher − log π) at each token that counts."""
    config = options(coefficient=0.25)
    feed = feed_of(config, per_token=("old", "advantages"), per_completion=())
    made = rollouts(DistillationRollouts, config, feed, LOGPS)
    made._prompts, made._widths, made._params, made._teacher = PROMPTS, feed.widths, "teacher", None
    _, batch, metrics = made.score("policy", ROWS, drawn_of(1), 0)
    (old, entropy), (theirs, _) = LOGPS["policy"], LOGPS["teacher"]
    counted = batch["weights"] > 0
    gain = np.where(counted, theirs - old, 0)
    np.testing.assert_allclose(batch["advantages"], 0.25 * gain, rtol=1e-6)
    assert metrics["reverse_kl"] == pytest.approx(-gain.sum() / 9, rel=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy[counted].mean(), rel=1e-5)
    assert [list(sample)[:2] for sample in feed.new_samples] == [
        ["b", "1.0.0"],
        ["b", "1.0.1"],
        ["d", "1.1.0"],
        ["d", "1.1.1"],
    ]


@pytest.mark.parametrize(
    ("reference", "start", "full", "line"),
    [
        ("base", "a", False, "reference: base, without the adapter from which the run starts (a)"),
        ("a", "a", False, "reference: a, the adapter from which the run starts (use --reference"),
        ("b", "a", False, "reference: b; the run starts from a"),
        ("base", None, False, "reference: base"),
        ("none", "a", False, "reference: none"),
        ("base", None, True, "reference: base; its weights stay in memory"),
    ],
)
def test_a_line_names_the_reference(reference, start, full, line):
    adapter = SimpleNamespace(init_adapter=start, full=full)
    config = SimpleNamespace(data=SimpleNamespace(reference=reference), adapter=adapter)
    found = reference_line(config)
    assert found == line if reference == "none" or not start and not full else line in found
