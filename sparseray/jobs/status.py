"""The `status` command: who plays what in a running job, how many replicas there are, what happened last."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparseray.errors import SchedulerLostError, UserError
from sparseray.jobs.running import add_job, connect, named
from sparseray.platform import config as configuration

EXAMPLE = """example:
  python -m sparseray status
  python -m sparseray status runs/first --json
"""
STYLES = {
    "lent": "magenta",
    "returned": "magenta",
    "lost": "red",
    "recovered": "green",
    "mended": "green",
    "staged": "cyan",
    "resized": "cyan",
    "draining": "yellow",
    "drained": "cyan",
    "rebalanced": "cyan",
    "autoscaled": "cyan",
    "published": "green",
    "refused": "yellow",
    "restored": "yellow",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 with the status, 2 when no job can be asked, 1 when it does not answer."""
    parser = argparse.ArgumentParser(
        prog="sparseray status",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="all there is, for programs")
    add_job(parser)
    options = parser.parse_args(list(arguments))
    try:
        show(connect(named(options)), as_json=options.json)
    except UserError as error:
        return configuration.die(error)
    except SchedulerLostError as error:
        configuration.die(error)
        return 1
    return 0


def show(scheduler: Any, *, as_json: bool) -> None:
    """Print the status of a job."""
    from sparseray.platform.cluster import ask

    found = ask(scheduler, "status")
    if as_json:
        print(json.dumps(found))
    else:
        Console().print(Group(head(found), slots(found), events(found)))


def head(found: dict[str, Any]) -> Text:
    """A few lines on the whole job."""
    lines = [f"run       {found['run_dir']}", f"state     {found['state']}"]
    if found["records"]:
        last = found["records"][-1]
        lines.append(
            f"step      {last['step']} of {found['steps']}, loss {last['loss']:.4f}, "
            f"{last['tokens_per_second']:,.0f} tokens/s"
        )
    if "generation" in found:
        replicas = found["replicas"]
        wanted = "+".join(str(found["wanted"][role]) for role in ("attention", "experts", "memory"))
        lines += [
            f"plan      generation {found['generation']}: {found['sizes']} (attention+experts+memory), wanted {wanted}, "
            f"{found['starting']} starting, room for {found['room']} more",
            f"replicas  {replicas['actual']} of {replicas['target']}",
            f"goodput   {found['goodput']:.3f}",
        ]
        if found["versions"]:
            lines.append(f"weights   {found['versions'][-1]}")
            lines += [
                f"          {name}, whose requests are being finished" for name in found["versions"][:-1]
            ]
    if draining := found.get("draining"):
        lines.append(f"draining  {_leaving(draining)}")
    if found.get("lent"):
        lines.append(f"lent      {found['lent']} slots to serving; they come back when it does not need them")
    if pool := found.get("pool"):
        waiting = f", {pool['waiting']} leases wait" if pool["waiting"] else ""
        lines.append(
            f"pool      {pool['leased']} leased, {pool['free']} free, {pool['starting']} starting{waiting}"
        )
    return Text("\n".join(lines))


def _leaving(draining: dict[str, int | None]) -> str:
    """Slots on nodes that are to be drained, and the time that is left to them."""
    known = [left_s for left_s in draining.values() if left_s is not None]
    when = f", the first is gone in {max(0, min(known))} s" if known else ""
    slots = f"slot {next(iter(draining))} is" if len(draining) == 1 else f"slots {', '.join(draining)} are"
    return f"{slots} on a node that Ray drains{when}"


def slots(found: dict[str, Any]) -> RenderableType:
    """A line for every slot."""
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for name in ("slot", "pid", "node", "roles", "logical shards", "experts", "buckets", "heard"):
        table.add_column(
            name, justify="right" if name in ("slot", "pid", "experts", "buckets", "heard") else "left"
        )
    for slot in found.get("slots", []):
        table.add_row(
            str(slot["slot"]),
            str(slot["pid"]),
            slot["node"][:8],
            ", ".join(slot["roles"]),
            ", ".join(map(str, slot["shards"])) or "-",
            str(slot["experts"]),
            str(slot["buckets"]),
            f"{slot['heartbeat_age_s'] * 1000:.0f} ms ago",
        )
    return table


def events(found: dict[str, Any]) -> Text:
    """The last events, oldest first."""
    text = Text("last events\n" if found["events"] else "no events yet\n", style="bold")
    for event in found["events"]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        text.append(f"{clock}  step {event['step']:>6}  ", style="dim")
        text.append(f"{event['kind']:10} ", style=STYLES.get(event["kind"], ""))
        text.append(f"{event['text']}\n", style="default")
    return text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
