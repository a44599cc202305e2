"""Clients of Tinker's SDK in processes of their own, which end or are killed, one by one."""

import multiprocessing
import os
import signal

import pytest

tinker = pytest.importorskip("tinker", reason="the extra 'serve-test' has the SDK")
from tinker import types  # noqa: E402

from tests.train.serve.test_tinker_sdk import Served, datum, made  # noqa: E402

pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore"),  # the SDK's own
]
KILLED = (1, 4, 5)


def trained(url, said):
    """Takes a step, says the model's name, and lives until it is told to end."""
    service = tinker.ServiceClient(base_url=url)
    client = made(service.create_lora_training_client(base_model="tiny/base", rank=4))
    client.forward_backward([datum([1, 2], [3, 4], weights=[1.0, 1.0])], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.5)).result()
    said.send(client.model_id)
    said.recv()
    os._exit(0)  # as a program ends that does not close its client


def test_ten_clients_in_a_row_start_on_a_server_with_room_for_two(tmp_path, monkeypatch):
    """None unloads its model, and three are killed."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-a")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    served = Served(tmp_path, room=2)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    models = []
    try:
        for number in range(10):
            mine, its = processes.Pipe()
            process = processes.Process(target=trained, args=(served.url, its))
            process.start()
            assert mine.poll(120), f"client {number} does not start"
            models.append(mine.recv())
            if number in KILLED:
                os.kill(process.pid, signal.SIGKILL)
            else:
                mine.send("end")
            process.join()
            assert len(served.engine.tenants) <= 2
        status = served.tinker.log.parking.status()
        assert [status[model].steps for model in models] == [1] * 10
        assert [model in served.engine.tenants for model in models].count(True) == 2
    finally:
        served.stop()
