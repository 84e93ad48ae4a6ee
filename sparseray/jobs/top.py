"""The `top` command: a running job live in the terminal: speed, loss, load of the experts, slots, events.

Below it the figures that the dashboards show, of every live run and server of this user; where no job trains, they
stand alone.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sparseray.errors import SchedulerLostError, UserError
from sparseray.jobs.running import add_job, connect, live_runs, named
from sparseray.jobs.status import events, head, slots
from sparseray.jobs.watch.figures import Figures, Readings, lines
from sparseray.platform import config as configuration

EXAMPLE = """example:
  python -m sparseray top
  python -m sparseray top runs/first --every 0.5
"""
BARS = " ▁▂▃▄▅▆▇█"
RUNNING = ("starting", "training", "serving", "stopping")
LOST_S = 60.0
RATES_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Run the command until the job ends or Ctrl-C; 0 then, 2 when no job can be asked, 1 when it falls silent."""
    parser = argparse.ArgumentParser(
        prog="sparseray top",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--every", type=float, default=1.0, help="seconds between two looks, default %(default)s"
    )
    parser.add_argument("--once", action="store_true", help="one look, and end")
    add_job(parser)
    options = parser.parse_args(list(arguments))
    every_s = max(0.1, options.every)
    try:
        figures = first_look(options.once)
        # A server alone is no job, and has figures all the same.
        is_job = bool(named(options) or live_runs()) or not any(r.processes for r in figures.look())
        scheduler = connect(named(options)) if is_job else None
        return watch(scheduler, figures, every_s=every_s, is_once=options.once)
    except UserError as error:
        return configuration.die(error)
    except SchedulerLostError as error:
        configuration.die(error)
        return 1
    except KeyboardInterrupt:
        return 0


def watch(scheduler: Any | None, figures: Figures, *, every_s: float, is_once: bool) -> int:
    """Show a job and the figures of all live processes on one screen, until the job or the last process ends.

    Args:
        scheduler: of the job, None where only figures are shown; one that is being restarted is waited for.
        figures: of every live run and server.
        every_s: seconds between two looks.
        is_once: end after one look.
    """
    console, heard, state = Console(), time.monotonic(), ""
    with Live(console=console, auto_refresh=False, screen=console.is_terminal and not is_once) as live:
        while True:
            readings, found = figures.look(), None
            if scheduler is not None and (found := _status(scheduler, heard)):
                heard, state = time.monotonic(), found["state"]
            live.update(screen(scheduler is not None, found, readings), refresh=True)
            has_looked = scheduler is None or found is not None
            is_over = state not in RUNNING if scheduler else not any(r.processes for r in readings)
            if has_looked and (is_once or is_over):
                break
            time.sleep(every_s)
    if state:
        console.print(f"the job is {state}")
    return 0


def _status(scheduler: Any, heard: float) -> dict[str, Any] | None:
    """Ask for a job's status; None while its scheduler is being restarted.

    Args:
        scheduler: of the job.
        heard: when it answered last, `time.monotonic`.

    Raises:
        SchedulerLostError: it has been silent for too long.
    """
    from sparseray.platform.cluster import ask

    try:
        found: dict[str, Any] = ask(scheduler, "status", timeout_s=5.0)
        return found
    except SchedulerLostError:
        if time.monotonic() - heard > LOST_S:
            raise
        return None


def first_look(is_once: bool) -> Figures:
    """Figures to look at; where there is to be one look only, it has another before it, since rates need two."""
    figures = Figures()
    if is_once and figures.look():
        time.sleep(RATES_S)
    return figures


def screen(is_job: bool, found: dict[str, Any] | None, readings: Sequence[Readings]) -> RenderableType:
    """All there is to see: the job, where there is one, and the figures below it."""
    if not is_job:
        return below(readings)
    if found is None:
        return Text("the scheduler does not answer; Ray is restarting it ...", style="red")
    return Group(picture(found), below(readings))


def below(readings: Sequence[Readings]) -> RenderableType:
    """The figures of every run under its name."""
    text = Text()
    for reading in readings:
        text.append(f"figures of {reading.run}\n", style="bold")
        text.append("".join(f"{line}\n" for line in lines(reading)))
    return text


def picture(found: dict[str, Any]) -> RenderableType:
    """Everything on one screen."""
    records = found["records"]
    lines = Text()
    if records:
        lines.append(f"loss      {spark([r['loss'] for r in records])}\n")
        lines.append(f"tokens/s  {spark([r['tokens_per_second'] for r in records], floor=0.0)}\n")
    for layer, row in enumerate(found.get("load", [])):
        mean = sum(row) / len(row) if row else 0.0
        lines.append(
            f"experts {layer} {spark(row, floor=0.0)}  max/mean {max(row) / mean if mean else 0:.2f}\n"
        )
    return Group(head(found), lines, slots(found), Text(), events(found))


def spark(values: Sequence[float], floor: float | None = None) -> str:
    """Draw values as one row of bars; the least is the lowest bar, or `floor` is."""
    if not values:
        return ""
    low = min(values) if floor is None else floor
    span = max(values) - low
    return "".join(
        BARS[1 + round((len(BARS) - 2) * (v - low) / span)] if span > 0 else BARS[1] for v in values
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
