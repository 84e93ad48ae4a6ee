"""Finds the job that `scale`, `status` and `top` are about, and connects to its scheduler."""

import argparse
import socket
from pathlib import Path
from typing import Any

from sparseray.errors import ClusterError, ConfigError
from sparseray.platform.run.registry import adopt_authentication, forget_run, registered_runs

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
        ClusterError: it does not answer.
    """
    runs = registered_runs()
    if run_dir:
        wanted = str(Path(run_dir).absolute())
        found = [run for run in runs if run["run_dir"] == wanted]
        if not found:
            raise ConfigError(f"--run_dir {run_dir}: no run is going on there; {_known(runs)}")
        return _attach(found[0])
    if not runs:
        raise ConfigError(f"no run is going on; {_known(runs)}")
    if len(runs) == 1:
        return _attach(runs[0])
    # A killed machine leaves its file behind: those whose cluster is gone are dropped from the choice.
    alive = [run for run in runs if _answers(run)]
    if len(alive) != 1:
        raise ConfigError(f"{len(alive)} runs are going on; name one with --run_dir: {_known(alive)}")
    return _attach(alive[0])


def _attach(run: dict[str, Any]) -> Any:
    if error := _why_gone(run):
        raise ClusterError(
            f"the run in {run['run_dir']} does not answer at {run['address']} ({error}); it has ended or its machine "
            "is gone; start it again with its `pretrain` command"
        )
    adopt_authentication(run)
    from sparseray.platform.cluster import attach

    return attach(run)


def _why_gone(run: dict[str, Any]) -> str:
    """Why nobody answers at a run's address, empty if somebody does.

    Ray itself tries for many minutes to reach a cluster that is gone, and fills the terminal meanwhile.
    """
    host, _, port = str(run["address"]).rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _answers(run: dict[str, Any]) -> bool:
    if _why_gone(run):
        forget_run(Path(run["run_dir"]))
        return False
    return True


def _known(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "start one with `python -m sparseray pretrain --config configs/tiny.yaml --data.path DIR`"
    return "going on: " + ", ".join(run["run_dir"] for run in runs)
