"""Places that are not as usual: homes, temporary folders, names and addresses that other software stumbles over."""

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from local_cluster import tiny_run
from processes import answering, kill_all, start

from sparseray.errors import ConfigError
from sparseray.jobs import places, up
from sparseray.platform import checks
from sparseray.platform.checks import check_start
from sparseray.platform.config import ClusterConfig, save_yaml
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.reachable import SETTINGS
from sparseray.platform.settings import expand_path

NOWHERE = "/proc/nowhere"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of folders, put back afterwards."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("RAY_", "XDG_", "TRITON_", "NUMBA_", "MPL", "SPARSERAY_STATE", "TORCHINDUCTOR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    # What the code under test sets goes too.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


def test_usual_places_are_left_alone(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setitem(os.environ, "HOME", str(tmp_path))
    bare.setitem(os.environ, "TMPDIR", "/tmp")
    before = dict(os.environ)
    places.settle()
    assert dict(os.environ) == before


@pytest.mark.parametrize("home", [NOWHERE, "/dev/null"])
def test_a_home_that_cannot_be_written_has_a_substitute_for_everything_that_is_kept_there(
    bare: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    bare.setattr(os, "access", lambda path, mode: not str(path).startswith(home))
    bare.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    bare.setattr(tempfile, "gettempdir", lambda: "/tmp")
    bare.setattr(places, "_own_folder", lambda path: tmp_path)
    bare.setitem(os.environ, "NUMBA_CACHE_DIR", "/mine")
    places.settle()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path and len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert os.environ["SPARSERAY_STATE_DIR"] == str(tmp_path / "state")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine"


def test_a_user_without_a_name_gets_one(bare: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    bare.setattr(pwd, "getpwuid", unknown)
    for name in ("USER", "LOGNAME"):
        os.environ.pop(name, None)
    places.settle()
    assert os.environ["USER"] == os.environ["LOGNAME"] == f"user{os.getuid()}"


def test_a_long_temporary_folder_is_replaced_or_told(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    bare.setitem(os.environ, "TMPDIR", str(long))
    bare.setattr(places, "SHORT", NOWHERE)
    with pytest.raises(ConfigError, match=f"TMPDIR={long} is too long.*set TMPDIR"):
        places.settle()
    bare.setattr(places, "SHORT", "/tmp")
    places.settle()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"


def test_a_substitute_that_is_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"not a folder of yours alone; remove it"):
        places._own_folder(tmp_path / "open")
    with pytest.raises(ConfigError, match="set HOME"):
        places._own_folder(Path(NOWHERE) / "x")


def test_paths_are_expanded_or_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    assert expand_path("~/$DATA/x y", "--out") == "/home/me//data/x y"
    with pytest.raises(ConfigError, match="NO_SUCH_THING is not set"):
        expand_path("${NO_SUCH_THING}/x", "--out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$odd").mkdir()
    assert expand_path("$odd", "--out") == "$odd"


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"cluster.address=127.0.0.1:1 does not answer.*leave it out"):
        check_start(ClusterConfig(address="127.0.0.1:1"))
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", b"SSH-2.0-x\r\n"])
def test_an_address_at_which_somebody_else_listens_is_told_before_ray_is_asked(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "ANSWER_S", 0.3)
    with answering(said) as port:
        with pytest.raises(ConfigError, match=f"cluster.address=127.0.0.1:{port} does not answer"):
            check_start(ClusterConfig(address=f"127.0.0.1:{port}"))
        with pytest.raises(ConfigError, match="does not answer"):
            up.up(0, f"127.0.0.1:{port}", Kind(), max_slots=0)
    with answering(SETTINGS) as port:
        check_start(ClusterConfig(address=f"127.0.0.1:{port}"))


def with_little_shared_memory() -> list[str]:
    """What a command is started by to find 16 MB in /dev/shm, less than Ray's store; empty without leave to mount."""
    inside = ["unshare", "--mount", "sh", "-c"]
    inside += ['mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"]
    may = shutil.which("unshare") and not subprocess.run([*inside, "true"], capture_output=True).returncode
    return inside if may else []


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.xdist_group("starts")
def test_a_run_works_without_a_home_with_a_long_tmpdir_another_rays_address_and_little_shared_memory(
    corpus: Path, tmp_path: Path
) -> None:
    """All at once, as in a container; Ray guards itself with a token that has no home to lie in."""
    long, run_dir, mark = tmp_path / ("t" * 80), tmp_path / "läufe 1", uuid.uuid4().hex
    long.mkdir()
    save_yaml(tiny_run(corpus, steps=2), tmp_path / "run.yaml")
    changes = {"HOME": NOWHERE, "TMPDIR": str(long), "RAY_ADDRESS": "127.0.0.1:1", "SPARSERAY_TEST": mark}
    unset = ("SPARSERAY_STATE_DIR", "RAY_AUTH_MODE", "USER", "LOGNAME")
    options = [
        "pretrain",
        "--config",
        str(tmp_path / "run.yaml"),
        f"--run_dir={run_dir}",
        "--cluster.colocated=true",
    ]
    log, inside = tmp_path / "log.txt", with_little_shared_memory()
    process = start(options, log, unset=unset, inside=inside, **changes)
    try:
        assert process.wait(100) == 0, log.read_text()
    finally:
        kill_all(process, mark)
    assert "step 2/2" in log.read_text() and (run_dir / "checkpoints" / "step_2").is_dir()
    assert f"serve --checkpoint '{run_dir}/checkpoints/step_2'" in log.read_text()
    if not inside:
        pytest.skip("all held but little shared memory, which needs leave to mount a file system")
