"""Where Prometheus finds the exporters: a file in the run folder, and one that merges all live runs.

The merged file lies in a folder of the user's (`state_directory`). Each run keeps its part there beside it;
a part whose process has gone is dropped whenever anyone writes. Files are replaced as a whole, never edited.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from sparseray.log import get_logger

log = get_logger(__name__)

TARGETS = "prometheus_targets.json"


def state_directory() -> Path:
    """Folder of the merged file: SPARSERAY_STATE_DIR, or sparseray/ in the user's XDG state folder."""
    given = os.environ.get("SPARSERAY_STATE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sparseray"


def write_targets(path: Path, targets: dict[str, str], run: str) -> None:
    """Write a file for Prometheus' file-based service discovery, and the run's part of the merged one.

    Call it whenever a process comes or goes, and with no targets when the run ends.

    Args:
        path: file to write.
        targets: name of a process to its address; empty ones are left out.
        run: label of all of them.
    """
    content = entries(targets, run)
    _replace(path, content)
    publish(hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16], content)


def entries(targets: dict[str, str], run: str) -> list[dict[str, Any]]:
    """Return the discovery file's content.

    Args:
        targets: address by name of each process.
        run: label of all of them.
    """
    return [
        {"targets": [address], "labels": {"job": "sparseray", "run": run, "process": name}}
        for name, address in sorted(targets.items())
        if address
    ]


def publish(key: str, content: list[dict[str, Any]]) -> None:
    """Put a run's targets into the merged file, or take them out if there are none.

    The merged file is a convenience: a folder that cannot be written is told, and the run goes on.

    Args:
        key: identifies the run.
        content: of `entries`.
    """
    try:
        with _locked(state_directory()) as folder:
            part = folder / "runs" / f"{key}.json"
            if content:
                _replace(part, {"host": socket.gethostname(), "pid": os.getpid(), "targets": content})
            else:
                part.unlink(missing_ok=True)
            _merge(folder)
    except OSError as error:
        log.warning("Prometheus' merged target file is not written: %s", error)


def merged_targets() -> Path:
    """Return the merged file, brought up to date.

    Raises:
        OSError: its folder cannot be written.
    """
    with _locked(state_directory()) as folder:
        _merge(folder)
    return folder / TARGETS


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    (folder / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _merge(folder: Path) -> None:
    merged: list[dict[str, Any]] = []
    for part in sorted((folder / "runs").glob("*.json")):
        try:
            content = json.loads(part.read_text())
            if content["host"] == socket.gethostname() and not psutil.pid_exists(content["pid"]):
                part.unlink()
                continue
            merged += content["targets"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s is not a part of a run's targets; it is left out", part)
    _replace(folder / TARGETS, merged)


def _replace(path: Path, content: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
