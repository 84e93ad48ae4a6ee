"""As in a container: another user without a name, sources that cannot be written, a home that is somebody else's."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_corpus
from local_cluster import tiny_run
from processes import ROOT, environment, of_mark, temporary_folder, wait_until

from sparseray.platform.config import save_yaml

# One folder, whose data the first test makes: one process.
pytestmark = pytest.mark.xdist_group("starts")
UID = 45678
SETPRIV = shutil.which("setpriv")
OTHER = [
    SETPRIV or "",
    f"--reuid={UID}",
    f"--regid={UID}",
    "--clear-groups",
    "--bounding-set=-all",
    "--inh-caps=-all",
]
NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch, ray'], check=True)"


def runs(program: str) -> bool:
    """Whether the other user can run Python, from where it is installed here."""
    if SETPRIV is None or os.getuid() != 0:
        return False
    command = [*OTHER, sys.executable, "-c", program]
    return subprocess.run(command, env=environment(), cwd="/", capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder of the other user's, with text in it."""
    if not runs("import sparseray, numba"):
        pytest.skip("needs root, setpriv, and a Python that others may run")
    with temporary_folder() as folder:
        write_corpus(folder / "text")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, UID, UID)
        yield folder


def as_other(arguments: list[str], place: Path, mark: str = "") -> subprocess.CompletedProcess[str]:
    env = environment(HOME="/root", TMPDIR=str(place), SPARSERAY_TEST=mark)
    unset = ("USER", "LOGNAME", "SPARSERAY_STATE_DIR", "RAY_AUTH_MODE", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR")
    env = {name: value for name, value in env.items() if name not in unset}
    command = [*OTHER, sys.executable, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=110)


@pytest.mark.long
def test_data_is_prepared_and_a_compiler_finds_a_place_for_its_cache(place: Path) -> None:
    options = ["--source", str(place / "text"), "--vocab_size", "300", "--out", str(place / "data")]
    done = as_other(["-m", "sparseray", "data", "prepare", *options], place)
    assert done.returncode == 0, done.stderr
    program = (
        "from sparseray.jobs.places import settle; settle()\n"
        "import numpy as np; from sparseray.kernels.dse import cpu\n"
        "rows, sums = cpu.segment_sum_rows(np.array([2, 0, 2]), np.ones((3, 1), np.float32))\n"
        "print(rows.tolist(), sums.tolist())\n"
    )
    done = as_other(["-c", program], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 2] [[1.0], [2.0]]\n"
    own = place / f"sparseray-home-{UID}"
    assert own.stat().st_mode & 0o777 == 0o700 and own.stat().st_uid == UID
    refused = as_other(
        ["-m", "sparseray", "data", "prepare", "--source", str(place / "text"), "--out", "/root/x/data"],
        place,
    )
    assert refused.returncode == 2 and "--out" in refused.stderr and "cannot be written" in refused.stderr
    assert "reading" not in refused.stderr


@pytest.mark.ray
@pytest.mark.long
def test_a_run_trains(place: Path) -> None:
    if not runs(NESTED):
        pytest.skip("the Python here can be started by root alone")
    mark = uuid.uuid4().hex
    save_yaml(tiny_run(place / "data", steps=2), place / "run.yaml")
    options = [
        "--config",
        str(place / "run.yaml"),
        "--run_dir",
        str(place / "run"),
        "--cluster.colocated=true",
    ]
    done = as_other(["-m", "sparseray", "pretrain", *options], place, mark)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: not of_mark(mark), "the end of all processes", 30.0)
