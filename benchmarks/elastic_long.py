"""The long parts of benchmarks/elastic.py: loss of whole nodes, goodput under kills, and a soak for leaks."""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.elastic_parts import WIDE, Bench, Row
from benchmarks.elastic_run import MARK, ROLES, Strike, Training, gaps, median_step

RAYLET_S = 3.0
NODES, CPUS_PER_NODE = 4, 4
GOODPUT = 0.90
KILL_EVERY_S = 10.0
CALM_STEPS = 60
MEMORY_GROWTH = 0.10
WARM_UP_CYCLES, WARM_UP_KILLS = 3, 6


# -- whole nodes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nodes(mark: str, temporary: Path) -> Iterator[Any]:
    """A Ray cluster of a head without CPUs and several nodes, on this machine; its processes carry `mark`."""
    from ray.cluster_utils import Cluster

    kept = {name: os.environ.get(name) for name in (MARK, "TMPDIR")}
    os.environ |= {MARK: mark, "TMPDIR": str(temporary)}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=100 << 20)
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def raylet(bench: Bench) -> None:
    """SIGKILL of a raylet that has slots of the run and not its scheduler; Ray then ends its processes."""
    strikes: list[Strike] = []
    # Replicas lie on different nodes, and the standby slots on those that stay can take over two lost ones.
    run = bench.run("raylet", replace(WIDE, standby=2))
    with _nodes(run.mark, run.temporary) as cluster:
        run.cluster = replace(run.cluster, address=cluster.address)
        with run:
            run.wait_calm(10)
            step = median_step(run.records()[-10:])
            for turn in range(bench.repeats):
                run.wait_calm()
                node, held = _victim(cluster, run)
                pid = _raylet_pid(node)
                strikes.append(run.signal([pid], signal.SIGKILL, "raylet"))
                print(f"[raylet] a node with {held} slots: {strikes[-1].seconds:.2f} s", flush=True)
                cluster.remove_node(node, allow_graceful=False)
                if turn + 1 < bench.repeats:
                    cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=100 << 20)
            run.stop(keeps_cluster=True)
    seconds = [strike.seconds for strike in strikes]
    bench.add(
        Row(
            part="raylet",
            what=f"SIGKILL of a raylet of {NODES}: next commit, {len(seconds)} times (a step takes {step * 1e3:.0f} ms)",
            measured=f"median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s",
            target=f"max at most {RAYLET_S:g} s",
            is_met=max(seconds) <= RAYLET_S,
        )
    )
    bench.compare_losses("raylet", run)


def _raylet_pid(node: Any) -> int:
    from ray._private import ray_constants

    return int(node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid)


def _victim(cluster: Any, run: Training) -> tuple[Any, int]:
    """A node with slots that have roles, without the scheduler, and how many slots it has."""
    above = {parent.pid for parent in psutil.Process(run.ask("pid")).parents()}
    slots = run.slots()
    with_roles = [slot["node"] for slot in slots if slot["roles"] != ["standby"]]
    for node in cluster.worker_nodes:
        if node.node_id in with_roles and _raylet_pid(node) not in above:
            return node, sum(slot["node"] == node.node_id for slot in slots)
    raise RuntimeError("every node with slots has the scheduler too")


# -- goodput -----------------------------------------------------------------------------------------


def goodput(bench: Bench) -> None:
    """A random kill every ten seconds: how much of the time made steps that count."""
    source, struck = bench.source, list[str]()
    with bench.run("goodput") as run:
        run.wait_calm(5)
        calm = run.wait_steps(CALM_STEPS)
        step = median_step(calm)
        steady = step * (len(calm) - 1) / sum(gaps(calm))
        first, started = len(run.records()), time.time()
        while time.time() - started < bench.minutes * 60:
            due = started + KILL_EVERY_S * (len(struck) + 1)
            run.wait(lambda due=due: time.time() >= due, "the next kill", 2 * KILL_EVERY_S)  # type: ignore[misc]
            victims = run.slots()
            victim = source.choice(victims)
            os.kill(victim["pid"], signal.SIGKILL)
            struck.append("+".join(victim["roles"]))
        run.wait_steps(1)
        wall, steps = time.time() - started, len(run.records()) - first
        run.stop()
    outside = steps * step / wall
    told = next((e["goodput"] for e in reversed(run.events()) if e["kind"] == "end"), None)
    counts = ", ".join(f"{struck.count(name)} {name}" for name in sorted(set(struck)))
    bench.add(
        Row(
            part="goodput",
            what=f"{len(struck)} random kills, one every {KILL_EVERY_S:g} s ({counts}): productive time over all time, "
            "lost work subtracted, as the run counts it (its last checkpoint included)",
            measured="no `end` event" if told is None else f"{told:.3f}",
            target=f"at least {GOODPUT:.2f}",
            is_met=told is not None and told >= GOODPUT,
        )
    )
    # The stricter figure: it counts also that steps are slower while a new slot starts on the same two cores.
    bench.add(
        Row(
            part="goodput",
            what="the same from outside: steps made times the median step before the first kill, over the time from then",
            measured=f"{outside:.3f} ({steps} steps in {wall:.0f} s, {step * 1e3:.0f} ms; the same sum without kills: "
            f"{steady:.3f})",
            target=f"at least {GOODPUT:.2f}",
            is_met=outside >= GOODPUT,
        )
    )
    bench.compare_losses("goodput", run)


# -- soak --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a run holds of its machine at one moment.

    Args:
        processes: of the run, Ray's included.
        driver_files, scheduler_files: open file descriptors.
        threads: of the scheduler.
        sockets: files in the run's private folder of Unix sockets.
        segments: of shared memory, in /dev/shm or mapped from it by processes of the run.
        memory: resident bytes of the scheduler.
    """

    processes: int
    driver_files: int
    scheduler_files: int
    threads: int
    sockets: int
    segments: int
    memory: int


def _held(run: Training) -> Held:
    processes = run.processes()
    scheduler = psutil.Process(run.ask("pid"))
    mapped: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            mapped |= {
                m.path.removesuffix(" (deleted)") for m in process.memory_maps() if "/dev/shm/" in m.path
            }
    files = {str(path) for path in Path("/dev/shm").iterdir() if path.stat().st_uid == os.getuid()}
    return Held(
        processes=len(processes),
        driver_files=run.driver.num_fds(),
        scheduler_files=scheduler.num_fds(),
        threads=scheduler.num_threads(),
        sockets=sum(path.is_socket() for path in (run.temporary / f"sparseray-{os.getuid()}").rglob("*")),
        segments=len(mapped | files),
        memory=scheduler.memory_info().rss,
    )


def _at_rest(run: Training) -> Held:
    """The least of each number over some seconds: Ray ends idle workers late, and steps open files for a moment."""
    found = []
    for _ in range(8):
        run.wait_calm()
        found.append(_held(run))
        time.sleep(1.0)
    names = Held.__dataclass_fields__
    return Held(**{name: min(getattr(held, name) for held in found) for name in names})


def soak(bench: Bench) -> None:
    """Many resizes and kills: nothing may be left behind by any of them."""
    started = time.monotonic()
    with bench.run("soak") as run:
        run.wait_calm(5)
        _disturb(bench, run, WARM_UP_CYCLES, WARM_UP_KILLS)
        before = _at_rest(run)
        _disturb(bench, run, bench.cycles // 2, bench.kills // 2)
        middle = _at_rest(run)
        _disturb(bench, run, bench.cycles - bench.cycles // 2, bench.kills - bench.kills // 2)
        after = _at_rest(run)
        run.stop()
        left = sum(1 for _ in (run.temporary / f"sparseray-{os.getuid()}").rglob("*"))
    minutes = (time.monotonic() - started) / 60
    for name in Held.__dataclass_fields__:
        three = [getattr(held, name) for held in (before, middle, after)]
        is_memory = name == "memory"
        limit = three[0] * (1 + MEMORY_GROWTH) if is_memory else three[0]
        shown = [f"{value / 1e6:.1f} MB" if is_memory else str(value) for value in three]
        bench.add(
            Row(
                part="soak",
                what=f"{name.replace('_', ' ')}: before, half way and after {bench.cycles} resizes up and down and "
                f"{bench.kills} kills ({minutes:.0f} minutes)",
                measured=", ".join(shown),
                target=f"growth at most {MEMORY_GROWTH:.0%}" if is_memory else "no growth",
                is_met=three[2] <= limit,
            )
        )
    bench.add(
        Row(part="soak", what="socket files after the end", measured=str(left), target="0", is_met=left == 0)
    )
    bench.compare_losses("soak", run)


def _disturb(bench: Bench, run: Training, cycles: int, kills: int) -> None:
    """Resizes and kills in a random order."""
    actions: list[Callable[[], None]] = [lambda: _cycle(bench, run)] * cycles + [
        lambda: _kill(bench, run)
    ] * kills
    bench.source.shuffle(actions)
    for number, action in enumerate(actions):
        run.wait_calm(1)
        action()
        if number % 10 == 9:
            print(f"[soak] {number + 1} of {len(actions)}", flush=True)


def _cycle(bench: Bench, run: Training) -> None:
    role = bench.source.choice(("attention", "experts", "memory"))
    run.scale(role, 3)
    run.wait_calm(1)
    run.scale(role, 2)


def _kill(bench: Bench, run: Training) -> None:
    run.strike(bench.source.choice((*ROLES, "standby")), signal.SIGKILL, bench.source)
