"""Which runs and platforms of this user are going on, and where: how `scale`, `status`, `top` and `down` find them.

One small JSON file for each in the user's state folder, written when it starts and removed when it ends; a file that
a killed machine left behind is passed over once its cluster is gone.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

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


@dataclass(frozen=True, kw_only=True)
class RegisteredPlatform:
    """A platform that `up` started.

    Args:
        platform: its identifier.
        address: of its Ray cluster.
        auth: authentication mode of that cluster; empty for Ray's default.
        head: process id of the Ray head that was started for it; 0 where it joined one.
        time: when it was started, seconds since 1970.
    """

    platform: str
    address: str
    auth: str
    head: int
    time: float


Entry = TypeVar("Entry", RegisteredRun, RegisteredPlatform)


def state_folder() -> Path:
    """Per-user folder of what runs now, beside the merged targets of Prometheus."""
    return state_directory() / "schedulers"


def platform_folder(platform: str) -> Path:
    """Folder of a platform's journal."""
    return state_directory() / "platforms" / platform[:12]


def _key(run_dir: Path) -> str:
    """Name of a run's file: a folder can have one only."""
    return f"sparseray-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:12]}"


def register_run(run_dir: Path, address: str) -> None:
    """Note that a run is going on at a Ray address.

    Args:
        run_dir: folder of the run.
        address: of its Ray cluster.
    """
    # Ray turns its token authentication on by itself where it starts a cluster, and off where it joins one.
    auth = os.environ.get("RAY_AUTH_MODE", "")
    run = RegisteredRun(run_dir=str(run_dir.absolute()), address=address, auth=auth, time=time.time())
    _write(state_folder() / f"{_key(run_dir)}.json", run)


def register_platform(found: RegisteredPlatform) -> None:
    """Note that a platform is there."""
    _write(platform_folder(found.platform) / "platform.json", found)


def registered_platforms() -> list[RegisteredPlatform]:
    """All platforms that were not seen to end, newest first."""
    return _read(state_directory() / "platforms", "*/platform.json", RegisteredPlatform)


def forget_platform(platform: str) -> None:
    """Note that a platform has ended; its journal goes with it."""
    shutil.rmtree(platform_folder(platform), ignore_errors=True)


def forget_run(run_dir: Path) -> None:
    """Note that a run has ended."""
    (state_folder() / f"{_key(run_dir)}.json").unlink(missing_ok=True)


def is_going_on(run_dir: Path) -> bool:
    """Whether a run in a folder was not seen to end."""
    return (state_folder() / f"{_key(run_dir)}.json").exists()


def registered_runs() -> list[RegisteredRun]:
    """All runs that were not seen to end, newest first."""
    return _read(state_folder(), "*.json", RegisteredRun)


def _write(path: Path, entry: RegisteredRun | RegisteredPlatform) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(entry)))
    os.replace(temporary, path)


def _read(folder: Path, pattern: str, kind: type[Entry]) -> list[Entry]:
    found = []
    for path in folder.glob(pattern):
        try:
            found.append(kind(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda entry: -entry.time)


def adopt_authentication(found: RegisteredRun | RegisteredPlatform) -> None:
    """Use the authentication mode of a cluster, unless the user chose one; call it before Ray is imported."""
    if found.auth:
        os.environ.setdefault("RAY_AUTH_MODE", found.auth)


def adopt_platform(address: str) -> None:
    """Use the authentication mode of the platform at an address that is to be joined, if it is one of ours."""
    platforms = registered_platforms()
    at = [p for p in platforms if p.address == address] or (platforms[:1] if address == "auto" else [])
    for found in at:
        adopt_authentication(found)
