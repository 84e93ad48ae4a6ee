"""Random faults against a real training run, from a seed; at the end every bit must be as undisturbed.

As a test it runs for a minute (tests/test_chaos.py); by hand for as long as one likes:

  PYTHONPATH=.:tests python tests/chaos.py --minutes 60 --seed 7 --data DIR
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import local_cluster
from local_cluster import tiny_run
from processes import interrupt, kill_all, of_mark, start, wait_until

from sparseray.errors import SchedulerLostError
from sparseray.platform.config import ClusterConfig, RunConfig, save_yaml
from sparseray.platform.run import checkpoint
from sparseray.platform.run.registry import RegisteredRun, registered_runs

ROLES = {"attention": "attention", "expert": "experts", "memory": "memory"}
ENDLESS = 100_000
# Longer than the default: other work on the machine must not look like a hang.
HANG_S = 3.0
FAULTS = ("kill", "kill", "hang", "two", "scheduler", "scale", "scale", "kill standby")


@dataclass
class Watched:
    """A run of its own process, and a way to ask its scheduler and to hurt it.

    Args:
        folder: for all that it writes.
        config: of the run.
        address: of the platform that it joins; empty for one of its own.
        state: the user's state folder; None for one of its own.
    """

    folder: Path
    config: RunConfig
    address: str = ""
    state: Path | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None
    scheduler: Any = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_dir, self.log = self.folder / "run", self.folder / "log.txt"
        self.temporary = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
        os.environ["SPARSERAY_STATE_DIR"] = str(self.state or self.folder / "state")
        os.environ["RAY_AUTH_MODE"] = "disabled"
        save_yaml(self.config, self.folder / "run.yaml")
        # On one slot with everything: no bit depends on that, and a step takes a third of the time.
        self.plain = replace(self.config, cluster=ClusterConfig(deadline_s=20.0, colocated=True))

    def start(self, *options: str) -> None:
        """Start the command, or the same command again."""
        arguments = ["pretrain", "--config", str(self.folder / "run.yaml"), f"--run_dir={self.run_dir}"]
        self.command(*arguments, *options)

    def command(self, *arguments: str) -> None:
        """Start a command as this one's process."""
        join = [f"--cluster.address={self.address}"] if self.address else []
        changes = {"TMPDIR": str(self.temporary), "SPARSERAY_TEST": self.mark}
        state = os.environ["SPARSERAY_STATE_DIR"]
        self.process = start([*arguments, *join], self.log, **changes, SPARSERAY_STATE_DIR=state)

    def attach(self) -> None:
        """Connect this process to the run's cluster."""
        self.wait(lambda: self.registered() and self.steps() > 0, "the first step")
        self.find()

    def registered(self) -> list[RegisteredRun]:
        """This one among what goes on."""
        return [run for run in registered_runs() if run.run_dir == str(self.run_dir.absolute())]

    def find(self) -> None:
        """Find the job; where a platform is shared, this process is connected to it already."""
        from sparseray.platform.cluster import JobHandle, ask, attach, find_platform

        (found,) = self.registered()
        if not self.address:
            self.scheduler = attach(found)
            return
        platform = find_platform()
        self.scheduler = JobHandle(platform=platform, job=ask(platform, "find", found.run_dir))

    def detach(self) -> None:
        from sparseray.platform.cluster import detach

        detach()

    def steps(self) -> int:
        """The last committed step."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def status(self) -> dict[str, Any]:
        """Ask the scheduler, waiting for its successor if it is being restarted."""
        from sparseray.platform.cluster import ask

        deadline = time.monotonic() + 60.0
        while True:
            with contextlib.suppress(SchedulerLostError):
                return dict(ask(self.scheduler, "status", timeout_s=10.0))
            assert time.monotonic() < deadline, f"the scheduler did not come back:\n{self.log.read_text()}"
            time.sleep(0.1)

    def settled(self) -> dict[str, Any]:
        """Wait until the plan is as wanted, with all replicas and a standby slot."""

        def there() -> bool:
            found.update(self.status())
            full = found.get("replicas", {}).get("actual", 0) >= self.config.cluster.replication
            spare = [s for s in found.get("slots", []) if s["roles"] == ["standby"]]
            # A spare slot is the first that is lent.
            standby = 0 if found.get("lent") else self.config.cluster.standby
            return bool(found.get("settled") and full and len(spare) >= standby)

        found: dict[str, Any] = {}
        self.wait(there, "all replicas and a standby slot")
        return found

    def wait(self, condition: Any, what: str, limit_s: float = 90.0) -> None:
        def there() -> bool:
            assert self.process is not None
            ended = self.process.poll()
            assert ended is None, f"it ended with {ended} before {what}:\n{self.log.read_text()}"
            return bool(condition())

        wait_until(there, what, limit_s)

    def signal(self, pid: int, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def scheduler_pid(self) -> int:
        """Process id of the scheduler in force."""
        from sparseray.platform.cluster import ask

        return int(ask(self.scheduler, "pid"))

    def finish(self, limit_s: float = 60.0) -> None:
        """End the run by Ctrl-C, which leaves a checkpoint of the step that it had reached."""
        assert self.process is not None
        interrupt(self.process)
        self.wait_for_end(130, limit_s)

    def wait_for_end(self, code: int, limit_s: float = 60.0) -> None:
        """Wait until the command has ended, with this exit code."""
        assert self.process is not None
        try:
            found = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            found = None
        assert found == code, f"ended with {found}, not {code}:\n{self.log.read_text()}"

    def close(self) -> None:
        """End what is left."""
        if self.process is not None:
            kill_all(self.process, self.mark)

    def check(self) -> int:
        """Each step once, all losses and the last checkpoint as in an undisturbed run; returns the steps."""
        records = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = len(records)
        undisturbed = local_cluster.train(self.folder / "undisturbed", self.plain, stop_after=steps)
        assert [r["step"] for r in records] == list(range(1, steps + 1))
        assert [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records] == undisturbed.curve
        newest = checkpoint.read_manifest(self.run_dir / "checkpoints" / f"step_{steps}")
        assert newest["digest"] == undisturbed.digest
        return steps

    def events(self) -> list[dict[str, Any]]:
        if not (self.run_dir / "events.jsonl").exists():
            return []
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]


class Chaos:
    """Draws faults from a seed and puts them to a run, with a note of each.

    Args:
        run: that is hurt.
        seed: of the draws.
        sizes: least and most slots of the roles that are scaled; None for one to three of each.
    """

    def __init__(self, run: Watched, seed: int, sizes: dict[str, tuple[int, int]] | None = None) -> None:
        self.run, self.random, self.done = run, random.Random(seed), [f"seed {seed}"]
        self.sizes = sizes or dict.fromkeys(ROLES.values(), (1, 3))

    def strike(self) -> None:
        """Wait until all is well, then do one thing."""
        time.sleep(self.random.uniform(0.1, 1.5))
        fault = self.random.choice(FAULTS)
        found = self.run.settled()
        by_role: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ROLES, "standby")}
        for slot in found["slots"]:
            for role in slot["roles"]:
                by_role.setdefault(role, []).append(slot)
        getattr(self, fault.replace(" ", "_"))(by_role)

    def note(self, text: str) -> None:
        self.done.append(f"step {self.run.steps()}: {text}")

    def _any(self, by_role: dict[str, list[dict[str, Any]]], roles: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = self.random.choice([slot for role in roles for slot in by_role[role]])
        return found

    def _lose(self, pids: set[int], number: int = signal.SIGKILL) -> None:
        """Signal processes of slots, and wait until the scheduler knows: what comes next is not to meet replicas that are gone."""
        for pid in pids:
            self.run.signal(pid, number)
        self.run.wait(
            lambda: not pids & {slot["pid"] for slot in self.run.status()["slots"]}, "a loss is noticed"
        )

    def kill(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        slot = self._any(by_role, tuple(ROLES))
        self.note(f"SIGKILL slot {slot['slot']} {slot['roles']}")
        self._lose({slot["pid"]})

    def hang(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        slot = self._any(by_role, tuple(ROLES))
        self.note(f"SIGSTOP slot {slot['slot']} {slot['roles']}")
        self._lose({slot["pid"]}, signal.SIGSTOP)

    def two(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        if any(len(by_role[role]) < 2 for role in ROLES):
            return self.kill(by_role)
        slots = [self._any(by_role, (role,)) for role in self.random.sample(list(ROLES), 2)]
        for slot in slots:
            self.note(f"SIGKILL slot {slot['slot']} {slot['roles']}, one of two")
        self._lose({slot["pid"] for slot in slots})
        return None

    def scheduler(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        pid = self.run.scheduler_pid()
        self.note("SIGKILL scheduler")
        self.run.signal(pid)

    def scale(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        from sparseray.platform.cluster import ask

        role = self.random.choice(list(self.sizes))
        count = self.random.randint(*self.sizes[role])
        self.note(f"scale {role} {count}")
        refused = ask(self.run.scheduler, "scale", role, count)
        assert not refused or "not training" in refused, refused

    def kill_standby(self, by_role: dict[str, list[dict[str, Any]]]) -> None:
        if not by_role["standby"]:
            return self.kill(by_role)
        slot = self._any(by_role, ("standby",))
        self.note(f"SIGKILL slot {slot['slot']} (standby)")
        self._lose({slot["pid"]})
        return None


def chaos(folder: Path, data: Path, *, seed: int, seconds: float) -> list[str]:
    """Train with random faults for a while, stop, and compare; returns what was done.

    Raises:
        AssertionError: something differs; the message holds seed, faults and events.
    """
    wide = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
    wide["hang_s"] = HANG_S
    config = tiny_run(data, steps=ENDLESS, **wide)
    config = replace(config, train=replace(config.train, checkpoint_every=100))
    run = Watched(folder / "disturbed", config)
    faults = Chaos(run, seed)
    try:
        run.start()
        run.attach()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            faults.strike()
        run.settled()
        run.detach()
        run.finish()
        faults.done.append(f"{run.check()} steps, every loss and the last checkpoint equal to the bit")
        left = [process.cmdline() for process in of_mark(run.mark)]
        assert not left, left
    except BaseException as error:
        events = "\n".join(f"{e['step']} {e['kind']}: {e['text']}" for e in run.events())
        raise AssertionError(
            f"{error}\n\nfaults:\n" + "\n".join(faults.done) + f"\n\nevents:\n{events}"
        ) from error
    finally:
        run.detach()
        run.close()
    return faults.done


def main() -> int:
    """Run by hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--data", required=True, help="folder made by `data prepare --vocab_size 300`")
    parser.add_argument(
        "--steps_per_second", type=float, default=20.0, help="decides how many steps are trained"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = chaos(Path(folder), Path(options.data), seed=options.seed, seconds=options.minutes * 60)
    print("\n".join(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
