"""The scripts on a model of no family of ours, which runs as transformers' torch module."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.torch.checks import distance
from tests.train.tiny import CONFIG, tokenizer, write_jsonl, write_rows

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers")

from train.dpo import main as dpo  # noqa: E402
from train.export.__main__ import main as export  # noqa: E402
from train.generate.__main__ import main as generate  # noqa: E402
from train.grpo import main as grpo  # noqa: E402
from train.plan.__main__ import main as plan  # noqa: E402
from train.run.log import read_metrics  # noqa: E402
from train.serve.__main__ import main as serve  # noqa: E402
from train.sft import main as sft  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 255, (2, 9)).astype(np.int32)


def write(folder, model_type):
    """Writes a tiny random model of a type, with a tokenizer of bytes."""
    fields = CONFIG | {"model_type": model_type}
    config = transformers.CONFIG_MAPPING[model_type].from_dict(fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Starcoder 2, its rows, and the folder of a run of four steps over it."""
    folder = tmp_path_factory.mktemp("torch")
    base, rows = write(folder / "base", "starcoder2"), write_rows(folder / "rows.jsonl")
    options = ["--rank", "2", "--alpha", "20", "--batch-size", "4", "--lr", "0.05", "--steps", "4"]
    inputs = ["--model", str(base), "--dataset", str(rows)]
    sft([*inputs, *options, "--packing", "--output", str(folder / "run")])
    return base, inputs, folder / "run"


def trained(base, folder, kind):
    """The logits of torch with what was exported."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder if kind == "merged" else base)
    if kind == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def test_a_run_says_how_its_model_runs_and_is_exported(run, tmp_path, capsys):
    base, inputs, folder = run
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]
    export(["--adapter", str(folder), "--output", str(tmp_path / "peft")])
    export(["--adapter", str(folder), "--merged", "--output", str(tmp_path / "merged")])
    by_peft, by_file = (
        trained(base, tmp_path / "peft", "peft"),
        trained(base, tmp_path / "merged", "merged"),
    )
    assert distance(by_peft, by_file) <= 1e-5
    assert distance(by_peft, trained(base, base, "merged")) > 1e-2

    from lora_jax.torch import from_torch

    model, params = from_torch(base)
    tree = lp.load(tmp_path / "peft", model, params)
    assert distance(jax.jit(models_apply(model))(tree), by_peft) <= 1e-5
    model, params = from_torch(tmp_path / "merged")
    assert distance(jax.jit(model)(params, IDS), by_peft) <= 1e-5


def models_apply(model):
    forward = lj.adapt(model.apply)
    return lambda tree: forward({"params": tree}, IDS)


def test_answers_are_those_of_transformers(run, tmp_path, capsys):
    base, _, folder = run
    options = ["--adapter", str(folder), "--prompt", "3 plus 21?", "--max-new-tokens", "5"]
    generate([*options, "--output", str(tmp_path / "answers.jsonl")])
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    export(["--adapter", str(folder), "--merged", "--output", str(tmp_path / "merged")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    reader = tokenizer()
    ids = reader.apply_chat_template(
        [{"role": "user", "content": "3 plus 21?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    drawn = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert reader.decode(drawn, skip_special_tokens=True).strip() in json.dumps(answer)


def test_a_run_is_planned_and_a_server_refuses(run, capsys, tmp_path):
    base, _, _ = run
    capsys.readouterr()
    plan(
        [
            "--model",
            str(base / "config.json"),
            *"--seq-len 16 --batch-size 2 --json --alone".split(),
        ]
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"].endswith("config.json") and facts["batch_size"] == 2
    with pytest.raises(SystemExit):
        plan(["--model", str(base / "config.json"), "--decode-rows", "2"])
    assert "--decode-rows 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serve(["--model", str(base), "--output", str(tmp_path / "served")])
    assert "runs as a torch module" in capsys.readouterr().err


REWARD = """
def early(completion_ids, **others):
    return [sum(id < 90 for id in ids) / len(ids) for ids in completion_ids]
"""


def test_completions_are_drawn_as_by_our_own_code(tmp_path, capsys):
    """Keys and values are kept; a model that keeps none draws no completions."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * (1 + i)} for i in range(4)])
    (tmp_path / "rewards.py").write_text(REWARD)
    line = ["--dataset", tmp_path / "rows.jsonl", "--reward", f"{tmp_path}/rewards.py:early"]
    line += "--group 4 --batch-size 16 --max-new-tokens 6 --seq-len 64 --steps 2".split()
    line += "--eval-questions 0 --warmup 1 --lr 0.05 --targets q_proj v_proj".split()
    base, metrics = write(tmp_path / "base", "llama"), []
    for code in ("ours", "torch"):
        out = tmp_path / code
        grpo([*map(str, (*line, "--model", base, "--model-code", code, "--output", out))])
        metrics.append([[x[k] for k in ("reward", "loss", "length")] for x in read_metrics(out)])
    np.testing.assert_allclose(metrics[0], metrics[1], rtol=1e-4, atol=1e-5)
    assert np.shape(metrics[0]) == (2, 3) and len({reward for reward, *_ in metrics[0]}) == 2
    base = write(tmp_path / "mamba", "falcon_mamba")
    with pytest.raises(SystemExit):
        grpo([*map(str, (*line, "--model", base, "--output", tmp_path / "refused"))])
    assert "does not cache keys and values" in " ".join(capsys.readouterr().err.split())


def test_torch_code_trains_a_family_of_ours_alike(tmp_path):
    base, rows = write(tmp_path / "base", "llama"), write_rows(tmp_path / "rows.jsonl")
    adapters = []
    for code in ("ours", "torch"):
        out = tmp_path / code
        sft(
            ["--model", str(base), "--dataset", str(rows), "--output", str(out), "--rank", "2"]
            + ["--steps", "3", "--batch-size", "4", "--lr", "1e-3", "--model-code", code]
        )
        model, params = models.from_pretrained(base)
        adapters.append(lj.split(lj.load_adapter(out / "adapter", params))[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), *adapters)


@pytest.mark.parametrize("kind", ["rwkv", "falcon_mamba"])
def test_a_model_that_cannot_pack_trains_on_rows_of_one_sequence(kind, tmp_path, capsys):
    """The first step's loss is torch's of each row alone; packed rows and pairs are refused."""
    texts = ["abcdefg"[: 3 + i] * 4 for i in range(4)]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    base = write(tmp_path / "base", kind)
    line = ["--model", base, "--dataset", rows, "--output", tmp_path / "run"]
    line += "--batch-size 4 --steps 2 --rank 2 --lr 0.05".split()
    sft([*map(str, line)])
    first, second = (metrics["loss"] for metrics in read_metrics(tmp_path / "run"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    reader, sums, count = tokenizer(), 0.0, 0
    for text in texts:
        ids = torch.tensor([[*reader(text)["input_ids"], reader.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        sums += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert abs(first - sums / count) <= 1e-5 * first
    assert second < first
    pairs = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in texts]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    line[5] = tmp_path / "refused"
    for script, options in ((sft, ["--packing"]), (dpo, ["--dataset", pairs])):
        with pytest.raises(SystemExit):
            script([*map(str, [*line, *options])])
        assert "would attend to each other" in " ".join(capsys.readouterr().err.split())
