"""The short parts of benchmarks/serving.py: kills, hangs, a GCS that is away, resizes and new weights under open streams."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.serving_bench import Bench
from benchmarks.serving_load import Answer, Seen, compare
from benchmarks.serving_run import Server

GCS_DOWN_S, AROUND_S = 10.0, 3.0
CHANGE_EVERY_S, RESTART_S = 3.0, 10.0


def shards(bench: Bench) -> None:
    """Expert and memory shards are killed, and stopped."""
    for number, limit_s in ((signal.SIGKILL, 0.5), (signal.SIGSTOP, 1.5)):
        with bench.server() as server:
            plain = bench.undisturbed(server, bench.streams)
            for role in ("expert", "memory"):
                server.settle()
                at = {bench.streams * bench.tokens // 3: partial(server.strike, role, number)}
                answers = bench.load(server, at).ask(range(bench.streams))
                what = f"{role} shard {number.name}, {bench.streams} streams"
                bench.add("shards", what, compare(answers, bench.expected), plain, limit_s)


def engines(bench: Bench) -> None:
    """An engine of two is killed, again and again, and stopped once."""
    streams, kills = 2 * bench.streams, list[Answer]()
    with bench.server(standby=2) as server:
        plain = bench.undisturbed(server, streams)
        for turn in range(bench.repeats):
            server.settle()
            at = {streams * bench.tokens // 3: partial(server.strike, "attention", signal.SIGKILL, turn)}
            kills += bench.load(server, at).ask(range(streams))
        what = f"engine of two SIGKILL, {streams} streams, {bench.repeats} times"
        bench.add("engines", what, compare(kills, bench.expected), plain, 60.0)
        server.settle()
        at = {streams * bench.tokens // 3: partial(server.strike, "attention", signal.SIGSTOP)}
        seen = compare(bench.load(server, at).ask(range(streams)), bench.expected)
        bench.add("engines", f"engine of two SIGSTOP, {streams} streams", seen, plain, 60.0)


def scale(bench: Bench) -> None:
    """Engines and expert shards come and go under load."""
    with bench.server(attention_workers=1, expert_shards=1, replication=1) as server:
        bench.undisturbed(server, bench.streams)
        for role, counts in (("attention", (2, 3, 2, 1)), ("expert", (2, 1))):
            server.settle()
            seconds = CHANGE_EVERY_S * (len(counts) + 2)
            plain = bench.kept(server, seconds)
            seen = bench.kept(server, seconds, {bench.streams: partial(_change, server, role, counts)})
            what = f"{role} 1-{'-'.join(map(str, counts))}, {bench.streams} streams"
            bench.add("scale", what, seen, plain, 0.15)


def _change(server: Server, role: str, counts: Sequence[int]) -> None:
    for count in counts:
        server.scale(role, count)
        time.sleep(CHANGE_EVERY_S)


def scheduler(bench: Bench) -> None:
    """The scheduler is killed, and another one starts beside the streams."""
    with bench.server() as server:
        bench.undisturbed(server, bench.streams)
        plain = bench.kept(server, RESTART_S)
        pid = server.ask("pid")
        seen = bench.kept(server, RESTART_S, {bench.streams * 2: lambda: os.kill(pid, signal.SIGKILL)})
        bench.add("scheduler", f"SIGKILL, {bench.streams} streams", seen, plain, 0.1)
        server.settle()


def gcs(bench: Bench) -> None:
    """Ray's head service stands still for ten seconds; what Ray is asked for meanwhile waits."""
    with bench.server() as server:
        bench.undisturbed(server, bench.streams)
        plain = bench.kept(server, GCS_DOWN_S + 2 * AROUND_S)

        def stand_still() -> None:
            (service,) = (process for process in server.processes() if process.name() == "gcs_server")
            time.sleep(AROUND_S)
            service.suspend()
            time.sleep(GCS_DOWN_S)
            service.resume()

        seen = bench.kept(server, GCS_DOWN_S + 2 * AROUND_S, {bench.streams: stand_still})
        bench.add("gcs", f"SIGSTOP for {GCS_DOWN_S:g} s, {bench.streams} streams", seen, plain, 0.1)
        # It can be told something again.
        server.scale("expert", 3)


def versions(bench: Bench) -> None:
    """Another checkpoint of the same run is published into two engines under load, and the first one again."""
    found = sorted(bench.checkpoint.parent.glob("step_*"))
    other = next((path for path in found if path != bench.checkpoint), None)
    if other is None:
        raise FileNotFoundError(f"{bench.checkpoint.parent} has one checkpoint; give a run with two or more")
    with bench.server(standby=0) as server:
        plain = bench.undisturbed(server, bench.streams)
        for new in (other, bench.checkpoint):
            _publish(bench, server, new, plain)


def _publish(bench: Bench, server: Server, new: Path, plain: Seen) -> None:
    """Publish a checkpoint while streams are open, which end with the version that they began with.

    Args:
        bench: takes the line.
        server: it.
        new: the checkpoint.
        plain: without it.
    """
    told: list[str] = []
    load = bench.load(server, {bench.streams * 2: lambda: told.extend(server.ask("publish", str(new)))})
    seen = compare(load.ask(range(bench.streams)), bench.expected)
    server.wait(lambda: told and (told[1] or server.ask("status")["versions"] == told[:1]), f"{new.name}")
    what = f"{new.name} published into 2 engines, {bench.streams} streams"
    bench.add("versions", what, replace(seen, why=told[1]), plain, 0.1)
    bench.expected |= {a.seed: a.tokens for a in bench.load(server).ask(range(bench.streams))}
