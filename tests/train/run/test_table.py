"""The file of --many: one table in four kinds of file, and what is refused, by row and column."""

import json

import pytest

from train import sft
from train.console.errors import UserError
from train.options.scripts.sft import Config
from train.settings.command import read_line
from train.settings.table import read_table
from train.sft import SCRIPT

CSV = """name,rank,lr,targets,dropout,steps,schedule,eval-dataset
small,2,1e-3,q_proj v_proj,0.1,7,,
large one,16,2,,0,,constant,"a, b.jsonl"
"""
ROWS = [
    {"name": "small", "rank": 2, "lr": 1e-3, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
    | {"steps": 7},
    {"name": "large one", "rank": 16, "lr": 2, "dropout": 0, "schedule": "constant"}
    | {"eval-dataset": "a, b.jsonl"},
]
YAML = """
- name: small
  rank: 2
  lr: 1e-3
  targets: [q_proj, v_proj]
  dropout: 0.1
  steps: 7
- {name: large one, rank: 16, lr: 2, dropout: 0, schedule: constant, eval-dataset: "a, b.jsonl"}
"""


def read(path, *args):
    config, on_line, in_file = read_line(Config(), ["--many", str(path), *args], "train.sft")
    return read_table(config, Config(), on_line | in_file.keys())


def table(folder, text, ending=".csv"):
    path = folder / f"table{ending}"
    path.write_text(text)
    return path


def test_the_kinds_of_file_say_the_same(tmp_path):
    texts = {".csv": CSV, ".jsonl": "\n".join(map(json.dumps, ROWS)), ".json": json.dumps(ROWS)}
    texts |= {".yaml": YAML, ".tsv": CSV.replace(",", "\t").replace("a\t", "a,")}
    line = ("--epochs", "2", "--alpha", "9", "--output", str(tmp_path / "out"), "--resume")
    found = {kind: read(table(tmp_path, text, kind), *line) for kind, text in texts.items()}
    (small, large) = found[".csv"]
    for rows in found.values():
        for row, expected in zip(rows, (small, large), strict=True):
            assert row.name == expected.name and row.given == expected.given
            many = expected.options.run.many
            assert str(row.options).replace(row.options.run.many, many) == str(expected.options)
    assert small.options.adapter.targets == ("q_proj", "v_proj")
    assert (small.options.adapter.rank, small.options.adapter.alpha) == (2, 9.0)
    assert large.options.optim.lr == 2.0 and large.options.data.eval_dataset == "a, b.jsonl"
    # Of two that exclude each other, the row's counts.
    assert (small.options.optim.steps, small.options.optim.epochs) == (7, None)
    assert (large.options.optim.steps, large.options.optim.epochs) == (None, 2.0)
    assert large.options.run.output == str(tmp_path / "out" / "large one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,rank\na,2\n,3\n", "line 3: `name` is missing"),
        ("name,rank\na,2\nA,3\n", "line 3: name is 'A', as in line 2"),
        ("name,rank\na/b,2\n", "line 2: name is 'a/b', which is not a valid name of a folder"),
        ("name,rank\n..,2\n", "name is '..', which is not a valid name"),
        ("name,rnak\na,2\n", "line 2: There is no option rnak. The nearest option is rank"),
        ("name,rank\na,two\n", "line 2: rank is two. Write a whole number"),
        ("name,schedule\na,flat\n", "schedule is flat. Write one of "),
        (
            "name,model\na,b\n",
            "model cannot differ between rows, because all runs of a table share one b",
        ),
        ("name,quantize\na,nf4\n", "quantize cannot differ .* --quantize on the command line"),
        ("name,mesh\na,data=2\n", "mesh cannot differ .* one process"),
        ("name,output\na,b\n", "output cannot differ"),
        ("name,full\na,true\n", "line 2: --full trains the base itself"),
        ("name,tinylora,weight_tying\na,true,1\n", "line 2: --weight-tying trains one vector"),
        ("name,report_to\na,wandb\n", "--report-to wandb keeps only one run per process"),
        ("name,optimizer,beta2\na,sgd,0.9\n", "line 2: --optimizer sgd does not .* --beta2"),
        ("name,rank\n", "has no rows"),
        ("name,rank\na,2,3\n", "line 2 has 3 fields, but the header has 2"),
    ],
)
def test_what_is_refused_names_row_and_column(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(table(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,batch_size\na,4\nb,0\n",
            "line 3: --batch-size 0 is out of range. Pass a number of at least 1",
        ),
        ("name,steps,epochs\na,4,2\n", "line 2: --steps and --epochs both set the length"),
        ("name,init_adapter\na,nowhere\n", "line 2: --init-adapter nowhere"),
    ],
)
def test_rows_are_checked_as_a_command_line(tmp_path, text, message):
    rows = read(table(tmp_path, text), "--dataset", "rows.jsonl")
    with pytest.raises(UserError, match=message):
        SCRIPT.asked_for(rows)


def test_the_command_line_of_a_table(tmp_path):
    path = table(tmp_path, "name,optimizer\na,adamw\nb,sgd\n")
    (a, b) = read(path, "--beta2", "0.9", "--lr", "1")  # has an effect in a row
    assert (a.options.optim.beta2, b.options.optim.lr) == (0.9, 1.0)
    path = table(tmp_path, "name,optimizer\na,lion\nb,sgd\n")
    with pytest.raises(UserError, match="does not use this option. Remove --eps"):
        read(path, "--eps", "1e-6")
    with pytest.raises(UserError, match="--dry-run is for a single run"):
        read(path, "--dry-run")
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="unknown file type"):
        read(tmp_path)
    for text, message in (("rank: 2", "is not a list of runs"), ("- 3", "line 1 has no options")):
        with pytest.raises(UserError, match=message):
            read(table(tmp_path, text, ".yaml"))


def test_a_row_whose_data_are_missing_ends_all_before_the_model_is_read(tmp_path, capsys):
    path = table(tmp_path, f"name,dataset\na,{tmp_path}/none.jsonl\n")
    with pytest.raises(SystemExit) as caught:
        sft.main(["--many", str(path), "--output", str(tmp_path / "out"), "--steps", "1"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"--many {path}, line 2: --dataset {tmp_path}/none.jsonl does not exist" in message
