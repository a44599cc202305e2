"""Options that make no sense, runs that do not match, and folders that are taken."""

import itertools
import json
import re
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from lora_jax import LoraRule, TrainRule, lorafy, models, save_adapter
from lora_jax.models import DecoderConfig
from lora_jax.models.decoder.experts import EXPERTS
from lora_jax.models.layers.attend import ATTENTION
from lora_jax.models.layers.trunk import REMAT_POLICIES, policies_of_layers
from lora_jax.training.processes import write_json
from tests.models import tiny, tiny_encoders
from tests.train.tiny import CONFIG
from train import classify, sft
from train.console.errors import UserError
from train.options.common import Attention, Experts
from train.reporters.files import read_json
from train.run.output import begin, check_output
from train.run.pretrained import ModelInfo, read_model
from train.run.rules import rules
from train.settings.files import check_same_run, effective_options
from train.sft import check, parse, task_of
from train.tasks.sql import TASK as SQL


def outline(**config):
    """What the rules may ask of a model."""
    return ModelInfo("a model", None, SimpleNamespace(**config), {})


def decoder_outline():
    return ModelInfo(
        "a model", None, DecoderConfig.from_hf(CONFIG | {"tie_word_embeddings": False}), {}
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--batch-size 0", "--batch-size 0 is out of range. Pass a number of at least 1"),
        ("--grad-accum 0", "--grad-accum 0 is out of range. Pass a number of at least 1"),
        ("--steps 0", "--steps 0 is out of range. Pass a number of at least 1"),
        ("--rows 0", "--rows 0 is out of range. Pass a number of at least 1"),
        ("--seq-len 1", "--seq-len 1 leaves no token to predict"),
        ("--keep 0", "--keep 0 is out of range. Pass a number of at least 1"),
        ("--warmup -1", "--warmup -1 is out of range. Pass a number of at least 0"),
        ("--eval-questions -1", "--eval-questions -1 is out of range. Pass a number of at least 0"),
        ("--seed -1", "--seed -1 is out of range. Pass a number from 0 to 4294967295"),
        (
            "--seed 4294967296",
            "--seed 4294967296 is out of range. Pass a number from 0 to 4294967295",
        ),
        (
            "--weight-decay inf",
            "--weight-decay inf is out of range. Pass 0 or a positive finite number",
        ),
        ("--lr 0", "--lr 0.0 is out of range. Pass a positive learning rate"),
        ("--lr nan", "--lr nan is out of range. Pass a positive learning rate"),
        ("--grad-clip nan", "--grad-clip nan is out of range. Pass 0 or a positive finite number"),
        ("--loss-chunk -1", "--loss-chunk -1 is out of range. Pass a number of at least 0"),
        ("--steps 3 --epochs 1", "--steps and --epochs both set the length"),
        ("--epochs 0", "--epochs 0.0 is out of range. Pass a positive number"),
        ("--full --init-adapter x", "--full trains without an adapter"),
        ("--shuffle-schemas --dataset a.jsonl", "--shuffle-schemas only applies"),
        ("--resume --overwrite", "--overwrite deletes it"),
        ("--rank 0", "rank=0 must be an integer of at least 1"),
        ("--alpha 0", "alpha=0.0 must be a positive number"),
        ("--dropout 1", r"dropout=1.0 must be a probability in \[0, 1\)"),
        ("--targets (", r"targets='\(' is not a regular expression"),
        ("--targets", "targets is empty"),
        ("--lr 1e-3 --lr-rule llama", "both set the learning rate"),
        ("--lora-plus 0", "--lora-plus 0.0 is out of range. Pass a positive number"),
        ("--lora-plus 16 --freeze-a", "--freeze-a trains B alone"),
        ("--full --rank 16", "without an adapter. Remove --rank"),  # though it is the default
        ("--full --train-tokens=3", "without an adapter. Remove --train-tokens"),
        ("--full --lora-plus 16", "without an adapter. Remove --lora-plus"),
        ("--init-adapter x --rank 4 --train norm", "Remove --rank and --train.$"),
        ("--targets none --train norm --dora", "--targets none creates no adapter. Remove --dora"),
        ("--allow-base-mismatch", "no adapter is read. Remove --allow-base"),
        ("--heartbeat-timeout 90", "only one process. Remove --heartbeat-timeout"),
        ("--dataset a.jsonl --split test", "from a file, not from the hub. Remove --split"),
        ("--dataset a.jsonl --eval-questions 8", "only for --eval-every. Remove --eval-q"),
        (
            "--dataset a.jsonl --eval-dataset b.jsonl --eval-every 1 --eval-questions 8",
            "all of them are used. Remove --eval-questions",
        ),
        ("--targets none", "no parameter to train"),
        ("--peft-config x --rank 4", "--peft-config describes the whole adapter. Remove --rank"),
        (
            "--peft-config x --alpha 4",
            "--peft-config describes the whole adapter. Remove --alpha",
        ),
        ("--peft-config x --full", "without an adapter. Remove --peft-config"),
        ("--peft-config x --init-adapter y", "its own targets, rank and alpha. Remove --peft-c"),
        ("--dora --bias-on-b", "dora cannot be combined with bias_on_b"),
        ("--xs --vera", "xs cannot be combined with vera"),
        ("--xs --dora", "--xs takes A and B from the base .*Remove --dora"),
        (
            "--vera --init pissa --lora-plus 4",
            "--vera draws one A.*Remove --init and --lora-plus",
        ),
        ("--full --vera", "without an adapter. Remove --vera"),
        ("--u 13", "Without --tinylora.*Remove --u"),
        ("--xs --weight-tying 1", "Without --tinylora.*Remove --weight-tying"),
        ("--tinylora --u 0", "u=0 must be a number of at least 1"),
    ],
)
def test_options_that_make_no_sense(args, message):
    with pytest.raises(UserError, match=message):
        config = parse(args.split())
        check(config)
        rules(config.adapter)


@pytest.mark.parametrize(
    ("args", "targets"),
    [
        ("", "all-linear"),
        ("--targets q_proj v_proj", ("q_proj", "v_proj")),
        ("--targets self_attn/q_proj", ("self_attn/q_proj",)),
        ("--targets .*(q|k)_proj/kernel", ".*(q|k)_proj/kernel"),
        ("--full", ".*"),
    ],
)
def test_targets_are_names_or_one_expression(args, targets):
    config = parse(args.split())
    check(config)
    (rule,) = rules(config.adapter)
    assert rule.targets == targets


def test_the_default_is_the_sql_task_with_every_linear_layer():
    config = parse([])
    check(config)
    (rule,) = rules(config.adapter)
    assert task_of(config) is SQL and (rule.targets, rule.rank) == ("all-linear", 16)


def test_what_else_trains_comes_first():
    args = "--train norm lm_head --train-tokens 3 5 --bias all --dora --init pissa --rank 8"
    config = parse([*args.split(), "--divide-rank"])
    mixture = tiny.config(next(case for case in tiny.CASES if case.startswith("mixtral")))
    *others, experts, every = rules(config.adapter, ModelInfo("a model", None, mixture, {}))
    saved, tokens, biases = others
    assert (saved.targets, biases.targets) == (("norm", "lm_head"), ("bias",))
    assert tokens.rows == (3, 5)
    assert re.fullmatch(tokens.targets, "model/embed_tokens/embedding")
    assert (experts.targets, experts.rank, experts.scale) == (("experts",), 4, 10.0)
    assert (every.rank, every.scale, every.dora) == (8, 10.0, True)
    with pytest.raises(UserError, match="--divide-rank only applies to a mixture of experts"):
        rules(config.adapter, decoder_outline())


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (tiny_encoders.config(next(iter(tiny_encoders.GPT2S))), "transformer/wte/embedding"),
        (
            tiny_encoders.config(next(iter(tiny_encoders.ENCODERS))),
            "bert/embeddings/word_embeddings/embedding",
        ),
    ],
    ids=["gpt2", "bert"],
)
def test_tokens_train_in_their_own_table_not_in_those_of_positions(model, table):
    config = parse("--targets none --train-tokens 3 5".split())
    (rule,) = rules(config.adapter, ModelInfo("a model", None, model, {}))
    found = [path for path in models.kinds(model) if re.fullmatch(rule.targets, path)]
    assert found == [table]


def test_without_an_adapter_what_else_trains_trains_alone():
    config = parse("--targets none --bias all --train norm".split())
    check(config)
    assert [rule.targets for rule in rules(config.adapter)] == [("norm",), ("bias",)]


def test_a_peft_configuration_takes_the_place_of_the_options(tmp_path):
    path = tmp_path / "adapter_config.json"
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "lora_dropout": 0.1}
    fields |= {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"0.*q_proj": 2}}
    path.write_text(json.dumps({**fields, "modules_to_save": ["lm_head"]}))
    for given in (path, tmp_path):
        config = parse(["--peft-config", str(given)])
        check(config)
        assert rules(config.adapter) == []  # which modules those are, the model knows
        head, *adapted = rules(config.adapter, decoder_outline())
        assert isinstance(head, TrainRule)
        assert {(rule.rank, rule.alpha, rule.dropout) for rule in adapted} == {
            (4, 10, 0.1),
            (2, 10, 0.1),
        }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--peft-config .*adapter_config.json"),
        ("{", "--peft-config .*adapter_config.json"),
        (
            '{"peft_type": "IA3"}',
            "peft_type is 'IA3', but lora_jax supports only LORA, VERA, TINYLORA",
        ),
        ('{"r": 0}', "--peft-config .*r"),
        ('{"r": 4, "unheard_of": 1}', "unheard_of=1 is not known"),
    ],
)
def test_a_peft_configuration_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "adapter_config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        rules(parse(["--peft-config", str(path)]).adapter)


@pytest.mark.parametrize(
    ("args", "name", "policy"),
    [
        ("", None, False),
        ("--remat auto", "auto", None),
        ("--remat none", "none", False),
        ("--remat", "full", True),
        ("--remat --rank 4", "full", True),
        ("--remat full", "full", True),
        ("--remat products:7", "products:7", "products:7"),
        ("--remat dots_saveable", "dots_saveable", "dots_saveable"),
        ("--remat dots_with_no_batch_dims_saveable", *["dots_with_no_batch_dims_saveable"] * 2),
    ],
)
@pytest.mark.parametrize("parsed", [parse, classify.parse])
def test_what_is_recomputed_by_its_name(parsed, args, name, policy):
    optim = parsed(args.split()).optim
    assert optim.remat == name
    assert name == "auto" or optim.remat_policy == policy
    if isinstance(policy, str):
        assert policy in REMAT_POLICIES or policies_of_layers(policy, 8)


@pytest.mark.parametrize("parsed", [parse, classify.parse])
def test_an_implementation_by_its_name(parsed):
    assert (get_args(Attention), get_args(Experts)) == (ATTENTION, EXPERTS)
    auto = parsed([]).optim
    assert auto.attention == auto.experts == "auto"
    for attention, experts in itertools.zip_longest(ATTENTION, EXPERTS, fillvalue="auto"):
        optim = parsed(["--attention", attention, "--experts", experts]).optim
        assert (optim.attention, optim.experts) == (attention, experts)


def test_implementations_reach_the_model(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "train.run.pretrained.from_pretrained", lambda *args, **options: given.append(options)
    )
    monkeypatch.setattr("train.run.pretrained.models.fetch", lambda name: None)
    asked = {"attention": "blockwise", "experts": "ragged"}
    read_model("a model", dtype="float32", **asked)
    assert given[0].items() >= asked.items()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--attention flesh", ["flesh", "--attention", *ATTENTION]),
        ("--experts gmm", ["gmm", "--experts", *EXPERTS]),
        ("--remat dots", ["dots", "--remat", "none", "full", "dots_saveable"]),
        ("--remat full:3", ["full:3", "--remat", "or products:N with a number of layers"]),
        ("--remat products:0", ["products:0", "--remat", "products:N"]),
        ("--remat full none", ["--remat", "one policy, but got full none"]),
    ],
)
def test_another_name_is_refused_by_those_that_are(args, words):
    with pytest.raises(UserError) as caught:
        parse(args.split())
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_a_resumed_run_keeps_its_options_but_for_length_and_reports(tmp_path):
    saved = effective_options(parse(["--rank", "4", "--layers", "1", "2"]))
    same = "--rank 4 --layers 1 2 --steps 9 --keep 3 --log-every 2 --resume --eval-questions 0"
    check_same_run(parse(same.split()), saved, tmp_path)
    older = {name: value for name, value in saved.items() if name != "loss"}
    check_same_run(parse(same.split()), older, tmp_path)
    with pytest.raises(UserError, match="--loss was cross-entropy and is now dft"):
        check_same_run(parse([*same.split(), "--loss", "dft"]), older, tmp_path)
    with pytest.raises(UserError) as caught:
        check_same_run(parse("--rank 8 --lr 1e-4 --resume".split()), saved, tmp_path)
    message = str(caught.value)
    assert "--rank was 4 and is now 8" in message
    assert "--lr was 0.001 and is now 0.0001" in message
    assert "--layers was 1 2 and is now none" in message
    assert "steps" not in message


def options(folder, *args):
    return parse(["--output", str(folder), *args])


def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path):
    folder = tmp_path / "run"
    assert check_output(options(folder)) == folder
    begin(folder, options(folder), "train.sft", {"resolved": {}})
    (folder / "notes.txt").write_text("mine")
    check_output(options(folder))  # it was stopped before its first step
    (folder / "adapter").mkdir()
    with pytest.raises(UserError, match="run already contains a run. Continue it with --resume"):
        check_output(options(folder))
    check_output(options(folder, "--resume"))
    with pytest.raises(UserError, match="--seed was 0 and is now 1"):
        check_output(options(folder, "--resume", "--seed", "1"))
    check_output(options(folder, "--overwrite"))
    assert (folder / "adapter").exists()  # nothing goes before all checks have passed
    begin(folder, options(folder, "--overwrite"), "train.sft", {})
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.yaml", "facts.json", "notes.txt")
    ]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match="there is no run in .*config.yaml is missing"):
        check_output(options(tmp_path / "nothing", "--resume"))
    (tmp_path / "config.yaml").write_text("rank: [")
    with pytest.raises(UserError, match="config.yaml is damaged.*line 1 is not valid YAML"):
        check_output(options(tmp_path, "--resume"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        check_output(options(tmp_path / "file" / "run"))


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "ü"})
    assert json.loads(path.read_text()) == {"a": "ü"} == read_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    assert read_json(path) == {} == read_json(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("args", "alpha", "lr", "beta2"),
    [
        ("", 160, 1e-3, 0.99),
        ("--rank 4", 40, 1e-3, 0.99),
        ("--full", 160, 1e-4, 0.99),
        ("--dataset rows.jsonl", 32, 2e-4, 0.999),
        ("--dataset rows.jsonl --full", 32, 2e-5, 0.999),
        ("--alpha 3 --lr 0.5 --beta2 0.9", 3, 0.5, 0.9),
    ],
)
def test_defaults_that_depend_on_the_task(args, alpha, lr, beta2):
    config = parse(args.split())
    assert config.adapter.alpha == alpha
    assert (config.optim.lr, config.optim.beta2) == (pytest.approx(lr), beta2)


def test_the_model_is_the_base_of_the_adapter_to_go_on_from(tmp_path):
    params = {"w": np.ones((5, 7), np.float32)}
    tree = lorafy(params, [LoraRule(targets=["w"], rank=2)])
    save_adapter(tmp_path / "adapter", tree, about={"model": "owner/name"})
    args = ["--init-adapter", str(tmp_path / "adapter")]
    assert parse(args).data.model == "owner/name"
    assert parse([*args, "--model", "other/name"]).data.model == "other/name"
    assert parse([]).data.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    save_adapter(tmp_path / "unnamed", tree)
    assert parse(["--init-adapter", str(tmp_path / "unnamed")]).data.model == parse([]).data.model


@pytest.mark.parametrize("script", [sft, classify], ids=lambda module: module.__name__)
def test_a_folder_that_is_no_adapter_to_go_on_from_is_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--init-adapter", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"error: --init-adapter {tmp_path} holds no adapter")
