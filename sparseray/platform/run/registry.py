"""Which runs of this user are going on, and where: how `scale`, `status` and `top` find a job.

One small JSON file per run in the user's state folder, written when a scheduler starts and removed
when it ends; a file that a killed machine left behind is passed over once its cluster is gone.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sparseray.platform.metrics.discovery import state_directory


@dataclass(frozen=True, kw_only=True)
class RegisteredRun:
    """A run that was not seen to end.

    Args:
        run_dir: its folder, absolute.
        address: of its Ray cluster.
        auth: authentication mode of that cluster; empty for Ray's default.
        time: when it was registered, seconds since 1970.
    """

    run_dir: str
    address: str
    auth: str
    time: float


def state_folder() -> Path:
    """Per-user folder of what runs now, beside the merged targets of Prometheus."""
    return state_directory() / "schedulers"


def scheduler_name(run_dir: Path) -> str:
    """Ray's name of the scheduler of a run: a folder can have one only."""
    return f"sparseray-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]}"


def register_run(run_dir: Path, address: str) -> None:
    """Note that a run is going on at a Ray address.

    Args:
        run_dir: folder of the run.
        address: of its Ray cluster.
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scheduler_name(run_dir)}.json"
    # Ray turns its token authentication on by itself where it starts a cluster, and off where it joins one.
    auth = os.environ.get("RAY_AUTH_MODE", "")
    run = RegisteredRun(run_dir=str(run_dir.absolute()), address=address, auth=auth, time=time.time())
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(run)))
    os.replace(temporary, path)


def forget_run(run_dir: Path) -> None:
    """Note that a run has ended."""
    (state_folder() / f"{scheduler_name(run_dir)}.json").unlink(missing_ok=True)


def registered_runs() -> list[RegisteredRun]:
    """All runs that were not seen to end, newest first."""
    found = []
    for path in state_folder().glob("*.json"):
        try:
            found.append(RegisteredRun(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda run: -run.time)


def adopt_authentication(run: RegisteredRun) -> None:
    """Use the authentication mode of a run's cluster, unless the user chose one; call it before Ray is imported."""
    if run.auth:
        os.environ.setdefault("RAY_AUTH_MODE", run.auth)
