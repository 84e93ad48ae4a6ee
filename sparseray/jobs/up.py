"""The `up` command: a platform by itself, with warm slots, that training runs and servers join and leave.

It outlives the command; `down` ends it. Jobs on it start within moments, several go on side by side, and a training
run can lend its slots to a server (cluster.lend).
"""

import argparse
import math
import os
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sparseray.errors import RunFailedError, SchedulerLostError, UserError
from sparseray.jobs.running import live_platforms
from sparseray.platform import config as configuration
from sparseray.platform.cluster_config import ClusterConfig
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.head import start_head, stop_head
from sparseray.platform.ray_settings import local_cpus
from sparseray.platform.run.registry import RegisteredPlatform, platform_folder, register_platform

EXAMPLE = """example:
  python -m sparseray up --slots 3
  python -m sparseray up --slots 2 --cpus_per_slot 4 --threads_per_slot 4
  python -m sparseray pretrain --config configs/tiny.yaml --data.path data/stdlib --cluster.address auto
  python -m sparseray down
"""
WARM_S = 180.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 once the platform is there, 2 for a user's mistake, 1 if its slots did not come up."""
    parser = argparse.ArgumentParser(
        prog="sparseray up",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--slots", type=int, default=0, help="slots to keep warm, default %(default)s")
    parser.add_argument(
        "--max_slots",
        type=int,
        default=0,
        help="slots that a Ray of its own has room for; without it, twice as many as are kept, and 16 CPUs at least",
    )
    parser.add_argument(
        "--address", default="", help="Ray to start it on; without it, one of its own on loopback"
    )
    parser.add_argument(
        "--cpus_per_slot",
        type=float,
        default=Kind.cpus,
        help="CPUs that a slot reserves, default %(default)s",
    )
    parser.add_argument(
        "--threads_per_slot",
        type=int,
        default=Kind.threads,
        help="torch threads of a slot, default %(default)s",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: a slot reserves a GPU, default %(default)s",
    )
    options = parser.parse_args(list(arguments))
    for name, least in (("slots", 0), ("max_slots", 0), ("cpus_per_slot", 0), ("threads_per_slot", 1)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name} {value:g}: give a number from {least}")
    if 0 < options.max_slots < options.slots:
        parser.error(f"--max_slots {options.max_slots}: give as many as --slots {options.slots} at least")
    kind = Kind(cpus=options.cpus_per_slot, gpus=options.device == "cuda", threads=options.threads_per_slot)
    try:
        up(options.slots, options.address, kind, max_slots=options.max_slots)
    except UserError as error:
        return configuration.die(error)
    except (RunFailedError, SchedulerLostError) as error:
        configuration.die(error)
        return 1
    return 0


def up(slots: int, address: str, kind: Kind, *, max_slots: int) -> None:
    """Start a platform, unless there is one, and print what a person should know of it.

    Args:
        slots, address, kind, max_slots: as in `begin`.

    Raises:
        ClusterError, RunFailedError: as in `begin`.
    """
    for found in live_platforms():
        if not address or found.address == address:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.time))
            print(f"a platform is up already, since {since}\n{_usage(found.address, kind)}", flush=True)
            return
    if address not in ("", "auto"):
        from sparseray.platform.checks import check_start

        check_start(ClusterConfig(address=address))
    print("starting Ray and the platform ...", file=sys.stderr, flush=True)
    found = begin(slots, address, kind, max_slots=max_slots)
    where = f"the Ray at {address}" if address else f"a Ray of its own at {found.address}"
    print(
        f"the platform is up on {where}, with {slots} warm slots\n{_usage(found.address, kind)}", flush=True
    )


def begin(slots: int, address: str, kind: Kind, *, max_slots: int = 0) -> RegisteredPlatform:
    """Start a platform, whether or not there is another.

    Args:
        slots: to keep warm.
        address: of the Ray to start it on; empty for one of its own.
        kind: of these slots.
        max_slots: that a Ray of its own has room for; 0 for twice as many as are kept, and some.

    Raises:
        ClusterError: Ray cannot be started or reached.
        RunFailedError: the slots do not come up.
    """
    platform, head = uuid.uuid4().hex, 0
    if not address:
        num_cpus = math.ceil(max_slots * kind.cpus) if max_slots else local_cpus(2 * slots * kind.cpus)
        address, head = start_head(num_cpus, platform_folder(platform) / "ray.log")
    from sparseray.platform.cluster import connect, detach, start_platform

    try:
        connect(address)
        _wait_until_warm(start_platform(platform, lasts=True, kept=slots, kind=kind), slots)
    except BaseException:
        stop_head(head)
        raise
    finally:
        detach()
    auth = os.environ.get("RAY_AUTH_MODE", "")
    found = RegisteredPlatform(platform=platform, address=address, auth=auth, head=head, time=time.time())
    register_platform(found)
    return found


def _wait_until_warm(scheduler: Any, slots: int) -> None:
    from sparseray.platform.cluster import ask

    deadline = time.monotonic() + WARM_S
    while (found := ask(scheduler, "pool"))["free"] + found["leased"] < slots:
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"{slots - found['free']} of {slots} slots did not start within {WARM_S:g} s; ask for fewer (--slots)"
            )
        time.sleep(0.1)


def _usage(address: str, kind: Kind) -> str:
    # A lease takes an actor of its own kind alone.
    own = "".join(
        f" --cluster.{name} {value:g}"
        for name, value, usual in (
            ("cpus_per_slot", kind.cpus, Kind.cpus),
            ("threads_per_slot", kind.threads, Kind.threads),
        )
        if value != usual
    ) + (" --cluster.device cuda" if kind.gpus else "")
    return (
        f"  python -m sparseray pretrain --cluster.address {address}{own} ...   trains on it\n"
        f"  python -m sparseray serve --cluster.address {address}{own} ...      serves on it\n"
        "  python -m sparseray down                                       ends it"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
