"""Serving under kills, hangs, resizes and load, in real processes: what clients see of it.

Every line of the table has its target beside it; gaps are the longest wait for a token of any stream, beyond that of an
undisturbed turn of the same streams. All parts in one call take about an hour; some of them:

  PYTHONPATH=. python benchmarks/serving.py --checkpoint RUN/checkpoints/step_2 --out benchmarks/results/serving_cpu_DATE.md
  PYTHONPATH=. python benchmarks/serving.py --checkpoint RUN/checkpoints/step_2 --only kill,hang,scale
"""

import argparse
import os
import platform
import random
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import ray
import torch

from benchmarks.elastic_parts import Row
from benchmarks.serving_http import http
from benchmarks.serving_load import Answer, Load, Seen, compare
from benchmarks.serving_run import Server

WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}


@dataclass(kw_only=True)
class Bench:
    """What the parts share.

    Args:
        checkpoint: to serve.
        streams: at once; twice as many where engines are killed.
        tokens: of each stream.
        repeats: kills of an engine.
        minutes: of the part with a kill every ten seconds.
        cycles: changes of plan in the soak.
        source: all choices of victims come from here.
    """

    checkpoint: Path
    streams: int
    tokens: int
    repeats: int
    minutes: float
    cycles: int
    source: random.Random
    rows: list[Row] = field(default_factory=list)
    expected: dict[int, list[int]] = field(default_factory=dict)

    def server(self, **roles: int) -> Server:
        """Start a server of the usual shape.

        Args:
            roles: other numbers of slots.
        """
        options = [f"--cluster.{name}={value}" for name, value in {**WIDE, **roles}.items()]
        return Server(self.checkpoint, *options, "--serve.max_waiting", "1024", "--serve.drain_s", "30")

    def load(self, server: Server, at: Mapping[int, Callable[[], object]] | None = None) -> Load:
        """Streams to a server.

        Args:
            server: it.
            at: what happens at which token.
        """
        return Load(port=server.port, max_tokens=self.tokens, at=at or {})

    def undisturbed(self, server: Server, streams: int) -> Seen:
        """Answer the streams once without any fault, after a turn that warms the server.

        Args:
            server: it.
            streams: at once.
        """
        self.load(server).ask(range(streams))
        answers = self.load(server).ask(range(streams))
        self.expected |= {answer.seed: answer.tokens for answer in answers}
        return compare(answers, self.expected)

    def add(self, part: str, what: str, seen: Seen, plain: Seen, limit_s: float) -> None:
        """Take a line and show it at once.

        Args:
            part, what: of the table.
            seen, plain: with and without the fault.
            limit_s: that the gap must keep.
        """
        gap_s = seen.worst_gap_s - plain.worst_gap_s
        measured = (
            f"{seen.failed} of {seen.streams} failed, {seen.other} with other tokens; worst gap {1000 * gap_s:.0f} ms "
            f"beyond {1000 * plain.worst_gap_s:.0f} ms{'; ' + seen.why if seen.why else ''}"
        )
        target = f"0, 0, {1000 * limit_s:.0f} ms"
        self.line(
            Row(
                part=part,
                what=what,
                measured=measured,
                target=target,
                is_met=not seen.failed and not seen.other and gap_s <= limit_s,
            )
        )

    def line(self, row: Row) -> None:
        """Take a line and show it at once."""
        print(
            f"[{row.part}] {row.what}: {row.measured} {({True: 'met', False: 'NOT MET', None: ''})[row.is_met]}",
            flush=True,
        )
        self.rows.append(row)


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
        plain = compare(bench.load(server).keep(bench.streams, range(bench.streams), 15.0), bench.expected)
        for role, counts in (("attention", (2, 3, 2, 1)), ("expert", (2, 1))):

            def change(role: str = role, counts: tuple[int, ...] = counts) -> None:
                for count in counts:
                    server.scale(role, count)
                    time.sleep(3.0)

            load = bench.load(server, {bench.streams: change})
            seen = compare(load.keep(bench.streams, range(bench.streams), 20.0), bench.expected)
            what = f"{role} 1-{'-'.join(map(str, counts))}, {bench.streams} streams"
            bench.add("scale", what, seen, plain, 0.15)


def scheduler(bench: Bench) -> None:
    """The scheduler is killed."""
    with bench.server() as server:
        plain = bench.undisturbed(server, bench.streams)
        pid = server.ask("pid")
        load = bench.load(server, {bench.streams * 2: lambda: os.kill(pid, signal.SIGKILL)})
        seen = compare(load.ask(range(bench.streams)), bench.expected)
        bench.add("scheduler", f"SIGKILL, {bench.streams} streams", seen, plain, 0.1)


def versions(bench: Bench) -> None:
    """Another checkpoint of the same run is published into two engines under load, and the first one again."""
    found = sorted(bench.checkpoint.parent.glob("step_*"))
    other = next((path for path in found if path != bench.checkpoint), None)
    if other is None:
        raise FileNotFoundError(f"{bench.checkpoint.parent} has one checkpoint; give a run with two or more")
    with bench.server(standby=0) as server:
        plain = bench.undisturbed(server, bench.streams)
        for new in (other, bench.checkpoint):
            publish_to(bench, server, new, plain)


def publish_to(bench: Bench, server: Server, new: Path, plain: Seen) -> None:
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


def kills(bench: Bench) -> None:
    """A random slot dies every ten seconds under constant load."""
    with bench.server(standby=2) as server:
        bench.undisturbed(server, bench.streams)
        plain = compare(bench.load(server).keep(bench.streams, range(bench.streams), 30.0), bench.expected)
        end, done = time.monotonic() + bench.minutes * 60, list[str]()

        def strike() -> None:
            while time.monotonic() < end - 5.0:
                role = bench.source.choice(("attention", "expert", "memory"))
                server.settle()
                server.strike(role, signal.SIGKILL, bench.source.randrange(2))
                done.append(role)
                time.sleep(10.0)

        load = bench.load(server, {bench.streams: strike})
        seen = compare(load.keep(bench.streams, range(bench.streams), bench.minutes * 60), bench.expected)
        what = f"{len(done)} kills in {bench.minutes:g} minutes, {bench.streams} streams"
        bench.add("kills", what, seen, plain, 60.0)
        ratio = seen.tokens_per_s / plain.tokens_per_s
        measured = f"{ratio:.2f} ({seen.tokens_per_s:.0f} of {plain.tokens_per_s:.0f} tokens/s)"
        bench.line(
            Row(
                part="kills",
                what="throughput against undisturbed",
                measured=measured,
                target="0.8",
                is_met=ratio >= 0.8,
            )
        )


def soak(bench: Bench) -> None:
    """Many changes of plan: nothing is left of them."""
    with bench.server() as server:
        plain = bench.undisturbed(server, bench.streams)

        def held() -> tuple[int, int, int]:
            processes = server.processes()
            return (
                len(processes),
                sum(p.num_fds() for p in processes),
                sum(p.memory_info().rss for p in processes),
            )

        answers, before = list[Answer](), held()
        for turn in range(bench.cycles):
            load = bench.load(server, {bench.streams: partial(server.scale, "expert", 1 + turn % 2)})
            answers += load.ask(range(bench.streams))
            server.settle()
            if turn == 1:
                before = held()
        server.settle()
        after = held()
        what = f"{bench.cycles} changes of plan, {len(answers)} streams"
        bench.add("soak", what, compare(answers, bench.expected), plain, 0.5)
        measured = f"processes {before[0]} to {after[0]}, files {before[1]} to {after[1]}, memory {before[2] / 1e6:.0f} to {after[2] / 1e6:.0f} MB"
        is_met = after[0] <= before[0] and after[1] <= before[1] * 1.05 and after[2] <= before[2] * 1.1
        bench.line(
            Row(
                part="soak",
                what="held after the second change and the last",
                measured=measured,
                target="no more",
                is_met=is_met,
            )
        )
        server.stop()


def start(bench: Bench) -> None:
    """From the command to the first answer."""
    seconds = []
    for _ in range(3):
        with bench.server(
            attention_workers=1, expert_shards=1, memory_shards=1, replication=1, standby=0
        ) as server:
            seconds.append(server.start_s)
    middle = statistics.median(seconds)
    bench.line(
        Row(
            part="start",
            what="`serve` to its first word",
            measured=f"{middle:.1f} s",
            target="10 s",
            is_met=middle <= 10.0,
        )
    )


def path(bench: Bench) -> None:
    """The HTTP path alone."""
    for row in http():
        bench.line(row)


PARTS: dict[str, Callable[[Bench], None]] = {
    "start": start,
    "http": path,
    "shards": shards,
    "engines": engines,
    "scale": scale,
    "scheduler": scheduler,
    "versions": versions,
    "kills": kills,
    "soak": soak,
}


def options_of() -> argparse.Namespace:
    """Read the command line."""
    names = ",".join(PARTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the tiny model")
    parser.add_argument("--only", default=names, help=f"parts, with commas between; default all: {names}")
    parser.add_argument("--streams", type=int, default=50, help="at once; twice as many at killed engines")
    parser.add_argument("--tokens", type=int, default=48, help="of each stream")
    parser.add_argument("--repeats", type=int, default=20, help="kills of an engine")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a kill every ten seconds")
    parser.add_argument("--cycles", type=int, default=20, help="changes of plan in the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    found = parser.parse_args()
    found.parts = found.only.split(",")
    if unknown := sorted(set(found.parts) - set(PARTS)):
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {names}")
    return found


def table(bench: Bench, seconds: float) -> str:
    """Render the result.

    Args:
        bench: with its lines.
        seconds: that all took.
    """
    verdicts = {True: "yes", False: "**no**", None: ""}
    lines = [
        f"| {r.part} | {r.what} | {r.measured} | {r.target} | {verdicts[r.is_met]} |" for r in bench.rows
    ]
    return "\n".join(
        [
            "# Serving on one CPU",
            "",
            f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}; "
            f"{bench.tokens} tokens a stream; 2 engines, 2 expert shards, 2 memory shards, replication 2 and one standby slot "
            f"where the line does not say otherwise, one-threaded processes. All in {seconds / 60:.0f} minutes.",
            "",
            "| part | what | measured | target | met |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> int:
    """Measure the parts one after another; 1 when a target is missed or a part fails."""
    options, started = options_of(), time.monotonic()
    bench = Bench(
        checkpoint=options.checkpoint.absolute(),
        streams=options.streams,
        tokens=options.tokens,
        repeats=options.repeats,
        minutes=options.minutes,
        cycles=options.cycles,
        source=random.Random(options.seed),
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for name in options.parts:
        try:
            PARTS[name](bench)
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            text = " ".join(str(error).split()).replace("|", "/")[:300]
            bench.line(
                Row(part=name, what="the part failed", measured=text, target="no failure", is_met=False)
            )
    result = table(bench, time.monotonic() - started)
    print(result)
    if options.out:
        options.out.write_text(result)
    return 0 if all(row.is_met is not False for row in bench.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
