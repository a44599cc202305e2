"""Runs a script several times in one process: SHARED options, then those of each run.

python tests/train/mesh_runs.py DEVICES PROCESS/PROCESSES PORT SCRIPT SHARED… -- OPTIONS… -- …

OPTIONS may begin with order=3,0,2,1: the devices, by number, in the order that the mesh takes them;
then with slices=2: every second device stands for one of another slice; or slices=hosts: all of
another process do.
"""

import importlib
import sys

devices, place, port, script, *rest = sys.argv[1:]
process, processes = map(int, place.split("/"))

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", int(devices))

from lora_jax.training import mesh as library_mesh  # noqa: E402
from lora_jax.training.processes import wait_for_all  # noqa: E402
from train.processes import mesh  # noqa: E402

runs: list[list[str]] = [[]]
for word in rest:
    if word == "--":
        runs.append([])
    else:
        runs[-1].append(word)
shared, *each = runs
if processes > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=10
    )
for options in each:
    if options[0].startswith("order="):
        order = [int(number) for number in options.pop(0).removeprefix("order=").split(",")]
        mesh.all_devices = lambda order=order: [jax.devices()[number] for number in order]
    library_mesh.slice_of = lambda device: 0
    if options[0].startswith("slices="):
        number = options.pop(0).removeprefix("slices=")
        library_mesh.slice_of = {
            "2": lambda device: device.id % 2,
            "hosts": lambda device: device.process_index,
        }[number]
    importlib.import_module(f"train.{script}").main([*shared, *options])
    wait_for_all("the next run")
