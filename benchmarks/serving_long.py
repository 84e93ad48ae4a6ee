"""The parts of benchmarks/serving.py that measure over time: start, throughput, a load that grows, kills, changes of plan."""

import signal
import statistics
import time
from functools import partial

from benchmarks.serving_bench import NARROW, Bench
from benchmarks.serving_load import Answer, Load, compare, held_from
from benchmarks.serving_run import Server

PLAIN_S, KILL_EVERY_S = 30.0, 10.0
SHORT, PLACES, TARGET_S = 16, 2, 0.3
"""Of the load that grows: tokens of a request, places in an engine's batch, time to the first token."""
CALM_S, STEP_S = 5.0, 20.0


def start(bench: Bench) -> None:
    """From the command to an engine that answers."""
    seconds = []
    for _ in range(3):
        with bench.server(**{**NARROW, "standby": 0}) as server:
            seconds.append(server.start_s)
    middle = statistics.median(seconds)
    measured = f"{middle:.1f} s ({', '.join(f'{s:.1f}' for s in seconds)})"
    bench.line("start", "`serve` to `/ready`, median of three", measured, "10 s", middle <= 10.0)


def throughput(bench: Bench) -> None:
    """Two engines against one, each with a full batch and more."""
    with bench.server(**NARROW) as server:
        bench.undisturbed(server, bench.streams)
        one = bench.kept(server, PLAIN_S)
        server.scale("attention", 2)
        server.settle()
        # The new one compiles nothing, but its first steps are slower.
        bench.load(server).ask(range(bench.streams))
        two = bench.kept(server, PLAIN_S)
        ratio = two.tokens_per_s / one.tokens_per_s
        measured = f"{ratio:.2f} ({two.tokens_per_s:.0f} of {one.tokens_per_s:.0f} tokens/s)"
        bench.line("throughput", f"2 engines against 1, {bench.streams} streams", measured)


def load(bench: Bench) -> None:
    """Four times the load finds another engine, and then nothing changes."""
    options = (
        f"--serve.max_batch={PLACES}",
        "--serve.max_engines=3",
        f"--serve.target_ttft_ms={1000 * TARGET_S:.0f}",
    )
    with bench.server(*options, **NARROW) as server:
        stream = Load(port=server.port, max_tokens=SHORT)
        stream.keep(PLACES, range(PLACES), 2.0)
        # One after another: at such a rate half a place of the two is taken, and all of four are not enough.
        alone = stream.keep(1, range(8), CALM_S)
        per_s = 0.5 * len(alone) / CALM_S
        stream.arrive(per_s, CALM_S, bench.source)
        server.settle()
        begun, begun_unix = time.monotonic(), time.time()
        answers = stream.arrive(4 * per_s, STEP_S, bench.source)
        held_s = held_from(answers, TARGET_S, begun)
        failed = sum(bool(answer.error) for answer in answers)
        what = f"from {per_s:.1f} to {4 * per_s:.1f} requests/s, a warm standby: until 9 of 10 first tokens come in {TARGET_S:g} s"
        measured = f"{held_s:.0f} s, {failed} of {len(answers)} failed; {_decided(server, begun_unix)}"
        bench.line("load", what, measured, "5 s", held_s <= 5.0 and not failed)
        server.settle()
        before = server.changes()
        answers = stream.arrive(4 * per_s, bench.minutes * 60, bench.source)
        changes, failed = server.changes() - before, sum(bool(answer.error) for answer in answers)
        what = f"the same load for {bench.minutes:g} minutes more: changes of plan"
        measured = f"{changes}; {failed} of {len(answers)} failed"
        bench.line("load", what, measured, "0", not changes and not failed)


def _decided(server: Server, since: float) -> str:
    """What the autoscaler decided since a moment, `time.time`, and when."""
    events = [e for e in server.ask("status")["events"] if e["kind"] == "autoscaled" and e["time"] > since]
    return "; ".join(f"{e['text']}, after {e['time'] - since:.1f} s" for e in events) or "nothing decided"


def kills(bench: Bench) -> None:
    """A random slot dies every ten seconds under constant load."""
    with bench.server(standby=2) as server:
        bench.undisturbed(server, bench.streams)
        plain = bench.kept(server, PLAIN_S)
        done: list[str] = []
        at = {bench.streams: partial(_strike, bench, server, done)}
        seen = bench.kept(server, bench.minutes * 60, at)
        what = f"{len(done)} kills in {bench.minutes:g} minutes, {bench.streams} streams"
        bench.add("kills", what, seen, plain, 60.0)
        ratio = seen.tokens_per_s / plain.tokens_per_s
        measured = f"{ratio:.2f} ({seen.tokens_per_s:.0f} of {plain.tokens_per_s:.0f} tokens/s)"
        bench.line("kills", "throughput against undisturbed", measured, "0.8", ratio >= 0.8)


def _strike(bench: Bench, server: Server, done: list[str]) -> None:
    """Kill slots until shortly before the end."""
    end, due = time.monotonic() + bench.minutes * 60 - 5.0, time.monotonic()
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        server.settle()
        role = bench.source.choice(("attention", "expert", "memory"))
        server.strike(role, signal.SIGKILL, bench.source.randrange(2))
        done.append(role)
        due = max(due + KILL_EVERY_S, time.monotonic())


def soak(bench: Bench) -> None:
    """Many changes of plan: nothing is left of them."""
    with bench.server() as server:
        plain = bench.undisturbed(server, bench.streams)
        answers, before = list[Answer](), server.held()
        for turn in range(bench.cycles):
            at = {bench.streams: partial(server.scale, "expert", 3 - turn % 2)}
            answers += bench.load(server, at).ask(range(bench.streams))
            server.settle()
            if turn == 1:
                before = server.held()
        after = server.held()
        what = f"{bench.cycles} changes of plan, {len(answers)} streams"
        bench.add("soak", what, compare(answers, bench.expected), plain, 0.5)
        measured = f"{before} to {after}"
        what = "held after the second change and after the last"
        bench.line("soak", what, measured, "no more", after.is_within(before))
        server.stop()
        left = server.sockets()
        what = "sockets and processes left after the end"
        bench.line("soak", what, f"{left} and {len(server.processes())}", "0", not left)
