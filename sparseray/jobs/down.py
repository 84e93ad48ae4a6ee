"""The `down` command: ends a platform that `up` started; its runs stop after their step, with a checkpoint."""

import argparse
import sys
from collections.abc import Sequence

from sparseray.errors import ConfigError, SchedulerLostError, UserError
from sparseray.jobs.running import live_platforms
from sparseray.platform import config as configuration
from sparseray.platform.head import stop_head
from sparseray.platform.run.registry import RegisteredPlatform, adopt_authentication, forget_platform

EXAMPLE = """example:
  python -m sparseray down
  python -m sparseray down --address 127.0.0.1:6379
"""
CLOSE_S = 120.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 once nothing of the platform is left, 2 if there is none, 1 if something had to be killed."""
    parser = argparse.ArgumentParser(
        prog="sparseray down",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", default="", help="of the platform; not needed while there is one alone")
    options = parser.parse_args(list(arguments))
    try:
        return down(options.address)
    except UserError as error:
        return configuration.die(error)


def _find(address: str) -> RegisteredPlatform:
    there = live_platforms()
    found = [platform for platform in there if not address or platform.address == address]
    if len(found) == 1:
        return found[0]
    known = ", ".join(platform.address for platform in there)
    if not there:
        raise ConfigError("no platform is up; start one with `python -m sparseray up`")
    raise ConfigError(f"{len(there)} platforms are up, at {known}; name one of them with --address")


def down(address: str) -> int:
    """End the platform at an address, and the Ray that was started for it; the exit code.

    Raises:
        ConfigError: there is none, or several and none was named.
    """
    found = _find(address)
    adopt_authentication(found)
    from sparseray.platform.cluster import ask, connect, detach, end_platform, find_platform

    code = 0
    connect(found.address)
    platform = find_platform()
    try:
        late = ask(platform, "close", timeout_s=CLOSE_S) if platform is not None else []
        for folder in late:
            print(f"{folder} did not stop in time and goes on from its last checkpoint", file=sys.stderr)
        code = 1 if late else 0
    except SchedulerLostError as error:
        print(f"the scheduler did not end by itself: {error}", file=sys.stderr)
        code = 1
    end_platform(found.platform)
    detach()
    stop_head(found.head)
    forget_platform(found.platform)
    print(f"the platform at {found.address} is down", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
