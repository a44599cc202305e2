"""The engine refuses bad requests, and outlives errors."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import peft
from tests.train.serve.engine.engines import (
    SECONDS,
    VOCAB,
    asked,
    begun,
    held,
    made_engine,
    random_data,
    running,
    sampled,
    submitted,
    tell,
)
from train.serve.protocol.requests import (
    AdapterSpec,
    Create,
    Datum,
    Gradient,
    Leave,
    Load,
    RequestError,
    Save,
    Update,
)

STEP = Update(learning_rate=1e-2, eps=1e-8)


@pytest.fixture(scope="module")
def engine(base):
    made = made_engine(base)
    with running(made):
        yield made


BAD = np.array([1.0, np.nan, 1.0], np.float32)
THREE = {"target_tokens": np.arange(3, dtype=np.int32)}
RL = {"logprobs": np.zeros(3, np.float32), "advantages": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("tokens", "inputs", "loss", "said"),
    [
        ([0, VOCAB, 1], THREE, "cross_entropy", "an id outside 0 to 36"),
        ([0, -1, 1], THREE, "cross_entropy", "an id outside"),
        ([0, 1, 2], {"target_tokens": np.array([0, 1, VOCAB])}, "cross_entropy", "target_tokens"),
        ([0, 1], THREE, "cross_entropy", "has the shape"),
        ([0, 1, 2], {"target_tokens": np.int32(1)}, "cross_entropy", "has the shape"),
        ([0] * 65, {"target_tokens": np.zeros(65, int)}, "cross_entropy", "has 65 tokens"),
        ([], {"target_tokens": np.zeros(0, int)}, "cross_entropy", "has 0 tokens"),
        ([0, 1, 2], {}, "cross_entropy", "lacks target_tokens"),
        ([0, 1, 2], THREE | {"weights": BAD}, "cross_entropy", "not finite"),
        ([0, 1, 2], THREE | {"weights": BAD[:2]}, "cross_entropy", "weights has the shape"),
        ([0, 1, 2], THREE, "ppo", "lacks logprobs"),
        ([0, 1, 2], THREE | RL | {"advantages": BAD}, "ppo", "advantages holds"),
        ([0, 1, 2], {"target_tokens": np.zeros((3, 33), int)}, "cross_entropy", "33 targets"),
        ([0, 1, 2], THREE, "stable_reinforce", "Use one of cross_entropy, "),
    ],
)
def test_bad_data_are_refused(engine, tokens, inputs, loss, said):
    tell(engine, "bad", Create(AdapterSpec(rank=1, seed=0)))
    good = Datum(np.arange(3, dtype=np.int32), THREE | RL)
    bad = Datum(np.array(tokens, np.int32), inputs)
    with pytest.raises(RequestError, match=said):
        tell(engine, "bad", Gradient([good, bad], loss))
    assert tell(engine, "bad", STEP).metrics["grad_norm:max"] == 0, "nothing was added"
    tell(engine, "bad", Leave())


def test_bad_commands_are_refused(engine, base, tmp_path):
    wrong = {
        "Use ranks from 1 to 8": Create(AdapterSpec(rank=9)),
        "from 1 to 8": Create(AdapterSpec(rank=0)),
        "the adapter adapts no weights": Create(
            AdapterSpec(rank=1, attention=False, mlp=False, unembed=False)
        ),
        "Create or load it first": STEP,
        "there are no data": Gradient([], "cross_entropy"),
        "beta is nan": Gradient([Datum(np.arange(3), THREE)], "dro", {"beta": np.nan}),
        "nowhere": Load(tmp_path / "nowhere", optimizer=False),
        "broken": Load(tmp_path / "broken", optimizer=False),
        "have rank 8": Load(tmp_path / "large", optimizer=False),
        "not finite": Load(tmp_path / "nan", optimizer=False),
    }
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    tree = lj.lorafy(base.params, [lj.LoraRule(targets=["q_proj"], rank=9)])
    peft.save(tmp_path / "large", base.model, tree)
    tree = lj.lorafy(base.params, [lj.LoraRule(targets=["q_proj"], rank=2)])
    peft.save(tmp_path / "nan", base.model, tree)
    file = tmp_path / "nan" / "adapter_model.safetensors"
    arrays = load_file(file)
    next(iter(arrays.values()))[0, 0] = np.nan
    save_file(arrays, file)
    for said, command in wrong.items():
        tenant = "there" if isinstance(command, Gradient) else "not there"
        tell(engine, "there", Create(AdapterSpec(rank=1, seed=0)))
        with pytest.raises(RequestError, match=said):
            tell(engine, tenant, command)
    tell(engine, "there", Leave())
    assert not engine._tenants, "what is not there takes no memory"
    with pytest.raises(RequestError, match="broken"):
        asked(lambda done: engine.adopt("broken", tmp_path / "broken", done)).result(SECONDS)
    assert not engine.knows("broken")


@pytest.mark.parametrize("weight", [pytest.param(1e25, marks=pytest.mark.slow), 1e38])
def test_a_gradient_that_no_update_could_take_is_refused(engine, weight):
    """Each of its numbers may be finite, but no norm by which it could be clipped."""
    tell(engine, "greedy", Create(AdapterSpec(rank=1, seed=0)))
    given = THREE | {"weights": np.full(3, weight, np.float32)}
    with pytest.raises(RequestError, match="No gradient was added"):
        tell(engine, "greedy", Gradient([Datum(np.arange(3), given)], "cross_entropy"))
    tell(engine, "greedy", Gradient(random_data(1), "cross_entropy"))
    assert tell(engine, "greedy", STEP).metrics["step:max"] == 1
    tell(engine, "greedy", Leave())


@pytest.mark.slow
def test_it_outlives_what_goes_wrong(engine, monkeypatch, caplog):
    def wrong(*_):
        raise ValueError("a callback of a route's")

    engine.submit("x", Create(AdapterSpec(rank=1, seed=0)), wrong)
    engine.submit("x", Leave(), wrong)
    tell(engine, "x", Leave())
    engine.adopt("x", "no path", wrong)
    assert len(sampled(engine, prompt=[1], max_tokens=3, seen=None).completions[0].tokens) == 3
    noisy = begun(engine, wrong, prompt=[1], max_tokens=3)
    assert len(noisy.result(SECONDS).completions[0].tokens) == 3
    assert caplog.text.count("a result was not taken") == 6
    other = begun(engine, prompt=[1], max_tokens=20)
    monkeypatch.setattr(engine._sampler, "_text_of", wrong)
    with pytest.raises(ValueError, match="a callback"):
        sampled(engine, prompt=[1], max_tokens=3, stop=("x",))
    assert len(other.result(SECONDS).completions[0].tokens) == 20, "its own request alone"
    with pytest.raises(Exception, match="."):
        sampled(engine, prompt=None)
    with monkeypatch.context() as patched:
        patched.setattr(engine._programs, "run", wrong)
        with pytest.raises(ValueError, match="a callback"):
            sampled(engine, prompt=[1], n=12, max_tokens=3)
        patched.setattr(engine._sampler, "fail", wrong)
        hopeless = begun(engine, prompt=[1], max_tokens=3)
        with held(engine):  # it goes on
            patched.undo()
    assert len(hopeless.result(SECONDS).completions[0].tokens) == 3
    insert = engine._programs.insert

    def spoilt(rows, *rest):
        insert(rows, *rest)  # it took the rows
        raise ValueError("a callback")

    with monkeypatch.context() as patched:
        patched.setattr(engine._programs, "insert", spoilt)
        with pytest.raises(ValueError, match="a callback"):
            sampled(engine, prompt=[1], max_tokens=3)
    assert len(sampled(engine, prompt=[1], n=12, max_tokens=3).completions) == 12
    status = engine.status()
    assert (status.waiting, status.drawing, dict(status.tenants)) == (0, 0, {})


def test_commands_after_leaving_are_answered(engine, tmp_path):
    with held(engine):
        commands = [
            Create(AdapterSpec(rank=1, seed=0)),
            Gradient(random_data(1), "cross_entropy"),
            Leave(),
            STEP,
            Create(AdapterSpec(rank=2, seed=0)),
            STEP,
        ]
        futures = [submitted(engine, "goer", command) for command in commands]
    assert [f.exception(SECONDS) is None for f in futures] == [True, True, True, False, True, True]
    assert futures[-1].result().metrics["grad_norm:max"] == 0, "of what it left, nothing is there"
    tell(engine, "goer", Gradient(random_data(1), "cross_entropy"))
    tell(engine, "goer", Create(AdapterSpec(rank=2, seed=0)))
    assert tell(engine, "goer", STEP).metrics["grad_norm:max"] == 0
    tell(engine, "goer", Leave())


def test_its_end(base, tmp_path):
    made = made_engine(base)
    made.close()  # before it began
    made = made_engine(base)
    made.start()
    created = submitted(made, "x", Create(AdapterSpec(rank=1, seed=0)))
    saved = submitted(made, "x", Save(tmp_path / "x"))
    refused = begun(made, prompt=[VOCAB])
    made.close()
    made.close()
    assert created.result(0).rank == 1 and saved.result(0).size > 0
    assert isinstance(refused.exception(0), RequestError)
    refused.call()  # too late, and no error
    for call in (lambda: submitted(made, "x", Leave()), lambda: begun(made, prompt=[1])):
        with pytest.raises(RuntimeError, match="closed"):
            call()
