"""Workers that Ray takes from a process that has loaded everything: what they are given, how they end, and without it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseray.platform.fleet import nursery
from sparseray.platform.fleet.forked_workers import ForkedWorkers

WORKER = """import os, sys, time
print(os.getppid(), os.getpgrp() == os.getpid(), "torch" in sys.modules, sys.argv[1:], os.environ.get("MINE"), os.getcwd(), flush=sys.argv[1:] == ["wait"])
if sys.argv[1:] == ["wait"]:
    time.sleep(60)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[ForkedWorkers]:
    made = ForkedWorkers(threads=1)
    yield made
    made.close()


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "default_worker.py"
    path.write_text(WORKER)
    return path


def start(workers: ForkedWorkers, worker: Path, *arguments: str, **changes: str) -> "subprocess.Popen[str]":
    """Start a worker as Ray does."""
    with workers.started_by_ray():
        command = [sys.executable, str(worker), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINE": "a b", **changes}
    return subprocess.Popen(
        command, env=environment, cwd=worker.parent, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.long
def test_a_worker_is_forked_with_what_it_was_given_and_its_status_comes_back(
    workers: ForkedWorkers, worker: Path
) -> None:
    process = start(workers, worker, "--port=1", "two words")
    said, _ = process.communicate(timeout=60)
    assert said.split()[1:] == [
        "True",
        "True",
        "['--port=1',",
        "'two",
        "words']",
        "a",
        "b",
        str(worker.parent),
    ]
    assert int(said.split()[0]) != process.pid and process.returncode == 7


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"OMP_NUM_THREADS": "2"}, {"PYTHONHASHSEED": "3"}])
def test_one_with_another_environment_than_the_libraries_were_loaded_in_loads_for_itself(
    workers: ForkedWorkers, worker: Path, changes: dict[str, str]
) -> None:
    process = start(workers, worker, **changes)
    said, _ = process.communicate(timeout=60)
    assert said.split()[0:3:2] == [str(os.getpid()), "False"] and process.returncode == 7


def test_workers_are_in_the_commands_session_and_out_of_reach_of_its_ctrl_c(workers: ForkedWorkers) -> None:
    pid = workers._process.pid
    assert os.getsid(pid) == os.getsid(0) and os.getpgid(pid) == pid


def test_rays_agent_takes_a_free_port_whatever_else_runs_on_the_machine(
    workers: ForkedWorkers, tmp_path: Path
) -> None:
    agent = tmp_path / "dashboard" / "agent.py"
    agent.parent.mkdir()
    agent.write_text("import sys; print(sys.argv[1:])")
    with workers.started_by_ray():
        command = [sys.executable, "-u", str(agent), "--listen-port=52365", "--head"]
    assert subprocess.check_output(command, text=True).strip().endswith("'--head', '--listen-port=0']")


def test_other_programs_are_python_as_before(workers: ForkedWorkers, tmp_path: Path) -> None:
    with workers.started_by_ray():
        command = [sys.executable, "-c", "import sys; print(sys.executable)"]
    assert Path(subprocess.check_output(command, text=True).strip()) == Path(sys.executable)


def test_daemons_of_ray_that_a_run_has_no_use_for_only_sleep(workers: ForkedWorkers) -> None:
    """What they would do is done by nobody: the driver prints no worker's words, and no machine is started."""
    from ray._private import services

    root = Path(services.RAY_PATH)
    found = [root / "_private" / "log_monitor.py", *root.glob("autoscaler/*/monitor.py")]
    assert len(found) >= 2 and all(path.exists() for path in found)
    for path in found:
        with workers.started_by_ray():
            command = [sys.executable, "-u", str(path), "--logs-dir=nowhere"]
        with subprocess.Popen(command) as process:
            words = Path(f"/proc/{process.pid}/cmdline")
            deadline = time.monotonic() + 10.0
            while not words.read_bytes().startswith(b"sleep"):
                assert time.monotonic() < deadline and process.poll() is None, words.read_bytes()
                time.sleep(0.01)
            process.terminate()


def test_neither_a_worker_nor_who_asked_for_it_outlives_the_other(
    workers: ForkedWorkers, worker: Path
) -> None:
    asked = start(workers, worker, "wait")
    assert asked.stdout is not None
    nursery_pid = int(asked.stdout.readline().split()[0])
    children = f"/proc/{nursery_pid}/task/{nursery_pid}/children"
    (pid,) = map(int, Path(children).read_text().split())
    os.kill(pid, signal.SIGKILL)
    assert asked.wait(10) == 9
    asked = start(workers, worker, "wait")
    assert asked.stdout is not None and asked.stdout.readline()
    (pid,) = map(int, Path(children).read_text().split())
    asked.kill()
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_the_nursery_workers_load_for_themselves(worker: Path) -> None:
    made = ForkedWorkers(threads=1)
    made._process.kill()
    made._process.wait()
    process = start(made, worker)
    assert process.communicate(timeout=60)[0].split()[2] == "False" and process.returncode == 7
    made.close()
    assert not made._folder.exists()


def test_the_nursery_ends_with_the_process_that_it_is_for() -> None:
    code = (
        "import os\nfrom sparseray.platform.fleet.forked_workers import ForkedWorkers\n"
        "made = ForkedWorkers(1)\nprint(made._process.pid, made._folder, flush=True)\nos.kill(os.getpid(), 9)"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False).stdout
    pid, folder = int(said.split()[0]), Path(said.split()[1])
    deadline = time.monotonic() + 60.0
    while folder.exists() or Path(f"/proc/{pid}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_loaded_for_workers_does_not_load_ray() -> None:
    """Ray reads its environment while it loads; every worker has its own."""
    code = f"import importlib, sys; [importlib.import_module(m) for m in {nursery.MODULES!r}]; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
