"""What benchmarks/on_gpus.py runs: commands that exist, within their limits, and every test that needs a GPU of its own."""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from processes import wait_until

from benchmarks import on_gpus
from benchmarks.on_gpus import MARKED, RUNS, Evening, Run

ROOT = Path(__file__).parent.parent


def test_every_command_is_there_and_every_test_that_needs_a_gpu_is_run() -> None:
    words = [run.words.split() for run in RUNS]
    assert len({run.name for run in RUNS}) == len(RUNS)
    modules = {following[1].replace(".", "/") + ".py" for following in words}
    assert [module for module in modules - {"pytest.py"} if not (ROOT / module).is_file()] == []
    *some, tests = [run.words for run in RUNS if run.words.startswith("-m pytest")]
    files = [word for words in some for word in words.split() if word.startswith("tests/")]
    assert files and [file for file in files if not (ROOT / file).is_file()] == []
    assert {path.name for path in (ROOT / "tests").glob("test_gpu_*.py")} < {
        Path(path).name for path in MARKED
    }
    assert " -m gpu " in tests and tests.endswith(" {marked}")


def test_a_run_is_ended_at_its_limit_and_none_is_begun_too_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpus, "STOP_S", 1.0)
    evening = Evening(tmp_path, 30.0)
    sleeper = f"import subprocess,sys;p=subprocess.Popen(['sleep','60']);open('{tmp_path}/pid','w').write(str(p.pid));p.wait()"
    (tmp_path / "sleeper.py").write_text(sleeper)
    (tmp_path / "sayer.py").write_text("print('two of two')")
    slow = Run("slow", 1, 2, f"{tmp_path}/sleeper.py")
    fast = Run("fast", 1, 20, f"{tmp_path}/sayer.py")
    begin = time.monotonic()
    evening.side_by_side([slow, fast, Run("late", 1, 100, "-c pass")], 2)
    assert time.monotonic() - begin < 20
    said = capsys.readouterr().out
    assert "fast: exit code 0" in said and "two of two" in said and "late: left out" in said
    assert evening.failed == ["slow"]
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(child), "what the slow run started is gone")


def test_runs_wait_for_as_many_gpus_as_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evening, busy = Evening(tmp_path, 30.0), set[int]()
    found: dict[str, list[int]] = {}

    def one(what: Run, gpus: Sequence[int]) -> None:
        shared = busy & set(gpus)
        busy.update(gpus)
        found[what.name] = [*gpus, *shared]
        time.sleep(0.1)
        busy.difference_update(gpus)

    monkeypatch.setattr(evening, "one", one)
    sizes = {"two": 2, "another two": 2, "all": 0, "one": 1, "two more": 2}
    evening.side_by_side([Run(name, gpus, 1, "") for name, gpus in sizes.items()], 4)
    assert found == {
        "two": [0, 1],
        "another two": [2, 3],
        "all": [0, 1, 2, 3],
        "one": [0],
        "two more": [1, 2],
    }
