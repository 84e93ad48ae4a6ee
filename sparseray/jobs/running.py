"""Finds the job that `scale`, `status`, `top` and `publish` are about among those of all platforms, and connects to it."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseray.errors import ConfigError
from sparseray.platform.reachable import why_silent
from sparseray.platform.run import lock
from sparseray.platform.run.registry import (
    Entry,
    RegisteredPlatform,
    RegisteredRun,
    adopt_authentication,
    forget_platform,
    forget_run,
    registered_platforms,
    registered_runs,
)
from sparseray.platform.settings import expand_path

ANSWER_S = 3.0


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add what names the job."""
    parser.add_argument(
        "job",
        nargs="?",
        default="",
        help="run folder, its name, or a server's name; not needed while one job alone is going on",
    )
    parser.add_argument("--run_dir", default="", help="the same as a folder")


def named(options: argparse.Namespace) -> str:
    """What the user named the job by, empty for nothing."""
    return str(options.run_dir or options.job)


def connect(job: str) -> Any:
    """Return a running job, by its folder or its name.

    Raises:
        ConfigError: no job is going on there, or several are and none was named.
        ClusterError: its cluster refuses us.
    """
    if job:
        return _attach(_of_name(job))
    runs = live_runs()
    if len(runs) > 1:
        # One that was killed on a cluster that lives has let go of its folder.
        runs = [run for run in runs if lock.holder(Path(run.run_dir))] or runs
    if len(runs) != 1:
        many = (
            f"{len(runs)} runs are going on; name one, or give its --run_dir: "
            if runs
            else "no run is going on; "
        )
        raise ConfigError(many + _known(runs))
    return _attach(runs[0])


def live_platforms() -> list[RegisteredPlatform]:
    """All platforms of `up` whose cluster answers; what killed machines left behind is removed."""
    return _alive(registered_platforms(), lambda platform: forget_platform(platform.platform))


def live_runs() -> list[RegisteredRun]:
    """All runs whose cluster answers; what killed machines and commands left behind is removed."""
    return _alive(registered_runs(), lambda run: forget_run(Path(run.run_dir)))


def _alive(found: list[Entry], forget: Callable[[Entry], None]) -> list[Entry]:
    """Those whose cluster answers; the others are forgotten."""
    gone = [entry for entry in found if why_silent(entry.address, ANSWER_S)]
    for entry in gone:
        forget(entry)
    return [entry for entry in found if entry not in gone]


def _of_name(job: str) -> RegisteredRun:
    wanted = str(Path(expand_path(job, "--run_dir")).absolute())
    all_ = registered_runs()
    found = [run for run in all_ if run.run_dir == wanted] or [r for r in all_ if Path(r.run_dir).name == job]
    error = why_silent(found[0].address, ANSWER_S) if found else ""
    runs = live_runs()
    if error:
        raise ConfigError(
            f"the run in {found[0].run_dir} does not answer at {found[0].address} ({error}): it has ended or its machine "
            "is gone; its `pretrain` command goes on from its last checkpoint"
        )
    if not found:
        raise ConfigError(f"{job}: no run is going on there; {_known(runs)}")
    if len(found) > 1:
        raise ConfigError(f"{job} is the name of {len(found)} jobs; give a folder: {_known(found)}")
    return found[0]


def _attach(run: RegisteredRun) -> Any:
    adopt_authentication(run)
    from sparseray.platform.cluster import attach

    return attach(run)


def _known(runs: list[RegisteredRun]) -> str:
    platforms = [] if runs else live_platforms()
    if platforms:
        return f"the platform at {platforms[0].address} has none; start one with `pretrain --cluster.address {platforms[0].address}`"
    if not runs:
        return "start one with `python -m sparseray pretrain --config configs/tiny.yaml --data.path DIR`"
    return "going on: " + ", ".join(shlex.quote(run.run_dir) for run in runs)
