"""Completions that share their prompt are what they are with a prompt of their own.

Judges: the same model on rows of one sequence each, and the losses of those rows. Controls: other
positions, and completions that see one another, are noticed.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.bank.together.together import calls_of
from lora_jax.training import losses, make_scorer
from lora_jax.training.data.preferences import pack_pairs
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.data.shared_prompts import share_of_prompts
from tests.adapted_trees import lorafied, with_random_factors
from tests.models import tiny, tiny_encoders
from tests.support import array, assert_close, over, thorough
from tests.train.tiny import tokenizer
from train.data.preview import preview_rows
from train.live.prompts import GroupedCompletions, PromptFeed, TokenizedPrompts
from train.plan.flops.jaxpr import count_flops

RULES = (lj.LoraRule(targets="all-linear", rank=3, alpha=5.0),)
PAIRS = ((9, 5, 7), (1, 2, 3), (4, 6, 1), (0, 3, 4), (6, 2, 5))  # tokens: prompt, chosen, rejected
SEQ_LEN, WORDS = 17, 61


def ids_of(seed, n):
    return np.random.default_rng(seed).integers(0, WORDS, n).astype(np.int32)


def sequences():
    """Two sequences a pair; of the third, both completions begin alike, and count from there."""
    made = []
    for at, (prompt, *both) in enumerate(PAIRS):
        asked = ids_of(at, prompt)
        for side, n in enumerate(both):
            answer = ids_of(100 + 10 * at + side, n)
            answer[0] = (at + (0 if at == 2 else side)) % WORDS
            counts = np.arange(prompt + n) >= prompt
            made.append(TokenSequence(np.concatenate([asked, answer]), counts, at + 1))
    return made


@functools.cache
def model_of(case):
    if case.startswith("gpt2"):
        model, params = tiny_encoders.model(case)
    else:
        model, params = tiny.decoder(case)
    tree = with_random_factors(lorafied(params, RULES))
    return lj.adapt(model.apply), *lj.split(tree)


def batch_of(packs):
    batch = packs.take(np.arange(len(packs)))
    n = len(packs.firsts) - 1
    real = np.random.default_rng(3).normal(size=2 * len(PAIRS)).astype(np.float32)
    order = np.argsort(packs.table.rows if packs.branches is not None else packs.table.rows[::2])
    values = real.reshape(-1, 2)[np.argsort(order)]
    reference = np.zeros((n, packs.segments_a_row), np.float32)
    reference[np.arange(packs.segments_a_row) < packs._completions_a_row[:, None]] = values.ravel()
    return {name: array(x) for name, x in (batch | {"reference": 5 * reference}).items()}


def packs_of(share_prompt, *, packing=False, predict_prompts=False):
    how = {"packing": packing, "predict_prompts": predict_prompts}
    return pack_pairs(sequences(), SEQ_LEN, share_prompt=share_prompt, **how)


def gradients(case, loss, batch):
    """The sums of a loss, and the gradient of its total by the adapter."""
    forward, adapter, base = model_of(case)

    @jax.jit
    def of(adapter):
        def total(adapter):
            sums = loss.sums(forward, lj.join(adapter, base), batch, None)
            return sums.total, sums

        return jax.value_and_grad(total, has_aux=True)(adapter)

    (_, sums), gradient = of(adapter)
    return tuple(sums), gradient


def assert_equal_sums(sums, gradient, expected, of_expected):
    """Gradients add up more terms, in another order."""
    assert_close(sums, expected, 3e-6)
    assert_close(gradient, of_expected, 1e-5)


SUMS = {"sigmoid": 1.0, "sft": 0.5}
FAMILIES = [
    *("llama3", "qwen2 with some windows", "gpt2", "gemma3", "gpt-oss", "qwen3 moe"),
    *("short longrope", "smollm3 with every option"),
]


@over(
    "case",
    [*FAMILIES, "llama3, packed"],
    often=[],
    rare=["gemma3", "qwen3 moe", "short longrope", "smollm3 with every option"],
)
def test_each_family_computes_what_it_does_unshared(case):
    case, packing = case.removesuffix(", packed"), case.endswith(", packed")
    loss = losses.pair_loss(SUMS, chunk=7)
    shared, alone = (gradients(case, loss, batch_of(packs_of(x, packing=packing))) for x in (1, 0))
    assert_equal_sums(*shared, *alone)


CONTROLS = {
    "completions see one another": lambda b: b | {"branches": jnp.minimum(b["branches"], 1)},
    "positions are slots": lambda b: (
        b | {"positions": jnp.arange(b["ids"].shape[1])[None] + 0 * b["ids"]}
    ),
    "a prediction is a shift": lambda b: (
        b | {"predict_at": jnp.where(b["sequences"] % 2 == 1, b["predict_at"] + 1, b["predict_at"])}
    ),
}


@pytest.mark.slow
@over("wrong", CONTROLS, often=["a prediction is a shift"])
def test_the_law_can_fail(wrong):
    loss, batch = losses.pair_loss(SUMS), batch_of(packs_of(True))
    right, other = (gradients("llama3", loss, x) for x in (batch, CONTROLS[wrong](batch)))
    with pytest.raises(AssertionError):
        assert_close(other, right, 1e-3)


OPTIONS = {"robust": {"smoothing": 0.1}, "exo_pair": {"smoothing": 0.001}}


# Losses of a pair's difference alone, as "sigmoid" is.
OF_DIFFERENCES = ("robust", "hinge", "exo_pair", "sppo_hard", "bco_pair", "nca_pair", "apo_zero")


@over("name", [*losses.PREFERENCES], often=(), rare=OF_DIFFERENCES)
def test_each_loss_is_that_of_unshared_pairs(name):
    """With the cross-entropy of chosen completions, of ORPO's with their prompts."""
    loss = losses.PREFERENCES[name]
    terms = {name: 1.0, losses.NLL if loss.predict_prompts else "sft": 0.7}
    objective = losses.pair_loss(terms, losses.PreferenceOptions(**OPTIONS.get(name, {})))
    shared, alone = (
        gradients("llama3", objective, batch_of(packs_of(x, predict_prompts=loss.predict_prompts)))
        for x in (True, False)
    )
    assert_equal_sums(*shared, *alone)


def test_rows_hold_a_prompt_once():
    shared, alone = packs_of(True), packs_of(False)
    batch = shared.take(np.arange(len(shared)))
    assert [int(x) for x in (batch["segment_ids"] > 0).sum(1)] == [
        prompt + chosen + rejected for prompt, chosen, rejected in PAIRS
    ]
    assert shared.n_units == alone.n_units == len(PAIRS)
    for name in ("counts", "mean_tokens"):
        np.testing.assert_array_equal(batch[name], alone.take(np.arange(len(alone)))[name])
    total = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in PAIRS)
    assert share_of_prompts(alone.table) == 2 * sum(prompt for prompt, *_ in PAIRS) / total
    # A run may go on in the other form, unless rows hold other pairs there.
    assert shared.digest() == alone.digest()
    others = [packs_of(x, packing=True) for x in (True, False)]
    others += [packs_of(True, predict_prompts=True)]
    assert len({packs.digest() for packs in (shared, *others)}) == 4
    for packing in (False, True):
        rows, others = (
            preview_rows(packs_of(x, packing=packing, predict_prompts=True), tokenizer(None), 9)
            for x in (True, False)
        )
        assert sorted(row.spans for row in rows) == sorted(row.spans for row in others)
        assert len(rows) == 2 * len(PAIRS) and (packing or rows == others)
    with pytest.raises(ValueError, match="its own prompt"):
        pack_pairs(sequences(), SEQ_LEN, packing=False, labelled=True, share_prompt=True)


# Rollouts: two prompts, three completions of each, one of no token, and one that was cut off.
GROUP, NEW = 3, 6
PROMPTS = [ids_of(1, 11).tolist(), ids_of(2, 4).tolist()]
LENGTHS = np.array([[6, 0, 3], [2, 5, 6]])
ENDED = np.array([[False, True, True], [True, True, True]])


def feed_of(*, share_prompt, mask_truncated=False, per_token=("old", "reference")):
    data = SimpleNamespace(group=GROUP, max_new_tokens=NEW, mask_truncated=mask_truncated)
    optim = SimpleNamespace(seed=0, grad_accum=1, batch_size=2 * GROUP)
    prompts = TokenizedPrompts([{"prompt": "x"}] * 2, PROMPTS)
    return PromptFeed(
        SimpleNamespace(optim=optim, data=data), prompts, None, per_token, share_prompt=share_prompt
    )


def rollouts(feed, per_token=False):
    tokens = ids_of(5, (2, GROUP, NEW))
    drawn = GroupedCompletions(tokens, 0.0 * tokens, LENGTHS, ENDED, np.array([""] * 6))
    batch = feed.batch_from_completions(np.array([0, 1]), drawn)
    rng, shape = np.random.default_rng(4), batch["targets"].shape
    for name in ("old", "reference"):
        batch[name] = -3 - rng.normal(size=(2, GROUP, NEW)).reshape(shape).astype(np.float32)
    gains = rng.normal(size=(2, GROUP, NEW)).astype(np.float32)
    batch["advantages"] = (gains if per_token else gains[..., 0]).reshape(
        shape if per_token else shape[:-1]
    )
    return {name: array(x[0]) for name, x in batch.items()}


@pytest.mark.parametrize("share_prompt", [False, True])
def test_tokens_of_the_environment_are_read_and_not_learned(share_prompt):
    tokens, there = ids_of(5, (2, GROUP, NEW)), np.arange(NEW) < LENGTHS[..., None]
    own = there & (np.arange(NEW) % 3 != 1)
    turns = np.empty((2, GROUP), object)
    for at in np.ndindex(turns.shape):
        is_own = own[at][: LENGTHS[at]].tolist()
        turns[at] = SimpleNamespace(prompt=PROMPTS[at[0]], is_own=is_own)
    drawn = GroupedCompletions(tokens, 0.0 * tokens, LENGTHS, ENDED, np.array([""] * 6), turns)
    batch = feed_of(share_prompt=share_prompt).batch_from_completions(np.array([0, 1]), drawn)
    weights, targets = (batch[x].reshape(2, GROUP, NEW) for x in ("weights", "targets"))
    np.testing.assert_array_equal(weights > 0, own)
    np.testing.assert_array_equal(targets[there], tokens[there])


ONLINE = {
    **{name: losses.ONLINE[name] for name in ("dapo", "grpo", "gspo", "cispo")},
    "dr_grpo": losses.dr_grpo(NEW),
    "rloo": None,
}


@pytest.mark.slow
@over("name", [*ONLINE], often=("grpo",))
@pytest.mark.parametrize(
    "per_token", [False, pytest.param(True, marks=[pytest.mark.slow, thorough])]
)
def test_each_loss_of_rollouts_is_that_of_unshared_ones(name, per_token):
    if per_token and ONLINE[name] is None:
        pytest.skip("RLOO's advantages are of completions")
    options = ONLINE[name] and ONLINE[name].__class__(**{**vars(ONLINE[name]), "beta": 0.1})
    loss = losses.rollout_loss(options, temperature=1.3, chunk=4)
    shared, alone = (
        gradients("llama3", loss, rollouts(feed_of(share_prompt=x, mask_truncated=True), per_token))
        for x in (True, False)
    )
    assert_equal_sums(*shared, *alone)
    assert np.abs(np.asarray(alone[0][0])) > 1e-3


def test_scores_are_those_of_unshared_completions():
    forward, adapter, base = model_of("llama3")
    scorer = make_scorer(forward, temperature=0.7, chunk=4)
    shared, alone = (
        scorer(lj.join(adapter, base), rollouts(feed_of(share_prompt=x))) for x in (True, False)
    )
    assert shared.logps.shape == (2, GROUP, NEW)
    there = np.arange(NEW) < LENGTHS[..., None]
    both = (
        jax.tree.map(lambda x: np.asarray(x).reshape(2, GROUP, NEW)[there], tuple(scores))
        for scores in (shared, alone)
    )
    assert_close(*both, 3e-6)


@pytest.mark.slow
def test_rows_that_fill_up_a_batch_count_nothing():
    """As where a run of a table has fewer prompts than another, or completions of a prompt."""
    batch = rollouts(feed_of(share_prompt=True, per_token=("old",)))
    batch.pop("reference")

    def fill(x, by_completion):
        more = [(0, 1), *[(0, 2)] * by_completion, *[(0, 0)] * (x.ndim - 1 - by_completion)]
        return jnp.pad(x, more)

    more = {name: fill(x, x.ndim == 3 or name == "advantages") for name, x in batch.items()}
    loss = losses.rollout_loss(losses.ONLINE["grpo"])
    filled, whole = (gradients("llama3", loss, x) for x in (more, batch))
    assert_close(filled, whole, 1e-6)
    assert whole[0][1] == 2 * GROUP


def test_runs_of_a_table_share_a_call_where_their_arrays_are_alike():
    shared, alone = (rollouts(feed_of(share_prompt=x)) for x in (True, False))
    short = {**shared, "ids": shared["ids"][:, :-1]}
    calls = calls_of({"a": shared, "b": alone, "c": short}, draws=False)
    assert [[*call] for call in calls] == [["a", "c"], ["b"]]
    assert calls[0]["c"]["ids"].shape == shared["ids"].shape


@pytest.mark.parametrize("new", [6, 40])
def test_batches_have_no_more_widths_than_without_sharing(new):
    data = SimpleNamespace(group=GROUP, max_new_tokens=new)
    optim = SimpleNamespace(seed=0, grad_accum=1, batch_size=GROUP)
    sizes = np.random.default_rng(1).integers(5, 300, 200)
    prompts = TokenizedPrompts([{}] * 200, [[1] * n for n in sizes.tolist()])
    config = SimpleNamespace(optim=optim, data=data)
    shared, alone = (PromptFeed(config, prompts, None, share_prompt=x).widths for x in (1, 0))
    assert shared.prompts == alone.prompts and 1 < len(shared.rows) == len(alone.rows)
    for n in sizes.tolist():
        prompt = shared.prompt(n)
        assert n <= prompt and prompt + GROUP * new <= shared.row(prompt + GROUP * new)
        # No more padding than where each completion has its own prompt.
        assert shared.row(n + GROUP * new) <= GROUP * alone.row(n + new)


def flops(loss, batch):
    forward, adapter, base = model_of("llama3")

    def total(adapter):
        return loss.sums(forward, lj.join(adapter, base), batch, None).total

    return count_flops(jax.make_jaxpr(jax.grad(total))(adapter)).flops


@pytest.mark.slow
def test_a_prompt_is_computed_once():
    """A step's FLOPs are those of a text of all its tokens within 5%; unshared, far more."""
    asked, tokens = ids_of(1, 40), np.concatenate([ids_of(2, 8), [0], ids_of(3, 7)])
    rows = [np.concatenate([asked, tokens[at : at + 8]]) for at in (0, 8)]
    pair = [TokenSequence(row, np.arange(48) >= 40, 1) for row in rows]
    data = SimpleNamespace(group=3, max_new_tokens=8, mask_truncated=False)
    optim = SimpleNamespace(seed=0, grad_accum=1, batch_size=3)
    prompts = TokenizedPrompts([{"prompt": "x"}], [asked.tolist()])

    def of_pair(share_prompt):
        return pack_pairs(pair, 48, packing=False, share_prompt=share_prompt).take(np.arange(1))

    def of_group(share_prompt):
        config = SimpleNamespace(optim=optim, data=data)
        batch = PromptFeed(config, prompts, None, share_prompt=share_prompt).batch(0)
        return {name: x[0] for name, x in batch.items()}

    for loss, batch in (
        (losses.pair_loss("simpo"), of_pair),
        (losses.rollout_loss(losses.ONLINE["dapo"]), of_group),
    ):
        shared, alone = (flops(loss, batch(x)) for x in (True, False))
        text = {name: x for name, x in batch(True).items() if name != "branches"}
        assert shared <= 1.05 * flops(loss, text) < 0.65 * alone
