"""The `scale` command: another number of actors for a role of a job that trains or serves.

New slots are started and warmed in the background, state moves between two steps, and what is not
needed any more ends. Neither the loss nor a request notices.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from sparseray.errors import ConfigError, RunFailedError, SchedulerLostError, UserError
from sparseray.jobs.running import add_job, connect, named
from sparseray.platform import config as configuration

EXAMPLE = """example:
  python -m sparseray scale experts 4
  python -m sparseray scale runs/first attention 2
"""
WAIT_S = 180.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 once the job trains at that size, 2 when it is refused, 1 when it does not get there."""
    parser = argparse.ArgumentParser(
        prog="sparseray scale",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_job(parser)
    parser.add_argument("role", choices=("attention", "experts", "memory"))
    parser.add_argument("count", type=int, help="slots that shall play the role")
    parser.add_argument("--no_wait", action="store_true", help="return at once, the change goes on")
    options = parser.parse_args(list(arguments))
    try:
        scale(connect(named(options)), options.role, options.count, wait=not options.no_wait)
    except UserError as error:
        return configuration.die(error)
    except (RunFailedError, SchedulerLostError) as error:
        configuration.die(error)
        return 1
    return 0


def scale(
    scheduler: Any, role: str, count: int, *, wait: bool = True, wait_s: float = WAIT_S
) -> dict[str, Any]:
    """Ask a running job for another number of slots of a role, and wait until it trains with them.

    Args:
        scheduler: of the job, from `running.connect`.
        role: "attention", "experts" or "memory".
        count: wanted number of slots.
        wait: return only when the plan is as wanted and has made a step.
        wait_s: seconds after which that is given up (the request stands).

    Returns:
        The job's status at the end.

    Raises:
        ConfigError: it is refused; nothing was changed.
        RunFailedError: the job ended or did not get there in time.
    """
    from sparseray.platform.cluster import ask

    refused: str = ask(scheduler, "scale", role, count)
    if refused:
        raise ConfigError(refused)
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        status: dict[str, Any] = ask(scheduler, "status")
        line = f"{role}: {status['sizes']} (attention+experts+memory), {status['starting']} slots starting"
        if line != shown:
            print(line, file=sys.stderr, flush=True)
            shown = line
        if not wait or (status["settled"] and status["wanted"][role] == count):
            print(
                f"{status['state']} goes on with {status['sizes']} (attention+experts+memory), "
                f"generation {status['generation']}"
                if wait
                else "asked; `python -m sparseray status` shows when it is done",
                flush=True,
            )
            return status
        if status["state"] not in ("training", "serving"):
            raise RunFailedError(f"the job is {status['state']}; it ended before it reached {role} {count}")
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"{role} {count} was not reached within {wait_s:g} s; see `sparseray status`"
            )
        time.sleep(0.1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
