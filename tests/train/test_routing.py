"""Routing replay: a step's experts are those that a token went through when it was drawn."""

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.decoder import moe
from lora_jax.models.decoder.experts import apply_blocks
from tests.models import tiny
from tests.support import assert_close, assert_identical, over
from tests.train.live import guessing
from tests.train.live.local import LocalHost
from tests.train.scripts import fails
from tests.train.tiny import write_jsonl, write_model
from train import grpo
from train.environments.guess import GuessingGame
from train.live.rollouts import Rollouts
from train.run.log import read_metrics
from train.tasks import tool_use

# Processes of rewards end with the process of a script.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LAYERS, CHOSEN, GROUP, NEW, PROMPTS = 3, 2, 4, 20, 5
WIDTH = {"num_hidden_layers": LAYERS, "eos_token_id": (*range(100, 108), 258)}
MIXTURE = {**WIDTH, "model_type": "mixtral", "num_local_experts": 7, "num_experts_per_tok": CHOSEN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture, a dense model of its width, and prompts of different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "mixture", scale=0.5, **MIXTURE)
    write_model(folder / "dense", scale=0.5, **WIDTH)
    rows = [{"prompt": "ab" * (1 + i) + "c"} for i in range(PROMPTS)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def line_of(folder, output, *args, model="mixture", dtype="bfloat16"):
    line = ["--model", folder / model, "--dataset", folder / "rows.jsonl", "--output", output]
    line += ["--reward", "length", "--eval-questions", 0, "--report-to", "none", "--steps", 1]
    line += ["--group", GROUP, "--batch-size", GROUP * PROMPTS, "--max-new-tokens", NEW]
    line += ["--seq-len", 96, "--targets", "q_proj", "v_proj", "--dtype", dtype, "--warmup", 0]
    return [str(word) for word in [*line, *args]]


def guess(number: int) -> str:
    """
    Guesses a number.

    Args:
        number: The guess.
    """
    return "too low" if number < 4 else "too high"


@pytest.fixture
def batches(monkeypatch):
    """The parameters and batches of the runs to come, as the step and the scorer get them."""
    seen, scored = [], Rollouts.log_probabilities

    def log_probabilities(self, params, batch, *args, **options):
        seen.append(jax.tree.map(np.asarray, (params, dict(batch))))
        return scored(self, params, batch, *args, **options)

    monkeypatch.setattr(Rollouts, "log_probabilities", log_probabilities)
    return seen


def experts_of(model, params, batch):
    """The experts that the rows of a batch go through: [rows, tokens, layers, k]."""
    chosen = []

    def recorded(gated, rows, experts, *kernels, biases=()):
        jax.debug.callback(lambda x: chosen.append(np.asarray(x)), experts, ordered=True)
        return apply_blocks(gated, rows, experts, *kernels, biases=biases)

    names = ("positions", "segment_ids", "branches", "routing")
    inputs = {name: batch[name][0] for name in names if name in batch}
    run = jax.jit(lj.adapt(model.clone(experts=recorded).apply))
    jax.block_until_ready(run({"params": params}, batch["ids"][0], **inputs))
    jax.effects_barrier()
    assert len(chosen) == LAYERS
    rows = [layer.reshape(CHOSEN, *batch["ids"][0].shape) for layer in chosen]
    return np.moveaxis(np.stack(rows), (0, 1), (2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shared"), [("float32", True), ("bfloat16", True), ("bfloat16", False)]
)
def test_each_token_goes_through_the_experts_of_its_drawing(
    folder, tmp_path, batches, dtype, shared
):
    """Exactly; where a step rounds otherwise than the sampler, some choose others without."""
    more = [] if shared else ["--no-share-prompt"]
    grpo.main(line_of(folder, tmp_path / "run", *more, dtype=dtype))
    ((params, batch),) = batches
    drawn, real = batch["routing"][0], batch["segment_ids"][0] > 0
    known = (drawn >= 0).all((-2, -1))
    # All but the last token of each completion, which was drawn and not run.
    assert ("branches" in batch) == shared and not (known & ~real).any()
    assert (real & ~known).sum() == GROUP * PROMPTS and known.sum() > 200
    model, _ = models.from_pretrained(folder / "mixture", dtype="float32")
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_identical(experts_of(model, params, batch)[known], drawn[known])
    without = {name: array for name, array in batch.items() if name != "routing"}
    others = np.sort(experts_of(model, params, without)[known]) != np.sort(drawn[known])
    assert others.any() == (dtype == "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_turns_and_what_answers_them_go_through_these_experts(
    tmp_path, monkeypatch, batches, shared
):
    """In completions of several turns, too; an environment has a prompt to each of them."""
    tools = LocalHost(None, [guess]) if shared else LocalHost(GuessingGame)
    monkeypatch.setattr(tool_use, "find_tools", lambda data: tools)
    fields = {name: value for name, value in MIXTURE.items() if name != "eos_token_id"}
    guessing.write_model(tmp_path / "mixture", 0.5, **fields)
    rows = [{"prompt": "play guess play guess", "secret": n} for n in guessing.NUMBERS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    calls = ["--tools", f"{__file__}:guess"] if shared else ["--environment", "guess"]
    args = [*calls, "--redraw", 1, "--batch-size", GROUP * 7, "--seq-len", 32]
    grpo.main(line_of(tmp_path, tmp_path / "run", *args))
    (line,) = read_metrics(tmp_path / "run")
    assert line["tools/turns"] > 1.3
    ((params, batch),) = batches
    drawn, real = batch["routing"][0], batch["segment_ids"][0] > 0
    known = (drawn >= 0).all((-2, -1))
    assert ("branches" in batch) == shared and not (known & ~real).any()
    # The last token of each completion did not run, nor did an answer that filled one up.
    own = np.take_along_axis(known, batch["predict_at"][0].reshape(len(known), -1), 1)
    assert own[batch["weights"][0].reshape(own.shape) > 0].all()
    assert GROUP * 7 <= (real & ~known).sum() < 0.2 * real.sum()
    model, _ = models.from_pretrained(tmp_path / "mixture", dtype="float32")
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_identical(experts_of(model, params, batch)[known], drawn[known])
    without = {name: array for name, array in batch.items() if name != "routing"}
    assert (np.sort(experts_of(model, params, without)[known]) != np.sort(drawn[known])).any()


@pytest.mark.slow
def test_the_mismatch_is_that_of_a_dense_model(folder, tmp_path, monkeypatch):
    def mismatch(name, model="mixture"):
        grpo.main(line_of(folder, tmp_path / name, "--steps", 3, model=model))
        lines = read_metrics(tmp_path / name)
        return np.mean([line["mismatch_mean"] for line in lines])

    dense = mismatch("dense", "dense")
    assert mismatch("replayed") <= 1.2 * dense
    # The control: XLA leaves out other roundings in the step than in the sampler.
    monkeypatch.setattr(moe, "_round_to", lambda x, dtype: x.astype(dtype))
    assert mismatch("as it comes") > 1.2 * dense


@over("case", ["mixtral", "qwen3-next", "gpt-oss", "glm4 moe", "deepseek v3"], often=[])
def test_given_experts_are_weighed_by_the_router(case):
    """Its own choice, given back to it, changes no value or gradient; its kernel trains."""
    model, params = tiny.decoder(case)
    config, ids = model.config, tiny.tokens(0, 2, 9)
    n, k = config.num_experts, config.num_experts_per_tok
    options = {"max_new_tokens": 2, "key": jax.random.key(0), "eos_token_id": []}
    drawn = models.sample(model, params, ids, **options, with_routing=True)
    assert drawn.routing.shape == (2, 10, config.num_hidden_layers, k)
    assert drawn.routing.min() <= 0 and drawn.routing.max() == n - 1
    dense = [layer for layer in range(drawn.routing.shape[2]) if not config.kind_of(layer).sparse]
    assert (
        (drawn.routing >= 0).all((0, 1, 3)) != np.isin(np.arange(drawn.routing.shape[2]), dense)
    ).all()

    @jax.jit
    def values(params, **routing):
        return jax.value_and_grad(lambda p: model.apply({"params": p}, ids, **routing).std())(
            params
        )

    routing = drawn.routing[:, :9]
    own, given = values(params), values(params, routing=routing)
    jax.tree.map(lambda a, b: assert_close(b, a, 1e-5), own, given)
    _, others = values(params, routing=(routing + 1) % n)
    for (path, there), here in zip(
        jax.tree_util.tree_leaves_with_path(others), jax.tree.leaves(own[1]), strict=True
    ):
        if {"gate", "router"} & {part.key for part in path} and path[-1].key == "kernel":
            assert np.isfinite(there).all() and np.abs(there - here).max() > 1e-6, path


def test_what_cannot_be_replayed_is_refused(folder, tmp_path, capsys):
    line = line_of(folder, tmp_path / "run", "--no-replay-routing", model="dense")
    assert "--no-replay-routing has no effect, because the model" in fails(capsys, grpo.main, *line)
    model, params = models.from_pretrained(folder / "dense")
    ids = np.ones((1, 3), np.int32)
    with pytest.raises(ValueError, match="routing has the experts of"):
        model.apply({"params": params}, ids, routing=np.zeros((1, 3, LAYERS, 2), np.int32))
    with pytest.raises(ValueError, match="this model has no experts"):
        models.sample(
            model, params, ids, max_new_tokens=2, key=jax.random.key(0), with_routing=True
        )
