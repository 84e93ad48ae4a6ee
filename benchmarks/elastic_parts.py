"""The short parts of benchmarks/elastic.py: losses, kills, hangs, resizes, and what replication costs."""

import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.elastic_run import ROLES, Strike, Training, gaps, median_step
from sparseray.platform.config import ClusterConfig, RunConfig
from sparseray.platform.run.journal import Journal

WIDE = ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2, replication=2, standby=1)
KILL_S, KILL_AIM_S, HANG_S = 1.0, 0.5, 1.5
COST = 0.15


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `is_met` is None where there is no target."""

    part: str
    what: str
    measured: str
    target: str = ""
    is_met: bool | None = None


@dataclass
class Bench:
    """What the parts share.

    Args:
        config: model and data of all runs; train.steps is more than any of them makes.
        folder: of all runs.
        repeats: of each short measurement.
        steps: of each run of the cost part.
        compare: most steps of a run whose losses are compared.
        minutes: of the goodput part.
        cycles, kills: of the soak.
        source: all choices of victims come from here.
    """

    config: RunConfig
    folder: Path
    repeats: int
    steps: int
    compare: int
    minutes: float
    cycles: int
    kills: int
    source: random.Random
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Take a line and show it at once."""
        verdict = {True: "met", False: "NOT MET", None: ""}[row.is_met]
        print(f"[{row.part}] {row.what}: {row.measured} {verdict}", flush=True)
        self.rows.append(row)

    def run(self, name: str, cluster: ClusterConfig = WIDE) -> Training:
        """A run with this benchmark's model; to be used in a `with` statement."""
        return Training(self.config, cluster, self.folder, name)

    def compare_losses(self, part: str, training: Training) -> None:
        """Add the lines on bits and on lost steps of a run that has ended; extends the undisturbed run to it."""
        curve = training.curve()
        wanted = min(len(curve), self.compare)
        undisturbed = self.undisturbed(wanted)
        steps = [line[0] for line in curve]
        differing = next((a[0] for a, b in zip(curve[:wanted], undisturbed) if a != b), None)
        whole = steps == list(range(1, len(steps) + 1))
        text = (
            f"equal over {wanted} steps of {len(curve)}"
            if differing is None
            else f"differs at step {differing}"
        )
        text += "" if whole else ", a step is missing or stands twice"
        self.add(
            Row(
                part=part,
                what="losses and gradient norms against the undisturbed run",
                measured=text,
                target="equal to the bit",
                is_met=differing is None and whole,
            )
        )
        lost = training.repeated_steps()
        self.add(Row(part=part, what="steps lost", measured=str(lost), target="0", is_met=lost == 0))

    def undisturbed(self, steps: int) -> list[tuple[int, float, float, float]]:
        """The curve of the run that nothing happens to, trained on where it is too short yet."""
        cluster = replace(WIDE, replication=1, standby=0)
        training = self.run("undisturbed", cluster)
        if len(training.records()) < steps:
            with training:
                training.wait(lambda: len(training.records()) >= steps, f"step {steps}", 60.0 + 2 * steps)
                training.stop()
        return training.curve()[:steps]


def losses(bench: Bench) -> None:
    """Kills, hangs and resizes of everything, one after another, in one run."""
    source = bench.source

    def kill(role: str, count: int = 1) -> Callable[[Training], Strike]:
        return lambda run: run.strike(role, signal.SIGKILL, source, count)

    def hang(role: str) -> Callable[[Training], Strike]:
        return lambda run: run.strike(role, signal.SIGSTOP, source)

    def scale(role: str, count: int) -> Callable[[Training], None]:
        def change(run: Training) -> None:
            run.scale(role, count)

        return change

    def pause(run: Training) -> None:
        pid = source.choice(run.slots("expert"))["pid"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(pid, signal.SIGCONT)

    def kill_in_resize(run: Training) -> None:
        run.ask("scale", "experts", 3)
        run.strike("expert", signal.SIGKILL, source)

    def kill_scheduler(run: Training) -> Strike:
        return run.signal([run.ask("pid")], signal.SIGKILL, "scheduler")

    disturbances: dict[str, Callable[[Training], Strike | None]] = {
        **{f"kill {role}": kill(role) for role in (*ROLES, "standby")},
        **{f"kill {role} and the next role at once": kill(role, 2) for role in ROLES[:2]},
        **{f"hang {role}": hang(role) for role in ROLES},
        "stop an expert shard for 0.4 s": pause,
        "attention to 3": scale("attention", 3),
        "memory to 1": scale("memory", 1),
        "experts to 3, and a kill meanwhile": kill_in_resize,
        "experts to 1": scale("experts", 1),
        "attention to 1": scale("attention", 1),
        "memory to 3": scale("memory", 3),
        "experts to 2": scale("experts", 2),
        "kill the scheduler": kill_scheduler,
    }
    with bench.run("losses") as run:
        worst = ("", 0.0)
        for text, disturb in disturbances.items():
            run.wait_calm(2)
            struck = disturb(run)
            if struck is not None:
                print(f"[losses] {text}: {struck.seconds:.2f} s to the next commit", flush=True)
                worst = max(worst, (text, struck.seconds), key=lambda pair: pair[1])
        run.wait_calm(2)
        run.stop()
    what = f"disturbances in one run ({', '.join(disturbances)})"
    bench.add(
        Row(part="losses", what=what, measured=f"{len(disturbances)}; longest: {worst[0]}, {worst[1]:.2f} s")
    )
    bench.compare_losses("losses", run)


def kill(bench: Bench) -> None:
    """SIGKILL with a standby slot present."""
    _strikes(bench, "kill", WIDE, signal.SIGKILL, KILL_S)


def hang(bench: Bench) -> None:
    """SIGSTOP with a standby slot present."""
    _strikes(bench, "hang", WIDE, signal.SIGSTOP, HANG_S)


def nostandby(bench: Bench) -> None:
    """SIGKILL and SIGSTOP without a standby slot: the survivors share the roles."""
    bare = replace(WIDE, standby=0)
    _strikes(bench, "nostandby", bare, signal.SIGKILL, None)
    _strikes(bench, "nostandby", bare, signal.SIGSTOP, None)


def _strikes(bench: Bench, part: str, cluster: ClusterConfig, number: int, must_s: float | None) -> None:
    name = signal.Signals(number).name
    with bench.run(f"{part}-{name}", cluster) as run:
        run.wait_calm(10)
        step = median_step(run.records()[-10:])
        found: dict[str, list[Strike]] = {role: [] for role in ROLES}
        for _ in range(bench.repeats):
            for role in ROLES:
                run.wait_calm()
                found[role].append(run.strike(role, number, bench.source))
                print(f"[{part}] {name} {role}: {found[role][-1].seconds:.2f} s", flush=True)
        run.wait_calm()
        run.stop()
    for role, strikes in found.items():
        seconds = [strike.seconds for strike in strikes]
        bench.add(
            Row(
                part=part,
                what=f"{name} to {role}: next commit, {len(seconds)} times (a step takes {step * 1e3:.0f} ms)",
                measured=f"median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s; {_phases(strikes)}",
                target="" if must_s is None else _must(must_s),
                is_met=None if must_s is None else max(seconds) <= must_s,
            )
        )
    if must_s is not None:
        every = [strike.seconds for strikes in found.values() for strike in strikes]
        if must_s == KILL_S:
            aim = statistics.median(every)
            text = f"median {aim:.2f} s"
            bench.add(
                Row(
                    part=part,
                    what=f"{name}, all roles",
                    measured=text,
                    target="aim 0.5 s",
                    is_met=aim <= KILL_AIM_S,
                )
            )
    bench.compare_losses(part, run)


def _must(seconds: float) -> str:
    return f"max at most {seconds:g} s"


def _phases(strikes: Sequence[Strike]) -> str:
    """Medians of what the platform says of its own recoveries."""
    names = [
        name for name in ("detect", "decide", "move", "first_step") if any(name in s.phases for s in strikes)
    ]
    return ", ".join(
        f"{name} {statistics.median([s.phases[name] for s in strikes if name in s.phases]) * 1e3:.0f} ms"
        for name in names
    )


def resize(bench: Bench) -> None:
    """Every role one slot up and down again, with a prepared slot."""
    changes = [(role, count) for role in ("attention", "experts", "memory") for count in (3, 2)]
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = {change: [] for change in changes}
    with bench.run("resize") as run:
        for _ in range(bench.repeats):
            for role, count in changes:
                run.wait_calm(8)
                step = median_step(run.records()[-8:])
                event = run.scale(role, count)
                run.wait_steps(2)
                at = {record["step"]: record["time"] for record in run.records()}
                pause = at[event["step"] + 1] - at[event["step"]] - step
                found[role, count].append((pause, step, event["moved"]))
                print(
                    f"[resize] {role} {count}: {pause * 1e3:.0f} ms beside a step of {step * 1e3:.0f} ms",
                    flush=True,
                )
        run.wait_calm()
        run.stop()
    for (role, count), measured in found.items():
        pauses, ratios = [m[0] for m in measured], [m[0] / m[1] for m in measured]
        moved = ", ".join(f"{number / 1e6:.2f}" for number in sorted({m[2] for m in measured}))
        bench.add(
            Row(
                part="resize",
                what=f"{role} {'2 to 3' if count == 3 else '3 to 2'}: pause, {len(measured)} times",
                measured=f"median {statistics.median(pauses) * 1e3:.0f} ms ({statistics.median(ratios):.2f} steps), "
                f"max {max(pauses) * 1e3:.0f} ms ({max(ratios):.2f} steps); moved {moved} MB",
                target="max at most 1 step",
                is_met=max(ratios) <= 1.0,
            )
        )
    bench.compare_losses("resize", run)


def cost(bench: Bench) -> None:
    """Tokens per second with replication 1 and 2, in turns, and the journal's part of a step apart."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(bench.repeats):
        for replication in found:
            with bench.run(
                f"cost-{replication}-{turn}", replace(WIDE, replication=replication, standby=0)
            ) as run:
                run.wait_steps(5)
                found[replication] += gaps(run.wait_steps(bench.steps))
                run.stop()
    record = run.records()[-1]
    seconds, tokens = {r: statistics.median(g) for r, g in found.items()}, record["tokens"]
    append = _journal_seconds(bench.folder / "journal.sqlite", record)
    bare = seconds[1] - append
    share = 1 - bare / seconds[2]
    speeds = ", ".join(f"{tokens / s:,.0f} tokens/s with {r}" for r, s in seconds.items())
    bench.add(
        Row(
            part="cost",
            what=f"replication 2, two-phase commit and journal against replication 1 without a journal, "
            f"{len(found[1])} steps each, in turns",
            measured=f"{share:.1%} ({speeds}; a step {seconds[1] * 1e3:.0f} and {seconds[2] * 1e3:.0f} ms)",
            target="at most 15 %",
            is_met=share <= COST,
        )
    )
    text = f"{append * 1e3:.2f} ms ({append / seconds[1]:.1%} of a step)"
    bench.add(Row(part="cost", what="one commit into the journal, median of 300", measured=text))


def _journal_seconds(path: Path, record: dict[str, object]) -> float:
    journal, seconds = Journal(path), []
    with contextlib.closing(journal):
        journal.lead()
        for step in range(300):
            started = time.perf_counter()
            journal.append(
                "commit", generation=1, step=step, record=record, lr=1e-3, memory_lr=5e-3, scale=1.0
            )
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
