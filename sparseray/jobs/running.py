"""Finds the job that `scale`, `status` and `top` are about, and connects to its scheduler."""

import argparse
import shlex
import socket
from pathlib import Path
from typing import Any

from sparseray.errors import ConfigError
from sparseray.platform.run.registry import RegisteredRun, adopt_authentication, forget_run, registered_runs
from sparseray.platform.settings import expand_path

ANSWER_S = 3.0


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the run."""
    parser.add_argument(
        "--run_dir", default="", help="folder of the run; not needed while one run alone is going on"
    )


def connect(run_dir: str) -> Any:
    """Return the scheduler of a running job.

    Raises:
        ConfigError: no run is going on there, or several are and none was named.
        ClusterError: its cluster refuses us.
    """
    if run_dir:
        return _attach(_of_folder(run_dir))
    runs = live_runs()
    if len(runs) != 1:
        many = f"{len(runs)} runs are going on; name one with --run_dir: " if runs else "no run is going on; "
        raise ConfigError(many + _known(runs))
    return _attach(runs[0])


def live_runs() -> list[RegisteredRun]:
    """All runs whose cluster answers; what killed machines and commands left behind is removed."""
    alive = []
    for run in registered_runs():
        if _why_gone(run):
            forget_run(Path(run.run_dir))
        else:
            alive.append(run)
    return alive


def _of_folder(run_dir: str) -> RegisteredRun:
    wanted = str(Path(expand_path(run_dir, "--run_dir")).absolute())
    found = [run for run in registered_runs() if run.run_dir == wanted]
    error = _why_gone(found[0]) if found else ""
    runs = live_runs()
    if error:
        raise ConfigError(
            f"the run in {wanted} does not answer at {found[0].address} ({error}): it has ended or its machine is gone; "
            "its `pretrain` command goes on from its last checkpoint"
        )
    if not found:
        raise ConfigError(f"--run_dir {run_dir}: no run is going on there; {_known(runs)}")
    return found[0]


def _attach(run: RegisteredRun) -> Any:
    adopt_authentication(run)
    from sparseray.platform.cluster import attach

    return attach(run)


def _why_gone(run: RegisteredRun) -> str:
    """Why nobody answers at a run's address, empty if somebody does.

    Ray itself tries for many minutes to reach a cluster that is gone, and fills the terminal meanwhile.
    """
    host, _, port = run.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _known(runs: list[RegisteredRun]) -> str:
    if not runs:
        return "start one with `python -m sparseray pretrain --config configs/tiny.yaml --data.path DIR`"
    return "going on: " + ", ".join(shlex.quote(run.run_dir) for run in runs)
