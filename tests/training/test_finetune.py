"""Training from Python: the steps composed by hand, resuming, evaluation, and bad input."""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lora_jax as lj
from lora_jax import training
from lora_jax.training.layout import Layout
from lora_jax.training.losses import CROSS_ENTROPY
from tests.core.coded import Coded, decoded, with_coded_kernels
from tests.support import array, assert_close, assert_identical, over
from tests.train.tiny import decoder, tokenizer
from train.processes.mesh import make_mesh

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROWS = [{"prompt": f"{i}?", "completion": "yes" * i} for i in range(1, 11)]
RULES = [lj.LoraRule(targets="all-linear", rank=2, alpha=8, dropout=0.1)]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 5)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)


class Mlp(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.tanh(nn.Dense(7, name="up")(x)))


def of_mlp(forward, params, batch, dropout_key):
    """The cross entropy of two classes, and how many are right."""
    return summed(forward({"params": params}, batch["x"]), batch["y"])


def summed(logits, labels):
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = jnp.sum(jnp.argmax(logits, -1) == labels)
    return training.Sums(jnp.sum(each), jnp.float32(each.size), {"accuracy": right})


def plain_function(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["out"]["kernel"]


def of_function(forward, params, batch, dropout_key):
    return summed(forward(params, batch["x"]), batch["y"])


def mlp():
    draw = np.random.default_rng(1).normal
    params = {
        name: {"kernel": draw(size=shape) / shape[0] ** 0.5, "bias": np.zeros(shape[1])}
        for name, shape in (("up", (5, 7)), ("out", (7, 2)))
    }
    return Mlp(), jax.tree.map(lambda x: array(x, jnp.float32), params)


def function():
    draw = np.random.default_rng(2).normal
    params = {"up": {"kernel": draw(size=(5, 7))}, "out": {"kernel": draw(size=(7, 2))}}
    return plain_function, jax.tree.map(lambda x: array(x, jnp.float32), params)


UP = [lj.TrainRule(targets=["out"]), lj.LoraRule(targets=["up"], rank=2, alpha=6)]
OWN = {"module": (mlp, of_mlp), "function": (function, of_function)}


def packs(rows=ROWS):
    return training.chats(rows, tokenizer(), seq_len=96)


def by_hand(
    forward, params, examples, rules, loss, *, steps, lr, dropout, batch_size, parts=1, **schedule
):
    """Trains the same run, from its parts."""
    key = jax.random.key(0)
    adapter, base = lj.split(lj.lorafy(params, rules, key=jax.random.fold_in(key, 0)))
    schedule = training.warmed_up(lr, steps, **schedule)
    optimizer = training.adamw(schedule)
    step = training.make_step(lj.adapt(forward), optimizer, schedule, dropout=dropout, loss=loss)
    step = jax.jit(step, donate_argnums=0)
    state = training.init_state(adapter, optimizer, jax.random.fold_in(key, 1))
    order = training.Order(0, len(examples), batch_size, parts)
    losses = []
    for number in range(steps):
        state, metrics = step(state, base, examples.take(order.rows(number)))
        losses.append(float(metrics["loss"]))
    return lj.join(state.adapter, base), losses


def losses_of(report):
    return [line["loss"] for line in report.metrics if "loss" in line]


@pytest.mark.slow
def test_a_run_on_chats_is_its_parts_composed_by_hand():
    model, params = decoder()
    trained, report = whole()
    expected, losses = by_hand(
        model.apply,
        params,
        packs(),
        RULES,
        CROSS_ENTROPY,
        steps=6,
        lr=3e-3,
        dropout=True,
        batch_size=2,
        parts=2,
        kind="constant",
        warmup=1,
    )
    assert_identical(trained, expected)
    assert losses_of(report) == losses and losses[-1] < losses[0]
    assert report.summary == lj.summary(trained, in_training=True) and report.adapter is None
    assert report.steps == 6 and report.held_out == {} and report.step_seconds > 0


@over("kind", OWN, often=[])
def test_a_model_of_ones_own_is_its_parts_composed_by_hand(kind):
    make, loss = OWN[kind]
    model, params = make()
    forward = getattr(model, "apply", model)
    arrays = {"x": X[:16], "y": Y[:16]}
    options = {"lr": 0.02, "steps": 30, "batch_size": 4}
    trained, report = training.finetune(
        model,
        params,
        arrays,
        UP,
        loss=loss,
        held_out={"x": X[16:], "y": Y[16:]},
        log=None,
        log_every=1,
        **options,
    )
    expected, losses = by_hand(
        forward, params, training.Arrays(arrays), UP, training.Loss(loss), dropout=False, **options
    )
    assert_identical(trained, expected)
    assert losses_of(report) == losses
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    # Six held-out examples are a batch of four and one of two; none counts twice.
    measure = jax.jit(functools.partial(loss, forward))
    sums = measure(lj.merge(trained), {"x": X[16:], "y": Y[16:]}, None)
    assert report.held_out["loss"] == pytest.approx(float(sums.total) / 6, rel=1e-5)
    assert report.held_out["accuracy"] == pytest.approx(float(sums.logs["accuracy"]) / 6)
    measured = [line["step"] for line in report.metrics if "eval_loss" in line]
    assert measured == list(range(3, 31, 3))


@pytest.mark.slow
@over("in_full", [False, True], often=["True"])
def test_a_base_that_is_no_array_trains_as_its_array_does(in_full, tmp_path):
    """Codes with scales: the same adapter as on the array they stand for, kept and resumed."""
    rules = UP if in_full else UP[1:]
    _, arrays = function()
    params = with_coded_kernels(arrays, UP)
    assert isinstance(params["up"]["kernel"], Coded)
    how = dict(
        lr=0.1, loss=of_function, batch_size=4, log=None, steps=6, schedule="constant", warmup=1
    )
    data = {"x": X, "y": Y}
    expected, _ = training.finetune(plain_function, decoded(params), data, rules, **how)
    folder = tmp_path / "run"
    if in_full:  # what trains in full is no code any more when the run goes on
        training.finetune(plain_function, params, data, rules, folder=folder, **how | {"steps": 3})
    tree, _ = training.finetune(
        plain_function, params, data, rules, folder=folder, resume=in_full, **how
    )
    assert isinstance(tree["up"]["kernel"].base, Coded)
    assert_close(lj.split(tree)[0], lj.split(expected)[0], 1e-5)
    loaded = lj.load_adapter(folder / "adapter", params)
    assert_close(lj.split(loaded)[0], lj.split(expected)[0], 1e-5)


def test_the_base_of_the_caller_is_spared_and_so_is_an_adapted_tree(capsys):
    model, params = mlp()
    adapted = lj.lorafy(params, UP)
    before = jax.tree.map(np.array, (params, adapted))
    arrays = {"x": X, "y": Y}
    options = {"loss": of_mlp, "lr": 0.1, "steps": 2, "log": None}
    training.finetune(model, params, arrays, UP, **options)
    trained, _ = training.finetune(model, adapted, arrays, **options)
    assert_identical(jax.tree.map(np.array, (params, adapted)), before)
    assert not np.array_equal(trained["up"]["kernel"].b, adapted["up"]["kernel"].b)
    assert capsys.readouterr().out == "", "log=None"


def tuned(folder, steps, **options):
    """A run on chats with a constant rate, so that its length changes no step."""
    model, params = decoder()
    options = {
        "lr": 3e-3,
        "batch_size": 2,
        "grad_accum": 2,
        "schedule": "constant",
        "warmup": 1,
        "log": None,
        **options,
    }
    rules = options.pop("rules", RULES)
    examples = options.pop("examples", None) or packs()
    return training.finetune(model, params, examples, rules, steps=steps, folder=folder, **options)


@functools.cache
def whole():
    """A run on chats without a break, which others compare with."""
    return tuned(None, 6)


def fitted(folder, steps, **options):
    """Like `tuned`, of a function of arrays: it compiles in no time."""
    model, params = function()
    options = {"lr": 3e-3, "batch_size": 4, "schedule": "constant", "warmup": 1, **options}
    options = {"log": None, "loss": of_function, **options}
    rules = options.pop("rules", UP)
    examples = options.pop("examples", {"x": X, "y": Y})
    return training.finetune(model, params, examples, rules, steps=steps, folder=folder, **options)


@pytest.mark.slow
def test_a_resumed_run_ends_bitwise_where_a_whole_one_does(tmp_path):
    expected, _ = whole()
    tuned(tmp_path, 3)
    resumed, report = tuned(tmp_path, 6, resume=True)
    assert_identical(resumed, expected)
    assert [line["step"] for line in report.metrics] == [4, 5, 6]
    _, params = decoder()
    assert report.adapter == tmp_path / "adapter"
    assert_identical(lj.split(lj.load_adapter(report.adapter, params))[0], lj.split(expected)[0])


@pytest.mark.slow
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_bitwise(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(line):
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(training.Interrupted, match="after step 3. Continue with resume=True"):
        fitted(tmp_path, 6, log=interrupt, log_every=1)
    assert signal.getsignal(signal.SIGINT) is before
    resumed, report = fitted(tmp_path, 6, resume=True)
    assert report.metrics[0]["step"] == 4
    assert_identical(resumed, fitted(None, 6)[0])


@pytest.mark.slow
def test_an_adapter_out_of_the_base_is_decomposed_once(tmp_path, monkeypatch):
    rules = [lj.LoraRule(targets=["up"], rank=2, alpha=4, init=lj.init.pissa)]
    whole, _ = fitted(None, 4, rules=rules)
    fitted(tmp_path, 2, rules=rules)
    monkeypatch.setattr(lj, "lorafy", None)
    resumed, _ = fitted(tmp_path, 4, rules=rules, resume=True)
    assert_identical(resumed, whole)


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        training.TrainingError, match="holds another run. Continue .*with resume=True"
    ):
        fitted(tmp_path, 1)
    assert [*tmp_path.rglob("*")] == [tmp_path / "checkpoints"]


@pytest.mark.slow
def test_a_folder_with_a_run_is_not_used_again(tmp_path):
    first, _ = fitted(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        training.TrainingError, match="holds another run. Continue .*with resume=True"
    ):
        fitted(tmp_path, 1)
    for changed, message in (
        ({"lr": 1e-3}, r"other settings: lr was 0.003 and is now 0.001"),
        ({"seed": 1}, "the training data differ from those|other settings: seed was 0"),
        (
            {"examples": {"x": X[1:], "y": Y[1:]}},
            "resume=True: the training data differ from those",
        ),
        ({"rules": [UP[0], lj.LoraRule(targets=["up"], rank=2, alpha=9)]}, "settings: rules was"),
        ({"rules": [lj.LoraRule(targets=["up"], rank=4)]}, "settings: rules was"),
    ):
        with pytest.raises(training.TrainingError, match=message):
            fitted(tmp_path, 2, resume=True, **changed)
    with pytest.raises(training.TrainingError, match="resume=True: "):
        fitted(tmp_path, 1, resume=True, lr=9.0)
    again, report = fitted(tmp_path, 1, overwrite=True)
    assert_identical(again, first)
    assert (tmp_path / "notes.txt").exists() and report.metrics[0]["step"] == 1


@pytest.mark.slow
def test_progress_is_printed_or_handed_over_now_and_then(capsys):
    model, params = mlp()
    options = {"loss": of_mlp, "lr": 0.1, "steps": 20, "batch_size": 4}
    arrays = {"x": X, "y": Y}
    training.finetune(model, params, arrays, UP, held_out=arrays, **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].startswith("step 2  loss ") and "accuracy" in lines[0]
    assert lines[-1].startswith("step 20: held-out loss ")
    heard = []
    training.finetune(model, params, arrays, UP, log=heard.append, log_every=5, **options)
    assert [line["step"] for line in heard] == [5, 10, 15, 20]
    assert capsys.readouterr().out == ""


def test_a_run_that_diverges_says_so_in_the_words_of_python():
    model, params = mlp()
    arrays = {"x": np.full_like(X, np.nan), "y": Y}
    with pytest.raises(training.Diverged) as caught:
        training.finetune(model, params, arrays, UP, loss=of_mlp, lr=0.1, steps=9, log=None)
    message = str(caught.value)
    assert message.startswith("max_skipped=3: 3 steps") and "a lower lr or" in message
    assert "its batch example " in message and "--" not in message


@pytest.mark.slow
def test_devices_of_a_mesh_train_as_one_does():
    mesh = make_mesh("fsdp=2,tensor=2", 4, devices=jax.devices())
    four, _ = tuned(None, 6, layout=Layout.of(mesh, decoder()[0].config))
    one, _ = whole()
    for a, b in zip(*(jax.tree.leaves(lj.split(t)[0]) for t in (one, four)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert len(b.sharding.device_set) == 4


ARRAYS = {"x": X, "y": Y}
BAD = {
    "no arrays": ({"examples": {}}, "examples has nothing, but all arrays must have one length"),
    "lengths": ({"examples": {"x": X, "y": Y[1:]}}, r"x \(22, 5\), y \(21,\), but all arrays must"),
    "a number": ({"examples": {"x": X, "y": 3}}, r"y \(\), but all arrays must"),
    "empty": ({"examples": {"x": X[:0]}}, "examples is empty"),
    "rows": ({"examples": ROWS}, r"examples is a list, .* Pass training.chats\(rows, tokenizer"),
    "other names": ({"held_out": {"x": X}}, "held_out has the arrays x, but examples has x, y"),
    "no loss": ({"loss": None}, "loss is missing, and your own arrays"),
    "rules is empty": ({"rules": None}, "rules is missing, and params has no adapter"),
    "lr": ({"lr": 0.0}, "lr=0.0 is out of range. Pass a positive learning rate"),
    "optimizer": ({"optimizer": "adam"}, "optimizer='adam' is unknown. .* adamw, lion, adafactor"),
    "decay": (
        {"optimizer": optax.sgd(1.0), "weight_decay": 0.1},
        "has no effect on your own optimizer",
    ),
    "steps": ({"steps": 0}, "steps=0 is out of range. Pass a number of at least 1"),
    "both": ({"steps": 2, "epochs": 1.0}, "steps and epochs both set the length"),
    "epochs": ({"epochs": -1.0}, "epochs=-1.0 is out of range. Pass a positive number"),
    "batch": ({"batch_size": 0}, "batch_size=0 is out of range. Pass a number of at least 1"),
    "resume": ({"resume": True}, "resume=True needs a run's folder"),
    "resume, overwrite": ({"resume": True, "overwrite": True}, "Remove one of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_before_any_work(case, monkeypatch):
    given, message = BAD[case]
    module = sys.modules["lora_jax.training.finetune"]  # whose name is the function's, too
    monkeypatch.setattr(module, "make_start", None)
    model, params = mlp()
    options = {"examples": ARRAYS, "rules": UP, "loss": of_mlp, "lr": 0.1, **given}
    with pytest.raises(training.TrainingError, match=message):
        training.finetune(model, params, options.pop("examples"), options.pop("rules"), **options)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(training.TrainingError, match="file/run cannot be written .Not a directory"):
        tuned(tmp_path / "file" / "run", 1)


def test_texts_have_their_classes_and_errors_in_the_words_of_python():
    rows = [{"text": "ab", "label": "x"}, {"text": "cde", "label": "y"}]
    made = training.texts(rows, tokenizer(None), seq_len=8)
    assert made.labels.tolist() == [0, 1] and made.attention_mask.sum(1).tolist() == [2, 3]
    swapped = training.texts(rows, tokenizer(None), names=["y", "x"], seq_len=8)
    assert swapped.labels.tolist() == [1, 0]
    with pytest.raises(
        training.TrainingError, match="row 1 has `text`.*Name the field with label.$"
    ):
        training.texts([{"text": "a"}], tokenizer(None))
    with pytest.raises(training.TrainingError, match="than seq_len=2. The longest text has 3 "):
        training.texts(rows, tokenizer(None), seq_len=2)
    with pytest.raises(training.TrainingError, match="the rows is empty"):
        training.chats([], tokenizer(), seq_len=8)


def test_sequences_longer_than_the_model_has_positions_are_refused():
    model, params = decoder(max_position_embeddings=16)
    rows = [{"prompt": "p" * 20, "completion": "c"}]
    examples = training.chats(rows, tokenizer(None), seq_len=64)
    with pytest.raises(
        training.TrainingError, match="has 2. tokens, but the model has only 16 positions"
    ):
        training.finetune(model, params, examples, RULES, lr=1e-3, steps=1)
