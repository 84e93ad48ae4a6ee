"""Torch threads of a slot: its work thread has what the configuration says, whatever the process inherited."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import re
import torch
from sparseray.platform.fleet.host import Host

found = []

def look():
    found.extend(re.findall(r"(?:omp|mkl)_get_max_threads\\(\\) : (\\d+)", torch.__config__.parallel_info()))

host = Host(slot=0, job="threads", threads=2, transport="tcp", bind_host="127.0.0.1", node="")
host._slot.serve_forever = look
host._thread.start()
host.wait_for_end()
print(*found)
"""


@pytest.mark.long
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_an_inherited_number_of_threads_does_not_hold_in_the_work_thread() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2", "2"], done.stderr
