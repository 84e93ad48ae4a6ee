"""What losses, hangs and resizes cost a training run: real processes, seen from outside, as Markdown.

Parts: `recovery` (kills and hangs of each role, resizes, and every loss against the undisturbed run),
`node` (a raylet), `goodput` (a random kill every ten seconds), `soak` (scale cycles and kills, and what
they leave behind), `cost` (replication 2 against 1, the journal). Peers are in benchmarks/elastic_peers.py.

  PYTHONPATH=. python benchmarks/elastic.py --data data/stdlib --out benchmarks/results/elastic_cpu_DATE.md
"""

import argparse
import contextlib
import itertools
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from sparseray.errors import SchedulerLostError
from sparseray.platform.cluster import ask, attach, detach
from sparseray.platform.config import ClusterConfig, DataConfig, RunConfig, load_yaml, save_yaml
from sparseray.platform.journal import Journal
from sparseray.platform.registry import registered_runs
from sparseray.platform.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 1_000_000
ROLES = {"attention": "attention", "expert": "experts", "memory": "memory"}
WIDE = ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2, replication=2, standby=1)


class Job:
    """A run as a process of its own, and its scheduler to be asked."""

    def __init__(self, folder: Path, data: Path, cluster: ClusterConfig, *options: str) -> None:
        folder.mkdir(parents=True)
        base = load_yaml(ROOT / "configs" / "tiny.yaml")
        train = replace(base.train, steps=ENDLESS, seq_len=64, sequences_per_shard=1, eval_every=0)
        train = replace(train, checkpoint_every=500)
        config: RunConfig = replace(base, train=train, cluster=cluster, data=DataConfig(path=str(data)))
        save_yaml(config, folder / "run.yaml")
        self.folder, self.run = folder, RunFolder(folder / "run")
        os.environ |= {
            "SPARSERAY_STATE_DIR": str(folder / "state"),
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "sparseray", "pretrain", "--config", str(folder / "run.yaml")]
        with (folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"--run_dir={self.run.path}", *options],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait(lambda: registered_runs() and self.last_step() > 5, "the first steps", 180.0)
        self.scheduler = attach(registered_runs()[0])

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = 120.0) -> None:
        """Wait for something that the run brings about."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not happen:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.02)

    def records(self) -> list[dict[str, Any]]:
        """A record for every committed step."""
        return self.run.records()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind so far."""
        return [event for event in self.run.event_lines() if event["kind"] == kind]

    def last_step(self) -> int:
        """The newest of them."""
        found = self.records()
        return int(found[-1]["step"]) if found else 0

    def status(self) -> dict[str, Any]:
        """Ask the scheduler."""
        for _ in range(100):
            with contextlib.suppress(SchedulerLostError):
                return dict(ask(self.scheduler, "status", timeout_s=10.0))
            time.sleep(0.1)
        raise RuntimeError("the scheduler does not answer")

    def settled(self) -> dict[str, Any]:
        """Wait until the plan is as wanted, all replicas are there and a standby slot is warm."""
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.status())
            spare = any(slot["roles"] == ["standby"] for slot in found.get("slots", []))
            return bool(found.get("settled")) and spare and found["replicas"]["actual"] >= 2

        self.wait(there, "all replicas and a standby slot")
        return found

    def strike(self, pid: int, number: int) -> float:
        """Signal a slot; seconds until the first commit of the generation that follows."""
        generation = self.status()["generation"]
        struck = time.time()
        os.kill(pid, number)
        self.wait(lambda: self.records()[-1]["generation"] > generation, "the recovery")
        first = next(record for record in self.records() if record["generation"] > generation)
        seconds: float = first["time"] - struck
        return seconds

    def stop(self) -> None:
        """Ctrl-C: the run ends with a checkpoint."""
        detach()
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def slot_of(status: dict[str, Any], role: str) -> dict[str, Any]:
    """A slot that plays a role."""
    return next(dict(slot) for slot in status["slots"] if role in slot["roles"])


def row(what: str, measured: str, must: str, met: bool) -> str:
    """One line of the table."""
    return f"| {what} | {measured} | {must} | {'yes' if met else '**no**'} |"


def spread(values: list[float]) -> str:
    """Median and worst of some seconds."""
    return f"{statistics.median(values):.2f} s, worst {max(values):.2f} s of {len(values)}"


def step_seconds(records: list[dict[str, Any]]) -> float:
    """Median seconds from one commit to the next."""
    times = [record["time"] for record in records]
    seconds: float = statistics.median(b - a for a, b in itertools.pairwise(times))
    return seconds


def recovery(folder: Path, data: Path, repeats: int) -> list[str]:
    """Kills, hangs and resizes in one run, and its losses against an undisturbed one."""
    job = Job(folder / "disturbed", data, WIDE)
    time.sleep(8.0)
    step = step_seconds(job.records()[5:])
    rows = [row("median step, 2+2+2 slots", f"{step:.3f} s", "", True)]
    for number, name, must in ((signal.SIGKILL, "kill", 1.0), (signal.SIGSTOP, "hang", 1.5)):
        for role in ROLES:
            found = [job.strike(slot_of(job.settled(), role)["pid"], number) for _ in range(repeats)]
            what = f"{name} of {'an' if role[0] in 'ae' else 'a'} {role} slot to the next commit"
            rows.append(row(what, spread(found), f"{must:g} s", max(found) <= must))
    rows += resizes(job, step)
    job.settled()
    disturbed_at = job.last_step()
    job.stop()
    undisturbed = Job(folder / "undisturbed", data, WIDE)
    undisturbed.wait(lambda: undisturbed.last_step() >= disturbed_at, "as many steps", 900.0)
    undisturbed.stop()
    keys = ("step", "loss", "aux_loss", "grad_norm")
    pairs = list(zip(job.records(), undisturbed.records()))
    equal = sum(all(a[key] == b[key] for key in keys) for a, b in pairs)
    steps = [record["step"] for record in job.records()]
    lost = len(job.events("restored"))
    rows.append(
        row(
            "losses and norms equal to the undisturbed run",
            f"{equal} of {len(pairs)} steps",
            "all",
            equal == len(pairs),
        )
    )
    rows.append(
        row(
            "steps lost, replication 2", str(lost), "0", lost == 0 and steps == list(range(1, len(steps) + 1))
        )
    )
    return rows


def resizes(job: Job, step: float) -> list[str]:
    """Pause of resizes whose slots are prepared, and what they moved."""
    found: list[tuple[str, float, float]] = []
    wanted = [
        ("experts", 3),
        ("memory", 3),
        ("attention", 3),
        ("experts", 2),
        ("memory", 2),
        ("attention", 2),
    ]
    for role, count in wanted:
        job.settled()
        before = len(job.events("resized"))
        if ask(job.scheduler, "scale", role, count)["error"]:
            raise RuntimeError(f"scale {role} {count} was refused")
        job.wait(partial(lambda number: len(job.events("resized")) > number, before), "a resize")
        event = job.events("resized")[-1]
        job.wait(partial(lambda number: job.last_step() > number + 1, event["step"]), "the step after it")
        found.append((f"{role} to {count}", event["pause"], event["moved"] / 1e6))
    worst = max(pause for _, pause, _ in found)
    detail = ", ".join(f"{name} {pause * 1000:.0f} ms ({moved:.1f} MB)" for name, pause, moved in found)
    return [
        row(f"pause of a resize: {detail}", f"worst {worst:.3f} s", f"one step, {step:.3f} s", worst <= step)
    ]


def node(folder: Path, data: Path) -> list[str]:
    """Kill a raylet of a cluster of three."""
    from ray.cluster_utils import Cluster

    os.environ |= {
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",
        "SPARSERAY_STATE_DIR": str(folder / "node" / "state"),
    }
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=4)
    try:
        job = Job(folder / "node", data, WIDE, f"--cluster.address={cluster.address}")
        job.settled()
        own = psutil.Process(ask(job.scheduler, "pid")).ppid()
        victim = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid != own)
        generation, struck = job.status()["generation"], time.time()
        victim.kill_raylet()
        job.wait(lambda: job.records()[-1]["generation"] > generation, "the recovery")
        last_lost = job.events("lost")[-1]
        job.wait(lambda: job.records()[-1]["time"] > last_lost["time"] + 0.5, "steps after it")
        first = next(
            r for r in job.records() if r["time"] > last_lost["time"] and r["generation"] > generation
        )
        seconds, lost = first["time"] - struck, len(job.events("lost"))
        job.stop()
    finally:
        cluster.shutdown()
    return [
        row(
            f"kill of a raylet with {lost} of 7 slots to the next commit",
            f"{seconds:.2f} s",
            "3 s",
            seconds <= 3.0,
        )
    ]


def goodput(folder: Path, data: Path, minutes: float, seed: int) -> list[str]:
    """A random slot is killed every ten seconds."""
    source = random.Random(seed)
    job = Job(folder / "goodput", data, WIDE)
    time.sleep(10.0)
    step, first = step_seconds(job.records()[5:]), job.last_step()
    before, started, kills = leftovers(job), time.time(), 0
    while time.time() - started < minutes * 60:
        slot = source.choice([s for s in job.status()["slots"] if s["roles"] != ["standby"]])
        with contextlib.suppress(ProcessLookupError):
            os.kill(slot["pid"], signal.SIGKILL)
            kills += 1
        time.sleep(10.0 - (time.time() - started) % 10.0)
    wall = time.time() - started
    steps = job.last_step() - first
    inside = job.status()["goodput"]
    job.settled()
    after = leftovers(job)
    job.stop()
    outside = steps * step / wall
    return [
        row(
            f"goodput, {kills} kills in {wall / 60:.1f} minutes (the run's own account)",
            f"{inside:.3f}",
            "0.90",
            inside >= 0.9,
        ),
        row(
            "the same from outside: steps made x undisturbed median step / wall time",
            f"{outside:.3f}",
            "0.90",
            outside >= 0.9,
        ),
        row("left behind by it: " + difference(before, after), "", "no growth", not grown(before, after)),
    ]


def soak(folder: Path, data: Path, cycles: int, kills: int, seed: int) -> list[str]:
    """Scale up and down and kill, and count what is left behind."""
    source = random.Random(seed)
    job = Job(folder / "soak", data, WIDE)
    # A few of each first: what is made once at the first use is no leak.
    for _ in range(3):
        job.strike(slot_of(job.settled(), "expert")["pid"], signal.SIGKILL)
    job.settled()
    before = leftovers(job)
    for index in range(max(cycles, kills)):
        if index < kills:
            job.strike(slot_of(job.settled(), source.choice(list(ROLES)))["pid"], signal.SIGKILL)
        if index < cycles:
            for count in (3, 2):
                role = "experts" if index % 2 else "memory"
                job.settled()
                ask(job.scheduler, "scale", role, count)
                job.wait(partial(lambda r, c: job.status()["wanted"][r] == c, role, count), "the request")
        if index % 10 == 9:
            print(f"soak: {index + 1}", file=sys.stderr, flush=True)
    job.settled()
    time.sleep(5.0)
    after = leftovers(job)
    generation = job.status()["generation"]
    job.stop()
    text = f"soak, {cycles} scale cycles and {kills} kills, {generation} generations: {difference(before, after)}"
    return [row(text, "", "no growth", not grown(before, after))]


def leftovers(job: Job) -> dict[str, float]:
    """What a leak would show in."""
    scheduler = psutil.Process(ask(job.scheduler, "pid"))
    driver = psutil.Process(job.process.pid)
    status = job.status()
    slots = [psutil.Process(slot["pid"]) for slot in status["slots"]]
    sockets = Path(tempfile.gettempdir()) / f"sparseray-{os.getuid()}"
    return {
        "processes": len(driver.children(recursive=True)),
        "scheduler's files": scheduler.num_fds(),
        "driver's files": driver.num_fds(),
        "a slot's files": max(slot.num_fds() for slot in slots),
        "socket files": len([path for path in sockets.rglob("*") if path.is_socket()]),
        "shared-memory files": len(list(Path("/dev/shm").iterdir())),
        "scheduler MB": scheduler.memory_info().rss / 1e6,
    }


def difference(before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, for people."""
    return ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.0f}" for name in before)


def grown(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether anything grew beyond what comes and goes (an idle worker of Ray, a slot that starts)."""
    slack = {
        "processes": 3,
        "scheduler's files": 12,
        "a slot's files": 12,
        "driver's files": 6,
        "scheduler MB": 30,
    }
    return any(after[name] - before[name] > slack.get(name, 0) for name in before)


def cost(folder: Path, data: Path, seconds: float) -> list[str]:
    """Replication 2 with its commit against replication 1, and the journal's share."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2):
        for replication in (1, 2):
            job = Job(
                folder / f"cost{replication}{turn}", data, replace(WIDE, replication=replication, standby=0)
            )
            time.sleep(seconds)
            rates[replication].append(1.0 / step_seconds(job.records()[10:]))
            job.stop()
    lost = 1.0 - max(rates[2]) / max(rates[1])
    journal = Journal(folder / "journal.sqlite")
    journal.lead()
    record = {"expert_load": [[1] * 16] * 3, "loss": 1.0}
    started = time.perf_counter()
    for step in range(1000):
        journal.append("commit", generation=1, step=step, record=record, lr=0.1, scale=1.0)
    each = (time.perf_counter() - started) / 1000
    journal.close()
    share = each * max(rates[1])
    text = ", ".join(
        f"replication {r}: {', '.join(f'{rate:.2f}' for rate in found)} steps/s" for r, found in rates.items()
    )
    return [
        row(f"cost of replication 2 ({text})", f"{lost * 100:.1f} %", "", lost + share <= 0.15),
        row(
            "the journal's append",
            f"{each * 1e6:.0f} us, {share * 100:.2f} % of a step",
            "together 15 %",
            lost + share <= 0.15,
        ),
    ]


def main() -> int:
    """Run the parts that are asked for and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by `data prepare`")
    parser.add_argument(
        "--only", default="recovery,node,cost,goodput,soak", help="parts, default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=4, help="of each kill and hang")
    parser.add_argument("--minutes", type=float, default=10.0, help="of goodput")
    parser.add_argument("--cycles", type=int, default=50, help="scale cycles of the soak")
    parser.add_argument("--kills", type=int, default=100, help="kills of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = options.data.absolute()
    lines = [
        "# Elastic training",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}; "
        "tiny model, 4 logical shards of 64 tokens, 2+2+2 slots of one thread, replication 2, one standby slot.",
        "",
        "| what | measured | must | met |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="sr") as name:
        parts = {
            "recovery": lambda: recovery(Path(name), data, options.repeats),
            "node": lambda: node(Path(name), data),
            "cost": lambda: cost(Path(name), data, 15.0),
            "goodput": lambda: goodput(Path(name), data, options.minutes, options.seed),
            "soak": lambda: soak(Path(name), data, options.cycles, options.kills, options.seed),
        }
        for part in options.only.split(","):
            found = parts[part]()
            print("\n".join(found), flush=True)
            lines += found
            if options.out is not None:
                options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
