"""The engine: tenants beside each other, and what they train, save and load."""

import dataclasses
import itertools
import threading
import time
import types

import jax
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import peft
from tests.adapted_trees import with_random_factors
from tests.support import assert_close
from tests.train.serve.engine.engines import (
    SECONDS,
    VOCAB,
    asked,
    begun,
    bits,
    held,
    ids,
    made_engine,
    over_families,
    random_data,
    running,
    sampled,
    submitted,
    tell,
)
from train.serve.engine import engine as engine_module
from train.serve.protocol.requests import (
    AdapterSpec,
    Client,
    Create,
    Datum,
    Discard,
    Gradient,
    Leave,
    Load,
    RequestError,
    Save,
    Update,
)

of_families = over_families("qwen3.5")
STEP = Update(learning_rate=1e-2, eps=1e-8)


@pytest.fixture(scope="module")
def warm(base):
    """An engine that compiled all programs before it began."""
    made = made_engine(base)
    made.seen = []
    made.warm_up(lambda *progress: made.seen.append(progress))
    made.others = {thread.ident for thread in threading.enumerate()}
    with running(made):
        yield made


def logps(engine, tenant, data):
    """The log-probabilities that a tenant's adapter gives to targets, as bytes."""
    request = Gradient(data, "cross_entropy", forward_only=True)
    return [x.tobytes() for x in tell(engine, tenant, request).logprobs]


@pytest.mark.slow
def test_the_progress_of_compiling_is_told(warm):
    parts = len(warm.seen) - 1
    assert parts > 10 and warm.seen == [(done, parts) for done in range(parts + 1)]


def test_a_step_without_a_gradient_has_no_loss(engine):
    tell(engine, "idle", Create(AdapterSpec(rank=2, seed=1)))
    for gradient in (True, False, True, False):
        if gradient:
            tell(engine, "idle", Gradient(random_data(2), "cross_entropy"))
        tell(engine, "idle", STEP)
    status = engine.status().tenants["idle"]
    tell(engine, "idle", Leave())
    assert status.steps == 4 and [step for step, _ in status.losses] == [1, 3]
    assert all(loss for _, loss in status.losses)


def test_figures_of_training_count_what_trained(engine):
    """Not the tokens of a forward pass alone, nor, in the loss, targets without a weight."""
    tell(engine, "counted", Create(AdapterSpec(rank=2, seed=1)))
    before, rng = engine.status().trained_tokens, np.random.default_rng(3)
    targets = {"target_tokens": rng.integers(0, 37, 6)}
    drawn = targets | {"logprobs": np.full(6, -3, np.float32)}
    weights = np.array([0, 0, 0, 1, 0.5, 0], np.float32)
    advantages = np.array([0, 0, 2, 0, 0, 0], np.float32)
    requests = {
        "cross_entropy": (Datum(ids(rng, 6), targets | {"weights": weights}), 1.5),
        "importance_sampling": (Datum(ids(rng, 6), drawn | {"advantages": advantages}), 1),
    }
    shown = []
    for loss, (datum, _) in requests.items():
        tell(engine, "counted", Gradient([datum], loss, forward_only=True))
        sums = tell(engine, "counted", Gradient([datum], loss)).metrics["loss:sum"]
        tell(engine, "counted", STEP)
        shown.append(sums / requests[loss][1])
    unweighted = Datum(ids(rng, 6), targets | {"weights": np.zeros(6, np.float32)})
    tell(engine, "counted", Gradient([unweighted], "cross_entropy"))
    tell(engine, "counted", STEP)
    status = engine.status()
    tell(engine, "counted", Leave())
    assert status.trained_tokens - before == 3 * 6
    assert [loss for _, loss in status.tenants["counted"].losses] == pytest.approx(shown, rel=1e-6)


@pytest.mark.slow
@of_families
def test_nothing_compiles_once_it_is_warm(warm, tmp_path):
    compiled = []

    def note(event, *_, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            if threading.get_ident() not in warm.others:
                compiled.append(facts.get("fun_name"))

    before = warm.status().compiled
    jax.monitoring.register_event_duration_secs_listener(note)
    for rank in (5, 2, 3):
        name, data = f"of rank {rank}", random_data(rank, n=rank)
        spec = AdapterSpec(rank=rank, seed=rank, mlp=rank > 2, attention=rank > 1)
        tell(warm, name, Create(spec))
        for loss in ("cross_entropy", "dro") if rank == 3 else ("cross_entropy",):
            given = {"logprobs": np.zeros(4, np.float32), "advantages": np.ones(4, np.float32)}
            short = Datum(ids(np.random.default_rng(1), 4), given | {"target_tokens": np.arange(4)})
            tell(warm, name, Gradient(data if loss == "cross_entropy" else [short], loss))
        tell(warm, name, dataclasses.replace(STEP, grad_clip_norm=0.1, weight_decay=0.1))
        tell(warm, name, Save(tmp_path / name, optimizer=True, name=name))
        tell(warm, "other", Load(tmp_path / name, optimizer=True))
        prompt = [*range(5 * rank + 8)]
        crowd = [
            begun(warm, adapter=name, prompt=prompt, n=rank, max_tokens=4, top_p=0.9, seed=3),
            begun(warm, adapter=name, prompt=[*prompt, 3], max_tokens=20, top=2, seed=-1),
            begun(warm, prompt=[1], max_tokens=45, temperature=0, prompt_logprobs=True),
            begun(warm, prompt=[1, 2], max_tokens=0, top_prompt=2),
        ]
        assert [len(x.result(SECONDS).completions[0].tokens) for x in crowd] == [4, 20, 45, 0]
        with held(warm):  # rows are paused, and go on
            crowd = [
                begun(warm, prompt=prompt, n=20, max_tokens=6, client=Client(owner))
                for owner in ("anna", "ben")
            ]
        assert [len(x.result(SECONDS).completions) for x in crowd] == [20, 20]
        tell(warm, name, Leave())
    tell(warm, "other", Leave())
    assert not compiled and warm.status().compiled == before
    wide = {"target_tokens": np.ones((4, 2), np.int32)}
    tell(warm, "other", Create(AdapterSpec(rank=1, seed=0)))
    wider = Gradient([Datum(np.arange(4, dtype=np.int32), wide)], "cross_entropy")
    tell(warm, "other", wider)
    tell(warm, "other", Leave())
    jax.monitoring.unregister_event_duration_listener(note)
    assert compiled and warm.status().compiled == before + 1, "it is counted"


class Neighbours:
    """Tenants that do what they like, until they are to stop."""

    def __init__(self, engine, folder):
        self.engine, self.folder, self.rounds = engine, folder, 0

    def __enter__(self):
        self.stop, self.failures = threading.Event(), []
        self.threads = [threading.Thread(target=self._live, args=(number,)) for number in range(3)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(SECONDS)
        assert not self.failures, self.failures

    def _live(self, number):
        try:
            for turn in itertools.count():
                if self.stop.is_set():
                    return
                self._turn(f"neighbour {number}", number, turn)
                self.rounds += 1
        except Exception as error:
            self.failures.append(error)

    def _turn(self, name, number, turn):
        engine, path = self.engine, self.folder / f"{number} {turn}"
        tell(engine, name, Create(AdapterSpec(rank=1 + 2 * number, mlp=number != 1)))
        data = random_data(turn, n=2)
        how = Update(0.5, eps=1e-8, weight_decay=0.9, grad_clip_norm=0.1 * number)
        tell(engine, name, Gradient(data, "cross_entropy"))
        tell(engine, name, how)
        tell(engine, name, Save(path, optimizer=True, name=name))
        huge = {"target_tokens": np.ones(3, np.int32), "weights": np.full(3, 3e38, np.float32)}
        with pytest.raises(RequestError, match="not finite"):
            tell(engine, name, Gradient([Datum(np.arange(3), huge)], "cross_entropy"))
        sample = begun(engine, adapter=name, prompt=[turn % VOCAB], n=2, max_tokens=5)
        tell(engine, name, Load(path, optimizer=number == 0))
        sample.result(SECONDS)
        tell(engine, name, Leave())
        engine.drop(name)


def whole_run(engine, folder):
    """Everything that a tenant sees while it trains, as bytes."""
    seen = []
    tell(engine, "mine", Create(AdapterSpec(rank=3, seed=4)))
    for step in range(3):
        data = random_data(step, n=5)
        seen += [
            x.tobytes() for x in tell(engine, "mine", Gradient(data, "cross_entropy")).logprobs
        ]
        how = Update(1e-2, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0)
        seen.append(tell(engine, "mine", how).metrics)
        tell(engine, "mine", Save(folder / f"{step}", optimizer=True, name=f"mine {step}"))
        how = {"prompt": [3, 1, 4, 1, 5], "n": 2, "max_tokens": 12, "seed": step}
        seen.append(bits(sampled(engine, adapter=f"mine {step}", prompt_logprobs=True, **how)))
    seen.append((folder / "2" / "adapter_model.safetensors").read_bytes())
    seen.append((folder / "2" / "optimizer.safetensors").read_bytes())
    tell(engine, "mine", Leave())
    return seen


@of_families
def test_a_tenant_in_a_crowd_equals_it_alone(engine, tmp_path):
    alone = whole_run(engine, tmp_path / "alone")
    with Neighbours(engine, tmp_path) as crowd:
        assert whole_run(engine, tmp_path / "crowd") == alone
    assert crowd.rounds >= 3


@pytest.mark.slow
@of_families
def test_steps_are_those_of_optax_on_the_model(engine, base, tmp_path):
    """Each datum in a row of its own there, and packed or padded beside others here."""
    forward = lj.adapt(base.model.apply)

    def loss(factors, scales, data):
        tree, total = base.tree(factors, scales, base.shell), 0.0
        for tokens, targets, weights in data:
            logps = jax.nn.log_softmax(forward({"params": tree}, tokens[None])[0])
            total -= (weights * logps[np.arange(len(targets)), targets]).sum()
        return total

    def data_of(seed):
        rng = np.random.default_rng(seed)
        return [(ids(rng, n), ids(rng, n), rng.normal(size=n).astype("f4")) for n in (19, 7, 30)]

    tell(engine, "own", Create(AdapterSpec(rank=3, seed=4)))
    tell(engine, "own", Gradient(random_data(5, n=2), "cross_entropy"))
    tell(engine, "own", STEP)  # B is no longer zero
    tell(engine, "own", Save(tmp_path / "before"))
    tell(engine, "own", Load(tmp_path / "before", optimizer=False))
    adapter, gradient = base.read_state(tmp_path / "before").adapter, jax.jit(jax.grad(loss))
    factors, size = adapter.factors, gradient(adapter.factors, adapter.scales, data_of(6))
    # Beyond the gradients: divided by their own size, small ones would be mostly rounding.
    eps = 10 * float(max(np.abs(x).max() for x in jax.tree.leaves(size)))
    how = Update(0.1, eps=eps, weight_decay=0.1)
    optimizer = optax.adamw(how.learning_rate, how.beta1, how.beta2, how.eps, weight_decay=0.1)
    state = optimizer.init(factors)
    for seed in (6, 8):  # at 7, Qwen3-Next's gradients in fp32 are 2e-3 from those in fp64
        data = data_of(seed)
        given = [Datum(x, {"target_tokens": y, "weights": w}) for x, y, w in data]
        tell(engine, "own", Gradient(given, "cross_entropy"))
        tell(engine, "own", how)
        updates, state = optimizer.update(gradient(factors, adapter.scales, data), state, factors)
        factors = optax.apply_updates(factors, updates)
    tell(engine, "own", Save(tmp_path / "after"))
    tell(engine, "own", Leave())
    found = base.read_state(tmp_path / "after").adapter.factors
    # Steps are 1e-2 long. Gradients through linear layers are 1e-4 from those in fp64, in fp32.
    moved, most = 0.0, 5e-5 if base.model.config.linear_layers else 2e-6
    for path, parts in found.items():
        for name, array in parts.items():
            assert np.abs(array - factors[path][name]).max() < most, path
            moved = max(moved, np.abs(array - adapter.factors[path][name]).max())
    assert moved > 1e-2


def test_what_is_not_finite_fails_alone(engine):
    data = random_data(1)
    for name in ("good", "bad"):
        tell(engine, name, Create(AdapterSpec(rank=2, seed=1)))
        tell(engine, name, Gradient(data, "cross_entropy"))
    inputs = dict(data[0].inputs) | {"weights": np.full(len(data[0].tokens), 3e38, np.float32)}
    huge = dataclasses.replace(data[0], inputs=inputs)
    for wrong in ([huge], [*data, huge]):
        with pytest.raises(RequestError, match="not finite"):
            tell(engine, "bad", Gradient(wrong, "cross_entropy"))
    for fields in ({"learning_rate": np.nan}, {"beta2": 1.0}, {"eps": -1}, {"grad_clip_norm": -1}):
        with pytest.raises(RequestError, match=next(iter(fields))):
            tell(engine, "bad", dataclasses.replace(STEP, **fields))
    told = [tell(engine, name, STEP).metrics for name in ("good", "bad")]
    assert told[0] == told[1] and told[0]["grad_norm:max"] > 0.1
    tell(engine, "bad", Gradient(data[:3], "cross_entropy"))
    with pytest.raises(RequestError, match="not finite"):
        tell(engine, "bad", dataclasses.replace(STEP, learning_rate=1e30, weight_decay=1e30))
    assert logps(engine, "bad", data[:3]) == logps(engine, "good", data[:3])
    assert tell(engine, "bad", STEP).metrics["grad_norm:max"] > 0.1, "the gradient is there"
    for name in ("good", "bad"):
        tell(engine, name, Leave())


def test_a_sum_is_the_same_in_one_call_or_several(engine):
    data = random_data(2, n=7)
    norms, found = [], []
    for parts in ([data], [data[:3], data[3:]], [[datum] for datum in data]):
        tell(engine, "sum", Create(AdapterSpec(rank=4, seed=2)))
        if len(parts) > 1:  # what is discarded counts for nothing
            tell(engine, "sum", Gradient(data[2:4], "cross_entropy"))
            tell(engine, "sum", Discard())
        for _ in range(2):
            for part in parts:
                tell(engine, "sum", Gradient(part, "cross_entropy"))
                tell(engine, "sum", Gradient(data[:1], "cross_entropy", forward_only=True))
            norms.append(tell(engine, "sum", STEP).metrics["grad_norm:max"])
        request = Gradient(data, "cross_entropy", forward_only=True)
        found.append(np.concatenate(tell(engine, "sum", request).logprobs))
    tell(engine, "sum", Leave())
    for other in found[1:]:
        assert_close(found[0], other, 1e-5)
    assert np.ptp(norms[::2]) < 1e-5 * norms[0] and np.ptp(norms[1::2]) < 1e-5 * norms[1]
    assert norms[0] != norms[1]


@of_families
def test_saved_and_loaded_bitwise(engine, tmp_path):
    data = random_data(3)
    tell(engine, "first", Create(AdapterSpec(rank=3, seed=9, alpha=7.0)))
    for _ in range(2):
        tell(engine, "first", Gradient(data, "cross_entropy"))
        tell(engine, "first", STEP)
    tell(engine, "first", Gradient(data, "cross_entropy"))  # no part of what is saved
    saved = submitted(engine, "first", Save(tmp_path / "x", optimizer=True))
    tell(engine, "first", Load(tmp_path / "x", optimizer=True))  # while it is written
    assert saved.result(SECONDS).size == sum(p.stat().st_size for p in (tmp_path / "x").iterdir())
    tell(engine, "second", Load(tmp_path / "x", optimizer=True))
    assert tell(engine, "third", Load(tmp_path / "x", optimizer=False)) == AdapterSpec(
        rank=3, seed=9, alpha=7.0
    )
    names = ("first", "second", "third")
    assert len({str(logps(engine, name, data)) for name in names}) == 1
    steps = []
    for name in names:
        tell(engine, name, Gradient(data[:2], "cross_entropy"))
        steps.append(tell(engine, name, STEP).metrics["step:max"])
    one, two, three = (logps(engine, name, data) for name in names)
    assert one == two != three and steps == [3, 3, 1]
    tell(engine, "first", Save(tmp_path / "plain"))
    with pytest.raises(RequestError, match="no state of an optimiser"):
        tell(engine, "second", Load(tmp_path / "plain", optimizer=True))
    assert logps(engine, "second", data) == two
    for name in names:
        tell(engine, name, Leave())


def test_a_folder_is_read_while_others_are_written(engine, base, tmp_path, monkeypatch):
    tell(engine, "writer", Create(AdapterSpec(rank=2, seed=1)))
    tell(engine, "writer", Save(tmp_path / "there"))
    write, go_on = base.write, threading.Event()

    def wait(*given):
        assert go_on.wait(SECONDS)
        return write(*given)

    monkeypatch.setattr(base, "write", wait)
    saved = submitted(engine, "writer", Save(tmp_path / "slow"))
    loaded = submitted(engine, "reader", Load(tmp_path / "there", optimizer=False))
    try:
        assert loaded.result(20).rank == 2 and not saved.done()
        again = submitted(engine, "writer", Load(tmp_path / "slow", optimizer=False))
        time.sleep(0.02)
        assert not again.done()
    finally:
        go_on.set()
    assert again.result(SECONDS).rank == 2 and saved.result(SECONDS).size > 0
    for name in ("writer", "reader"):
        tell(engine, name, Leave())


@pytest.mark.parametrize("kind", ["peft", pytest.param("run", marks=pytest.mark.slow)])
def test_folders_from_elsewhere(engine, base, tmp_path, kind):
    rules = [
        lj.LoraRule(targets=["q_proj", "down_proj"], rank=2, alpha=5),
        lj.LoraRule(targets=["v_proj"], rank=4, alpha=3),
    ]
    tree = with_random_factors(lj.lorafy(base.params, rules))
    if kind == "peft":
        peft.save(tmp_path / "a", base.model, tree)
    else:
        lj.save_adapter(tmp_path / "a", tree)
    spec = tell(engine, "adopter", Load(tmp_path / "a", optimizer=False))
    assert (spec.rank, spec.unembed) == (4, False)
    (datum,) = random_data(4, n=1)
    logits = jax.jit(lj.adapt(base.model.apply))({"params": tree}, datum.tokens[None])[0]
    targets = datum.inputs["target_tokens"]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(targets)), targets]
    request = Gradient([datum], "cross_entropy", forward_only=True)
    found = tell(engine, "adopter", request).logprobs[0]
    assert_close(found, expected, 1e-5)
    asked(lambda done: engine.adopt("adopted", tmp_path / "a", done)).result(SECONDS)
    assert engine.knows("adopted")
    drawn = sampled(
        engine, adapter="adopted", prompt=datum.tokens.tolist(), max_tokens=0, prompt_logprobs=True
    )
    shifted = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(targets) - 1), datum.tokens[1:]]
    assert_close(drawn.prompt_logprobs[1:], shifted, 1e-5)
    before = logps(engine, "adopter", [datum])
    tell(engine, "adopter", Save(tmp_path / "b"))
    tell(engine, "adopter", Load(tmp_path / "b", optimizer=False))
    again = tell(engine, "adopter", request).logprobs[0]
    assert_close(again, np.frombuffer(before[0], np.float32), 1e-5)
    tell(engine, "adopter", Leave())
    engine.drop("adopted")


def test_tenants_share_the_engine_s_time(engine, monkeypatch):
    """Whatever they had before, while nobody else wanted it."""
    parts, futures = [], []
    now = {"monotonic": lambda: len(parts) * 0.01, "time": time.time}  # a part, a hundredth
    clock = types.SimpleNamespace(**now)
    monkeypatch.setattr(engine_module, "time", clock)
    trainer, real = engine._trainer, engine._trainer.gradient

    def noted(adapter, *rest):
        owners = {id(t.state.adapter): name for name, t in engine._tenants.items() if t.state}
        parts.append(owners[id(adapter)])
        return real(adapter, *rest)

    monkeypatch.setattr(trainer, "gradient", noted)
    for name in ("one large", "many small"):
        tell(engine, name, Create(AdapterSpec(rank=1, seed=0)))
    tell(engine, "one large", Gradient(random_data(1, n=30), "cross_entropy"))
    before = len(parts)
    with held(engine):
        for call in ([2] * 8, [16]):
            name = "one large" if len(call) == 1 else "many small"
            for n in call:
                data = [Datum(np.arange(60) % VOCAB, {"target_tokens": np.ones(60, int)})] * n
                futures.append(submitted(engine, name, Gradient(data, "cross_entropy")))
    for future in futures:
        future.result(SECONDS)
    order = parts[before:]
    assert len(order) == 16
    for n in (6, 10, 14):
        share = order[:n].count("one large") / n
        assert 0.4 <= share <= 0.6, order
    for name in ("one large", "many small"):
        tell(engine, name, Leave())
