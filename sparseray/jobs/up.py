"""The `up` command: a platform by itself, with warm slots, that training runs and servers join and leave.

It outlives the command; `down` ends it. Jobs on it start within moments, several go on side by side, and a training
run can lend its slots to a server (cluster.lend).
"""

import argparse
import os
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sparseray.errors import RunFailedError, SchedulerLostError, UserError
from sparseray.jobs.running import live_platforms
from sparseray.platform import config as configuration
from sparseray.platform.head import start_head, stop_head
from sparseray.platform.run.registry import RegisteredPlatform, platform_folder, register_platform

EXAMPLE = """example:
  python -m sparseray up --slots 3
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
        "--address", default="", help="Ray to start it on; without it, one of its own on loopback"
    )
    options = parser.parse_args(list(arguments))
    if options.slots < 0:
        parser.error(f"--slots {options.slots}: give a number from 0")
    try:
        print(up(options.slots, options.address), flush=True)
    except UserError as error:
        return configuration.die(error)
    except (RunFailedError, SchedulerLostError) as error:
        configuration.die(error)
        return 1
    return 0


def up(slots: int, address: str) -> str:
    """Start a platform, and return what a person should know of it; one that is there already stays as it is.

    Args:
        slots: to keep warm.
        address: of the Ray to start it on; empty for one of its own.

    Raises:
        ClusterError: Ray cannot be started or reached.
        RunFailedError: the slots do not come up.
    """
    for found in live_platforms():
        if not address or found.address == address:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.time))
            return f"a platform is up already, since {since}\n{_usage(found.address)}"
    print("starting Ray and the platform ...", file=sys.stderr, flush=True)
    platform, head, is_own = uuid.uuid4().hex, 0, not address
    if is_own:
        address, head = start_head(2 * slots, platform_folder(platform) / "ray.log")
    from sparseray.platform.cluster import connect, detach, start_platform

    try:
        connect(address)
        _wait_until_warm(start_platform(platform, lasts=True, kept=slots), slots)
    except BaseException:
        stop_head(head)
        raise
    finally:
        detach()
    auth = os.environ.get("RAY_AUTH_MODE", "")
    register_platform(
        RegisteredPlatform(platform=platform, address=address, auth=auth, head=head, time=time.time())
    )
    where = "a Ray of its own at" if is_own else "the Ray at"
    return f"the platform is up on {where} {address}, with {slots} warm slots\n{_usage(address)}"


def _wait_until_warm(scheduler: Any, slots: int) -> None:
    from sparseray.platform.cluster import ask

    deadline = time.monotonic() + WARM_S
    while (found := ask(scheduler, "pool"))["free"] + found["leased"] < slots:
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"{slots - found['free']} of {slots} slots did not start within {WARM_S:g} s; ask for fewer (--slots)"
            )
        time.sleep(0.1)


def _usage(address: str) -> str:
    return (
        f"  python -m sparseray pretrain --cluster.address {address} ...   trains on it\n"
        f"  python -m sparseray serve --cluster.address {address} ...      serves on it\n"
        "  python -m sparseray down                                       ends it"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
