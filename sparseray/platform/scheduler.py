"""The scheduler: one named actor that alone decides, and writes every decision to its journal first.

It runs the training loop in a thread of its own and answers questions about it; its words to the
slots go through its mailbox, never through Ray. It belongs to no driver, and Ray restarts it when it
dies: the new one reads the journal, finds the slots by name and goes on in the next generation.
"""

import itertools
import os
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import ray

from sparseray.actors.installation import JobSpec
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.errors import FencedError, UserError
from sparseray.log import get_logger
from sparseray.platform.composition import Run, Task
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.fleet.control import Member
from sparseray.platform.fleet.ray_fleet import RayFleet
from sparseray.platform.fleet.transport import ZmqTransport, private_directory, remove_directory
from sparseray.platform.metrics.exporter import Metrics, write_targets
from sparseray.platform.opening import slots_of
from sparseray.platform.run import lock
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.history import JobHistory, read_job
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.progress import Failure, Progress
from sparseray.platform.run.registry import forget_run, register_run
from sparseray.platform.serving import Served, Server

log = get_logger(__name__)

KEPT_RECORDS = 5000
DRIVER_GONE_S = 60.0


class Scheduler:
    """Decides for one job.

    Args:
        job: identifier of the job.
        config: the run, as plain values; `run_dir` and `data.path` absolute.
        task: what it is for.
    """

    def __init__(self, *, job: str, config: dict[str, Any], task: Task) -> None:
        self._job_id, self._config, self._task = job, from_dict(RunConfig, config), task
        self._folder = RunFolder(Path(self._config.run_dir))
        self._epoch = f"{os.getpid()}-{time.time()}"
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT_RECORDS)
        self._told = 0
        self._stopping, self._released, self._closed = (threading.Event() for _ in range(3))
        self._failure: Failure | None = None
        self._asked = time.monotonic()
        self._fleet: RayFleet | None = None
        self._job: Run | None = None
        self._lock: TextIO | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="driver")
        journal = Journal(self._folder.journal)
        has_begun = read_job(journal, job).has_begun
        journal.close()
        if has_begun:
            self._thread.start()

    def start(self) -> None:
        """Start the job; without effect once it runs."""
        if not self._thread.is_alive() and self._thread.ident is None:
            self._thread.start()

    # -- the driving thread ---------------------------------------------------------------------

    def _run(self) -> None:
        if other := self._hold():
            self._failure = Failure(error=other, kind="ConfigError", user=True)
            return
        try:
            self._drive()
        except FencedError as error:
            # Slots, targets and sockets are the other scheduler's now.
            log.error("this scheduler acts no more: %s", error)
            os._exit(1)
        except Exception as error:
            log.error("the job stopped:\n%s", traceback.format_exc())
            is_users = isinstance(error, UserError)
            self._failure = Failure(error=str(error), kind=type(error).__name__, user=is_users)
        finally:
            if self._job is not None:
                self._job.close()
            write_targets(self._folder.targets, {}, self._folder.path.name)
            threading.Thread(target=self._end, daemon=True, name="end").start()

    def _hold(self) -> str:
        """Keep others out of the run folder; says who works there already.

        A scheduler of this job that is not quite dead is fenced by the journal, not waited for.
        """
        gcs = ray.get_runtime_context().gcs_address
        self._lock = lock.hold(self._folder.path, job=self._job_id, ray=gcs)
        other = lock.holder(self._folder.path) if self._lock is None else None
        if other is None or other.get("job") == self._job_id:
            return ""
        return f"run_dir={self._folder.path} is in use by process {other.get('pid')} on {other.get('host')}; give another"

    def _drive(self) -> None:
        cluster = self._config.cluster
        metrics = Metrics({"slot": "scheduler"}, declare="scheduler")
        own = metrics.serve(cluster.bind_host)
        directory = private_directory(self._job_id) if cluster.transport == "ipc" else None
        mailbox = Mailbox(ZmqTransport("scheduler", directory, cluster.bind_host), SCHEDULER, self._job_id)

        def show_targets(members: dict[int, Member]) -> None:
            targets = {f"slot-{slot}": member.metrics for slot, member in members.items()}
            write_targets(self._folder.targets, targets | {"scheduler": own}, self._folder.path.name)

        def fleet_of(journal: Journal, history: JobHistory, spec: JobSpec) -> RayFleet:
            ids = itertools.count(max(history.slots, default=-1) + 1)

            def next_slot() -> int:
                slot = next(ids)
                journal.append("slot", generation=0, step=0, slot=slot, job=self._job_id)
                return slot

            self._fleet = RayFleet(self._job_id, cluster, spec, next_slot, show_targets, journal.leads)
            return self._fleet

        run = self._job = Run.open(
            self._config,
            mailbox,
            fleet_of,
            metrics,
            task=self._task,
            on_record=self._tell,
            should_stop=self._should_stop,
        )
        self._open_slots(run)
        run.drive()

    def _open_slots(self, run: Run) -> None:
        """Find the slots of a job that goes on; start those of one that begins."""
        assert self._fleet is not None
        register_run(self._folder.path, ray.get_runtime_context().gcs_address)
        self._fleet.is_spare = run.generations.is_spare
        self._fleet.reopen(list(run.history.slots))
        if run.history.plan is None:
            self._fleet.open(slots_of(self._config, run.generations.workload.inventory))

    def _should_stop(self) -> bool:
        """A run outlives its driver; a server without an ingress serves nobody."""
        is_alone = isinstance(self._task, Served) and time.monotonic() - self._asked > DRIVER_GONE_S
        return self._stopping.is_set() or is_alone

    def _tell(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._told += 1

    def _end(self) -> None:
        """Leave nothing behind, whether or not a driver is there to see the end."""
        while not self._released.wait(1.0):
            if time.monotonic() - self._asked > DRIVER_GONE_S:
                break
        if self._fleet is not None:
            self._fleet.close()
        forget_run(self._folder.path)
        remove_directory(self._job_id)
        if self._lock is not None:
            self._lock.close()
        self._closed.set()

    # -- questions -----------------------------------------------------------------------------

    def progress(self, after: int, epoch: str = "", wait_s: float = 0.5) -> Progress:
        """Return the records after the first `after` ones of `epoch`, waiting a little for new ones.

        Args:
            after: records that the caller has.
            epoch: of the scheduler that gave them; another one's begin anew.
            wait_s: seconds to wait for a new one.
        """
        self._asked = time.monotonic()
        after = after if epoch == self._epoch else 0
        deadline = self._asked + wait_s
        while self._told <= after and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = not self._thread.is_alive()
        told, kept = self._told, list(self._records)
        new = kept[max(0, len(kept) - (told - after)) :] if told > after else []
        return Progress(epoch=self._epoch, seen=told, records=new, done=done, failure=self._failure)

    def stop(self) -> None:
        """Stop after the current step, with a checkpoint."""
        self._stopping.set()

    def release(self, wait_s: float = 10.0) -> bool:
        """End all slots; True once that is done. Called by the driver that has seen the end."""
        self._released.set()
        return self._closed.wait(wait_s)

    def job(self) -> str:
        """Identifier of the job, part of its slots' names."""
        return self._job_id

    def pid(self) -> int:
        """Process id of this scheduler."""
        return os.getpid()

    def scale(self, role: str, count: int) -> str:
        """Ask for another number of slots of a role.

        Args:
            role: attention, experts or memory.
            count: wanted slots.

        Returns:
            Why it is refused, and nothing is changed; empty otherwise.
        """
        if self._job is None or self._job.generations.plan is None or not self._thread.is_alive():
            return "the job is not running (yet); ask again once it has made a step"
        try:
            self._job.reconciler.request(role, count)
        except (UserError, FencedError) as error:
            return str(error)
        return ""

    def publish(self, checkpoint: str) -> tuple[str, str]:
        """Have a server go on with other weights.

        Args:
            checkpoint: their folder; empty for the newest of the run that the server follows.

        Returns:
            The version's name, and why it is refused; one of them is empty.
        """
        server = self._job.driver if self._job is not None and self._thread.is_alive() else None
        if not isinstance(server, Server):
            return "", "that job is no server, or is not running (yet)"
        try:
            return server.publish(checkpoint), ""
        except UserError as error:
            return "", str(error)

    def status(self) -> dict[str, Any]:
        """What there is to see: plan, roles, replicas, slots, last events, last steps."""
        found: dict[str, Any] = {
            "run_dir": str(self._folder.path),
            "state": self._state(),
            "steps": self._config.train.steps,
            "records": [r for r in list(self._records)[-400:] if "loss" in r][-50:],
            "events": self._folder.event_lines()[-12:],
        }
        run = self._job
        if run is None or run.generations.plan is None:
            return found
        generations, fleet, plan = run.generations, run.generations.fleet, run.generations.plan
        ages = fleet.ages()
        found |= {
            "generation": plan.generation,
            "settled": run.reconciler.is_settled(),
            "sizes": run.reconciler.sizes(),
            "wanted": asdict(generations.wanted),
            "starting": fleet.starting(),
            "room": fleet.room(),
            "replicas": {"target": self._config.cluster.replication, "actual": generations.replicas()},
            "goodput": run.reconciler.ledger.goodput,
            "load": run.reconciler.load.tolist(),
            "versions": run.driver.versions if isinstance(run.driver, Server) else [],
            "slots": [
                {
                    "slot": slot,
                    "pid": member.pid,
                    "node": member.node,
                    "roles": plan.roles_of(slot) if slot in plan.addresses else ["standby"],
                    "shards": plan.parts_of(slot),
                    "experts": len(plan.experts_of(slot)),
                    "buckets": len(plan.buckets_of(slot)),
                    "heartbeat_age_s": ages.get(slot, 0.0),
                }
                for slot, member in sorted(fleet.members().items())
            ],
        }
        return found

    def _state(self) -> str:
        if self._failure is not None:
            return f"failed: {self._failure.error}"
        if self._thread.is_alive():
            doing = "serving" if isinstance(self._task, Served) else "training"
            return "stopping" if self._stopping.is_set() else doing
        return "ended" if self._thread.ident else "starting"
