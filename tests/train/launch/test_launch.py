"""Files for schedulers: their fields, and their commands in two processes under their variables."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from tests.support import THOROUGH, thorough
from tests.surroundings import WITHOUT_TORCH
from tests.train.tiny import write_jsonl, write_model
from train.console.errors import UserError
from train.launch.__main__ import FILES, launch_file, main, resume_option
from train.processes.hosts import _is_alone_on_its_host
from train.run.log import read_metrics

LINE = ["sft", "--model", "a model", "--dataset", "x.jsonl", "--output", "out dir", "--rank", "3"]


@pytest.mark.parametrize("kind", FILES)
def test_the_command_line_is_filled_in(kind):
    text = launch_file([kind, *LINE])
    assert "OUTPUT='out dir'" in text
    assert "COMMAND=(lora-jax sft --model 'a model' --dataset x.jsonl --rank 3)\n" in text
    assert text.count("COMMAND=") == text.count("OUTPUT=") == 1
    assert "/shared/runs/mine" in launch_file([kind, *LINE[:5]])  # the file's own
    assert "OUTPUT=b\n" in launch_file([kind, *LINE[:5], "--output=b"]).replace("  #", "\n")


def test_a_file_of_options_names_the_output_as_well(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: m\ndataset: x.jsonl\noutput: /shared/of-file\nresume: false\n")
    text = launch_file(["slurm", "sft", "--config", str(config)])
    assert "OUTPUT=/shared/of-file  #" in text and f"(lora-jax sft --config {config})" in text
    config.write_text("resume: true\n")
    with pytest.raises(UserError, match="--resume cannot be used here"):
        launch_file(["slurm", "sft", "--config", str(config)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm"], r"a scheduler .* and a script"),
        (["pbs", *LINE], r"a scheduler \(slurm, jobset, skypilot\)"),
        (["slurm", "serve"], r"a script \(sft, dpo"),
        (["slurm", *LINE, "--resume"], "--resume cannot be used here"),
        (["jobset", *LINE, "--coordinator", "a:1"], "--coordinator cannot be used here"),
        (["slurm", *LINE, "--many", "runs.csv"], "--many cannot be used here"),
        (["jobset", *LINE, "--num-train-epochs", "1"], "--epochs"),
    ],
)
def test_what_the_file_cannot_start_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        launch_file(words)


def test_the_files_ask_whether_there_is_a_run(tmp_path, capsys):
    for said in ("", "--resume"):
        main(["resume", str(tmp_path)])
        assert capsys.readouterr().out.strip() == said
        (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="takes one argument, the output folder"):
        resume_option([])


def test_it_prints_the_file_and_its_help(capsys):
    main(["slurm", *LINE])
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    main(["--help"])
    assert "{slurm,jobset,skypilot}" in capsys.readouterr().out


def test_the_directives_of_slurm():
    text = launch_file(["slurm", *LINE])
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert directives["signal"] == "TERM@60" and "requeue" in directives
    assert directives["ntasks-per-node"] == "1" and directives["open-mode"] == "append"
    # Slurm reads none after the first command.
    assert text.rindex("#SBATCH") < text.index("OUTPUT=")


def shell_of(kind, text):
    """The shell's commands of a file, as the scheduler hands them over."""
    if kind == "slurm":
        return text
    asked = yaml.safe_load(text)
    if kind == "skypilot":
        return asked["run"]
    (job,) = asked["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/bash", "-c"]
    return container["args"][0]


@pytest.mark.parametrize("kind", FILES)
def test_the_shell_of_each_file_is_whole(kind):
    text = shell_of(kind, launch_file([kind, *LINE]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["bash", "-n"], input=text + "if", text=True, check=True)


def test_the_fields_of_a_jobset():
    asked = yaml.safe_load(launch_file(["jobset", *LINE]))
    assert (asked["apiVersion"], asked["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, (workers,) = asked["metadata"]["name"], asked["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    # JobSet's names of pods; and as many as the processes count.
    assert variables["COORDINATOR"].split(":")[0] == f"{name}-{workers['name']}-0-0.{name}"
    assert int(variables["NODES"]) == job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert {one["name"] for one in container["volumeMounts"]} == {
        one["name"] for one in pod["volumes"]
    }


def test_a_process_alone_on_its_host_has_all_of_its_gpus():
    for tasks, alone in {
        "1": True,
        "1(x4)": True,
        "8(x2)": False,
        "1,2": False,
        "11": False,
    }.items():
        assert _is_alone_on_its_host({"SLURM_STEP_TASKS_PER_NODE": tasks}) is alone
    assert _is_alone_on_its_host({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert not _is_alone_on_its_host({})
    named = {"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert not _is_alone_on_its_host(named)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, rows, and the programs that the files call."""
    folder = tmp_path_factory.mktemp("cluster")
    write_model(folder / "model")
    write_jsonl(
        folder / "rows.jsonl", [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(8)]
    )
    start = "import sys; sys.argv[0] = 'lora-jax'; from lora_jax.__main__ import main; main()"
    programs = {
        "lora-jax": f'#!/bin/bash\nexec "{sys.executable}" -P -c "{start}" "$@"\n',
        "scontrol": '#!/bin/bash\necho "$@" >> scontrol.log\n',
        # Two tasks on hosts of one task each, which both are this one.
        "srun": textwrap.dedent("""\
            #!/bin/bash
            shift  # its own option
            export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost,other
            export SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_LOCALID=0
            SLURM_PROCID=0 "$@" & FIRST=$!
            SLURM_PROCID=1 "$@" & SECOND=$!
            echo "$SECOND" > second.pid
            wait "$FIRST"; CODE=$?
            wait "$SECOND"; OTHER=$?
            exit $((CODE > OTHER ? CODE : OTHER))
            """),
    }
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def options_of(output, steps):
    line = f"sft --model model --dataset rows.jsonl --output {output} --steps {steps} --rank 2"
    line += " --batch-size 4 --seq-len 32 --report-to none --save-every 50"
    return line.split()


def start(folder, text, **variables):
    env = os.environ | {"PYTHONPATH": WITHOUT_TORCH, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-c", text],
        cwd=folder,
        env=env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(folder):
    return [line["step"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.slow
def test_a_job_of_slurm_saves_queues_again_and_goes_on(folder):
    text = launch_file(["slurm", *options_of("slurm", 4000)])
    variables = {"SLURM_JOB_ID": str(free_port() - (65535 - 2**12 + 1) + 2**13)}
    job = start(folder, text, **variables)
    until = time.monotonic() + 300
    while not (folder / "slurm").is_dir() or len(steps_of(folder / "slurm")) < 3:
        assert job.poll() is None and time.monotonic() < until, job.communicate()[0]
        time.sleep(0.2)
    # As Slurm does, 60 s before the limit; one process tells the other.
    os.kill(int((folder / "second.pid").read_text()), signal.SIGTERM)
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 143, output
    assert (folder / "scontrol.log").read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    done = steps_of(folder / "slurm")[-1]
    again = start(folder, text.replace("--steps 4000", f"--steps {done + 2}"), **variables)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert steps_of(folder / "slurm") == [*range(1, done + 3)]
    assert (folder / "scontrol.log").read_text().count("requeue") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", pytest.param("skypilot", marks=thorough)])
def test_two_nodes_find_each_other_and_go_on(kind, folder):
    port = str(free_port())
    shared = {"jobset": {"COORDINATOR": f"127.0.0.1:{port}", "NODES": "2"}}
    shared["skypilot"] = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "PORT": port}
    shared["skypilot"] |= {"SKYPILOT_NUM_NODES": "2"}
    number = {"jobset": "JOB_COMPLETION_INDEX", "skypilot": "SKYPILOT_NODE_RANK"}[kind]
    # A second call goes on with the first one's run, as that of Slurm's file does.
    for steps in (2, 3) if THOROUGH else (2,):
        text = shell_of(kind, launch_file([kind, *options_of(kind, steps)]))
        nodes = [start(folder, text, **shared[kind], **{number: str(i)}) for i in range(2)]
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert steps_of(folder / kind) == [*range(1, steps + 1)]
        # Only the first of two that have found each other logs.
        assert "loss" in outputs[0] and "loss" not in outputs[1]
