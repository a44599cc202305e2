"""The peak memory that a report shows is that of the run's own process."""

import json
import subprocess
import sys

import pytest

MOST = 2**30
CHILD = """
import json, resource
from train.processes.memory import peak_bytes

before = peak_bytes()
array = bytearray(300 * 2**20)
usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([before, peak_bytes(), usage]))
"""
PARENT = f"""
import subprocess, sys

held = bytearray({MOST + 2**29})
done = subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, capture_output=True)
print(done.stdout.decode())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux hands on the peak of the parent")
def test_the_peak_of_a_process_is_not_that_of_its_parent():
    command = [sys.executable, "-c", PARENT, CHILD]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak, usage = json.loads(done.stdout)
    assert before < MOST, "the parent holds more"
    assert 250 * 2**20 < peak - before < 350 * 2**20, "it grows by what the process takes"
    assert usage > MOST, "the control: what the parent held counts"
