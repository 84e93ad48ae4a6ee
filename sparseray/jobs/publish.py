"""The `publish` command: other weights for a server that goes on answering.

Slots read them beside those that they serve and go over between two steps; no request notices.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseray.errors import ConfigError, SchedulerLostError, UserError
from sparseray.jobs.running import add_job, connect, live_runs, named
from sparseray.platform import config as configuration
from sparseray.platform.metrics.discovery import state_directory
from sparseray.platform.settings import expand_path

EXAMPLE = """example:
  python -m sparseray publish --checkpoint runs/first/checkpoints/step_200
  python -m sparseray publish
  python -m sparseray publish sparseray
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 once the server has taken the weights, 2 when they are refused, 1 when it is silent."""
    parser = argparse.ArgumentParser(
        prog="sparseray publish",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_job(parser)
    parser.add_argument(
        "--checkpoint",
        default="",
        help="folder of the weights; without it, what the run that the server follows has now",
    )
    options = parser.parse_args(list(arguments))
    try:
        checkpoint = ""
        if options.checkpoint:
            checkpoint = str(Path(expand_path(options.checkpoint, "--checkpoint")).absolute())
        print(publish(named(options) or only_server(), checkpoint), flush=True)
    except UserError as error:
        return configuration.die(error)
    except SchedulerLostError as error:
        configuration.die(error)
        return 1
    return 0


def publish(server: str, checkpoint: str) -> str:
    """Have a server go on with other weights, and say what comes of it.

    Args:
        server: its folder, or its name.
        checkpoint: folder of the weights; empty for what the run that it follows has now.

    Raises:
        ConfigError: they are refused; nothing was changed.
    """
    scheduler = connect(server)
    from sparseray.platform.cluster import ask

    name, refused = ask(scheduler, "publish", checkpoint)
    if refused:
        raise ConfigError(refused)
    return f"{name} is read beside what is served; `python -m sparseray status --run_dir {server}` shows when it answers"


def only_server() -> str:
    """The one server of this user that runs.

    Raises:
        ConfigError: there is none, or several.
    """
    found = [r.run_dir for r in live_runs() if Path(r.run_dir).is_relative_to(state_directory() / "servers")]
    if not found:
        raise ConfigError("no server runs; start one with `python -m sparseray serve`")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} servers run; name one, or give its --run_dir: {', '.join(found)}")
    return found[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
