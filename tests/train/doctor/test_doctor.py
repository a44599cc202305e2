"""`lora-jax doctor`: what is wrong, what to do, and nothing that is secret."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.train.tiny import write_model
from train.doctor import __main__ as doctor_command
from train.doctor import hub, packages, storage
from train.doctor.__main__ import main
from train.doctor.devices import (
    ChildEnding,
    Circumstances,
    describe,
    describe_kernels,
    diagnose,
    run_module,
)
from train.doctor.hardware import Hardware, find_hardware
from train.doctor.troubles import DoctorReport, Trouble

ROOT = Path(__file__).parents[3]
VERSIONS = {"jax": "0.12.0", "jaxlib": "0.12.0"}
CPU = {"platform": "cpu", "kind": "cpu", "count": 2, "of_all_processes": 2, "memory": 2**30}
GPU = CPU | {"platform": "gpu", "kind": "NVIDIA H100", "attention": "flash"}
PLUGIN = VERSIONS | {"jax-cuda13-plugin": "0.12.0"}
LIBTPU = VERSIONS | {"libtpu": "0.0.52"}


def ended(found=None, errors="", code=0):
    output = "" if found is None else "a line of a plugin's\n" + json.dumps(found) + "\n"
    return ChildEnding(output, errors, code)


def circumstances(hardware=None, versions=VERSIONS, ending=None, **variables):
    return Circumstances(hardware or Hardware(), versions, variables, ending or ended(CPU))


NVIDIA = Hardware(nvidia=True, driver="580.65.06")
TPU = Hardware(tpus=4)
CASES = {
    "all well on a CPU": (circumstances(), None),
    "all well on a GPU": (circumstances(NVIDIA, PLUGIN, ended(GPU)), None),
    "no plugin": (circumstances(NVIDIA), (True, "plugin for it is not", "lora_jax[cuda13]")),
    "no plugin, older driver": (
        circumstances(Hardware(nvidia=True, driver="550.1")),
        (True, "plugin for it is not", "lora_jax[cuda12]"),
    ),
    "a driver too old": (
        circumstances(Hardware(nvidia=True, driver="470.2"), PLUGIN),
        (True, "driver 470.2 is older", "update the driver to 525"),
    ),
    "a driver too old for the plugin": (
        circumstances(Hardware(nvidia=True, driver="550.1"), PLUGIN),
        (True, "than JAX's plugin for cuda13 needs, 580", "lora_jax[cuda12]"),
    ),
    "hidden": (
        circumstances(NVIDIA, PLUGIN, CUDA_VISIBLE_DEVICES=""),
        (True, "CUDA_VISIBLE_DEVICES hides", "unset it"),
    ),
    "another CUDA": (
        circumstances(
            *(NVIDIA, PLUGIN, ended(CPU, "x\nUnable to load cuSPARSE: old\n")),
            LD_LIBRARY_PATH="/usr/local/cuda-11/lib64",
        ),
        (True, "(Unable to load cuSPARSE: old)", "unset LD_LIBRARY_PATH"),
    ),
    "kept on the CPU": (
        circumstances(NVIDIA, PLUGIN, JAX_PLATFORMS="cpu"),
        (False, "JAX_PLATFORMS=cpu keeps JAX from the GPU", "unset it"),
    ),
    "a plugin without a GPU": (
        circumstances(None, PLUGIN),
        (False, "shows no NVIDIA", "--gpus all"),
    ),
    "platforms that are not there": (
        circumstances(None, PLUGIN, ended(None, "E: no cuda\n", 1), JAX_PLATFORMS="cuda"),
        (True, "JAX_PLATFORMS=cuda allows", "unset JAX_PLATFORMS"),
    ),
    "no kernel": (
        circumstances(NVIDIA, PLUGIN, ended(GPU | {"flash_missing": "JAX compiles none"})),
        (False, "JAX compiles none", "lora_jax[gpu-kernels]"),
    ),
    "no libtpu": (circumstances(TPU), (True, "libtpu, its driver", 'install "jax[tpu]"')),
    "held": (
        circumstances(Hardware(tpus=4, tpu_holders=(77,)), LIBTPU),
        (True, "process 77 holds the TPU", "kill 77"),
    ),
    "locked": (
        circumstances(TPU, LIBTPU, ended(None, "see /tmp/libtpu_lockfile\n", 1)),
        (True, "another process holds the TPU", "rm /tmp/libtpu_lockfile"),
    ),
    "waiting": (
        circumstances(TPU, LIBTPU, ended(code=None)),
        (True, "did not find its devices within", "all of them at once"),
    ),
    "another jaxlib": (
        circumstances(None, VERSIONS, ended(None, "jaxlib version 2 is newer, incompatible", 1)),
        (True, "incompatible", "pip install -U jax jaxlib"),
    ),
    "no JAX": (
        circumstances(None, {}, ended(None, "ModuleNotFoundError: No module named 'flax.x'", 1)),
        (True, "flax is not installed", "lora_jax[train]"),
    ),
    "killed": (
        circumstances(None, VERSIONS, ended(None, "", -11)),
        (True, "it ended with code -11", "JAX_PLATFORMS=cpu"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_trouble_has_a_reason_and_a_remedy(case):
    now, expected = CASES[case]
    troubles = diagnose(now)
    if expected is None:
        assert troubles == []
    else:
        (trouble,) = troubles
        fatal, what, remedy = expected
        assert what in trouble.what and remedy in trouble.remedy and trouble.fatal is fatal


def test_devices_and_kernels_are_named():
    held = Hardware(nvidia=True, driver="580.65.06", cards=("H100 (80 GiB, 2 used)",))
    found = GPU | {"flash_compiled_by": "jax_triton", "experts": "blocks", "of_all_processes": 16}
    now = circumstances(held, PLUGIN, ended(found), XLA_FLAGS="--xla_x")
    report = DoctorReport()
    report.add("devices", describe(now), [])
    report.add("attention", describe_kernels(now), [])
    text = " ".join(report.text().split())
    for part in ("2 × NVIDIA H100", "of all processes 16", "580.65.06", "XLA_FLAGS=--xla_x"):
        assert part in text
    assert "2,048 tokens flash; flash compiled by jax_triton" in text
    assert report.exit_code == 0 and text.endswith("nothing is wrong")


def test_the_systems_devices_are_found(tmp_path):
    assert find_hardware(tmp_path) == Hardware()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  575.57.08  Release Build\n")
    for name, device in {"a": "0x0063", "b": "0x0063", "c": "0x001f"}.items():
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")
    fds = tmp_path / "proc/4321/fd"
    fds.mkdir(parents=True)
    (fds / "3").symlink_to("/dev/vfio/0")
    (fds / "4").symlink_to("/dev/null")
    expected = Hardware(nvidia=True, driver="575.57.08", tpus=2, tpu_holders=(4321,))
    assert find_hardware(tmp_path) == expected


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    lines = ["jax>=0.10", "tyro>=0.9; extra == 'train'", 'mine[models]; extra == "train"']
    lines += ["gguf>=999; extra == 'models'", "no-such-package>=1", "wandb; extra == 'wandb'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    (trouble,) = packages.requirement_troubles("mine")
    assert "gguf>=999 (0." in trouble.what and "no-such-package>=1 (not inst" in trouble.what
    assert "jax" not in trouble.what and "wandb" not in trouble.what
    assert trouble.remedy == 'pip install "mine[train]"'
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines[:2])
    assert packages.requirement_troubles("mine") == []
    monkeypatch.setitem(sys.modules, "packaging", None)  # as in a new environment
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (trouble,) = packages.requirement_troubles("mine")
    assert "packaging (not installed)" in trouble.what


def test_plugins_of_another_jaxlib_or_of_two_cudas_are_named():
    assert packages.plugin_troubles(PLUGIN) == []
    (trouble,) = packages.plugin_troubles(PLUGIN | {"jaxlib": "0.11.2", "jax": "0.11.2"})
    assert "0.12.0 is not of jaxlib 0.11.2" in trouble.what
    assert trouble.remedy == 'pip install -U "jax[cuda13]==0.11.2"'
    (trouble,) = packages.plugin_troubles(PLUGIN | {"jax-cuda12-plugin": "0.12.0"})
    assert "both installed" in trouble.what


@pytest.fixture
def endpoint():
    """A hub that answers by the token, and the tokens that it was given."""
    seen = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            if self.path.startswith("/slow"):
                time.sleep(1.5)
            self.send_response(401 if "hf_old" in str(seen[-1]) else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join()


def examine(address, seconds=60, **variables):
    settings = {"HF_ENDPOINT": address, "HF_HOME": "/nowhere", "no_proxy": "*"}
    return hub.examine_hub(settings | variables, seconds)


def test_the_hub_is_asked_with_the_users_token(endpoint, tmp_path):
    address, seen = endpoint
    facts, troubles = examine(address)
    assert (facts["answers"], facts["token"], troubles, seen) == (True, "none", [], [None])
    (tmp_path / "token").write_text("hf_good\n")
    facts, troubles = examine(address, HF_HOME=str(tmp_path))
    assert (facts["token"], troubles, seen[-1]) == ("accepted", [], "Bearer hf_good")
    facts, (trouble,) = examine(address, HF_TOKEN="hf_old")
    assert trouble.fatal and "refuses your token" in trouble.what and "hf auth" in trouble.remedy
    asked = len(seen)
    facts, troubles = examine(address, HF_HUB_OFFLINE="1")
    assert "offline" in facts["answers"] and troubles == [] and len(seen) == asked


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "SLOW/slow", "nonsense"])
def test_a_hub_that_does_not_answer_is_a_remark(endpoint, address):
    facts, (trouble,) = examine(address.replace("SLOW", endpoint[0]), 0.5)
    assert facts["answers"] is False and not trouble.fatal
    assert "HF_HUB_OFFLINE=1" in trouble.remedy and "HF_ENDPOINT" in trouble.remedy


def test_room_and_rights_of_folders(tmp_path, monkeypatch):
    folders = {"output": tmp_path / "a/b", "caches": tmp_path}
    facts, troubles = storage.examine_disks(folders)
    assert str(tmp_path / "a/b") in facts["output"] and not (tmp_path / "a").exists()
    (tmp_path / "a").write_text("a file")
    (trouble,) = storage.examine_disks(folders)[1][:1]
    assert trouble.fatal and f"{tmp_path / 'a'} cannot be written" in trouble.what
    monkeypatch.setattr(storage, "_MIN_FREE_BYTES", 2**62)
    (trouble,) = storage.examine_disks({"caches": tmp_path})[1]
    assert not trouble.fatal and "has room for" in trouble.what


def test_folders_below_one_that_nobody_may_read(tmp_path, monkeypatch):
    folder, stat = tmp_path / "closed/runs", os.stat

    def refuse(path, *args, **keywords):
        if str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **keywords)

    monkeypatch.setattr("os.stat", refuse)
    facts, _ = storage.examine_disks({"output": folder})
    assert str(folder) in facts["output"] and storage.describe_folder_size(folder) == "empty"


def test_sizes_of_caches_and_memory(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_bytes(b"x" * 3 * 2**20)
    (tmp_path / "link").symlink_to(tmp_path / "in/file")
    assert storage.describe_folder_size(tmp_path) == "3 MiB"
    assert storage.describe_folder_size(tmp_path, seconds=0).startswith("at least")
    assert storage.describe_folder_size(tmp_path / "nowhere") == "empty"
    (tmp_path / "meminfo").write_text("MemTotal:  2097152 kB\nMemAvailable: 1048576 kB\n")
    assert storage.host_memory(tmp_path / "meminfo") == {"in all": 2**31, "free": 2**30}
    folders = storage.cache_folders({"HF_HOME": "/hf", "JAX_COMPILATION_CACHE_DIR": "/programs"})
    assert folders["models"] == Path("/hf/hub") and str(folders["compiled programs"]) == "/programs"


def test_nothing_in_a_report_is_secret(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice.b")
    monkeypatch.setattr("getpass.getuser", lambda: "alice.b")
    monkeypatch.setattr("socket.gethostname", lambda: "node-17")
    secret = {
        "set": ["HF_ENDPOINT=https://alice:pass@mirror", "X=hf_abcdefgh"],
        "folder": {"models": "/home/alice.b/hub on node-17", "data": "/scratch/alice.b/runs"},
    }
    report = DoctorReport()
    report.add("hub", secret, [Trouble("/scratch/alice.b cannot be written", "hf_abcdefgh")])
    for text in (report.text(), report.json()):
        for word in ("alice", "pass", "hf_abcdefgh", "node-17"):
            assert word in json.dumps(secret) and word not in text
        text = " ".join(text.split())
        assert "~/hub on $HOSTNAME" in text and "/scratch/$USER/runs" in text


def start(folder, *args, **variables):
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "train.doctor", "--json", *args]
    run = subprocess.run(
        command, cwd=folder, env=env | variables, capture_output=True, text=True, check=False
    )
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    report["troubles"] = [one for one in report["troubles"] if "has room for" not in one["what"]]
    return run.returncode, report


def test_it_works_where_jax_cannot_be_imported(tmp_path):
    (tmp_path / "jax.py").write_text(
        "raise RuntimeError('jaxlib version 9 is newer than and incompatible with jax version 8')"
    )
    code, report = start(tmp_path)
    assert code == 1 and report["devices"]["JAX computes on"] == "nothing"
    (trouble,) = report["troubles"]
    assert "incompatible with jax version 8" in trouble["what"]
    assert trouble["remedy"] == "pip install -U jax jaxlib"


@pytest.mark.slow
def test_it_works_where_a_plugin_is_broken(tmp_path):
    plugin = tmp_path / "jax_plugins/broken/__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("def initialize():\n    raise RuntimeError('libbroken.so: no such file')\n")
    code, report = start(tmp_path, JAX_PLATFORMS="broken")
    plugin, failure = report["troubles"]
    assert code == 1 and "JAX_PLATFORMS=broken allows JAX no other" in failure["what"]
    assert "jax_plugins.broken does not start (RuntimeError: libbroken.so" in plugin["what"]
    code, report = start(tmp_path, JAX_PLATFORMS="cpu")
    assert code == 0 and [one["fatal"] for one in report["troubles"]] == [False]
    assert report["devices"]["JAX computes on"].endswith("× cpu")
    assert report["attention"]["of 2,048 tokens"] == "blockwise"


def test_a_process_that_hangs_is_ended():
    assert run_module("time", ["x"], 60).code == 1  # it has no main
    assert run_module("train.doctor.devices", (), 0.0).code is None


def planned(total, fits):
    made = {"fits": fits, "per_chip_bytes": {"total": total, "capacity": 2**34}}
    return ChildEnding(json.dumps(made), "", 0)


def test_what_fits_is_what_the_plan_says(monkeypatch):
    answers = iter([planned(None, False), planned(2**33, True)])
    monkeypatch.setattr(doctor_command, "run_module", lambda *args: next(answers))
    facts, troubles = doctor_command.examine_fits("m", {"topology": "h100:1", "kind": "H100"})
    assert facts["LoRA on bfloat16"] == "does not fit (refused by the compiler)"
    assert facts["LoRA on nf4"] == "fits (8.0 GiB of 16.0 GiB)" and troubles == []
    answers = iter([planned(2**35, False), planned(2**35, False)])
    _, (trouble,) = doctor_command.examine_fits("m", {"topology": "h100:1", "kind": "H100"})
    assert trouble.fatal and "does not fit on h100:1" in trouble.what
    assert "plan --model m --topology h100:1 --quantize nf4 --largest-batch" in trouble.remedy
    _, (trouble,) = doctor_command.examine_fits("m", {"topology": None, "kind": "GTX"})
    assert not trouble.fatal and "no plan for GTX" in trouble.what


@pytest.mark.slow
def test_a_model_is_planned_on_the_devices_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_model(tmp_path / "model", max_position_embeddings=1024)
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "model"), "--json", "--output", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]["LoRA on bfloat16"].startswith("fits (") and stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "nowhere.gguf"), "--output", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 1 and "nowhere.gguf" in said and "cannot be planned" in said
