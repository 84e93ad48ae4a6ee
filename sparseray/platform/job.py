"""A job of the platform: a training run or a server, driven in a thread of its own from its own journal.

Everything is decided in that thread and written to the journal first; its words to the slots go through its mailbox,
never through Ray. Whatever ends one job ends no other. A job that its journal knows goes on where the scheduler
before had died: in the next generation, with the slots that it has.
"""

import itertools
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TextIO

import ray

from sparseray.actors.installation import JobSpec
from sparseray.actors.wire.codec import to_plain
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.errors import FencedError, JobEndedError, UserError
from sparseray.log import get_logger
from sparseray.platform.composition import Run, Task
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.fleet.control import Member
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.fleet.pool import Pool
from sparseray.platform.fleet.pool_actor import kind_of
from sparseray.platform.fleet.ray_fleet import RayFleet
from sparseray.platform.fleet.transport import ZmqTransport, own_address, private_directory, remove_directory
from sparseray.platform.metrics.exporter import Metrics, write_targets
from sparseray.platform.offers import Offers
from sparseray.platform.opening import slots_of
from sparseray.platform.planning.inventory import Roles, num_slots
from sparseray.platform.planning.lending import Lender, Loan
from sparseray.platform.run import lock
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.history import JobHistory
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.progress import Failure, Progress
from sparseray.platform.run.registry import forget_run, register_run
from sparseray.platform.server import Server
from sparseray.platform.serving import Served

log = get_logger(__name__)

KEPT_RECORDS = 5000
DRIVER_GONE_S = 60.0


class Job:
    """One job.

    Args:
        job: its identifier.
        config: the run; `run_dir` and `data.path` absolute.
        task: what it is for.
        pool: where its slots come from.
        leads: whether this process is the platform's scheduler still.
        on_end: told once it holds nothing any more.
        loan: how many slots of a kind others would lend.
        offers: what another job offers this one; None where none does.
    """

    def __init__(
        self,
        job: str,
        config: RunConfig,
        task: Task,
        pool: Pool,
        *,
        leads: Callable[[], bool],
        on_end: Callable[["Job"], None],
        loan: Callable[[Kind], int],
        offers: Callable[["Job"], Offers | None],
    ) -> None:
        self._leads, self._loan, self._offers = leads, loan, offers
        self.job, self.config, self.task, self._pool, self._on_end = job, config, task, pool, on_end
        self.folder = RunFolder(Path(config.run_dir))
        self.run: Run | None = None
        self._epoch = f"{os.getpid()}-{time.time()}"
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT_RECORDS)
        self._told = 0
        self._stopping, self._released, self._closed = (threading.Event() for _ in range(3))
        self._failure: Failure | None = None
        self._asked = time.monotonic()
        self._fleet: RayFleet | None = None
        self._lock: TextIO | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"job-{job[:6]}")

    def start(self) -> None:
        """Begin, or go on for a scheduler that died."""
        self._thread.start()

    @property
    def is_serving(self) -> bool:
        """Whether it answers requests; it trains otherwise."""
        return isinstance(self.task, Served)

    @property
    def is_running(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    @property
    def is_over(self) -> bool:
        """Whether it holds nothing any more."""
        return self._closed.is_set()

    # -- the driving thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if other := self._hold():
                self._failure = Failure(error=other, kind="ConfigError", user=True)
                return
            self._drive()
        except JobEndedError as error:
            log.info("%s: %s", self.folder.path, error)
        except Exception as error:
            if isinstance(error, FencedError) and not self._leads():
                # All jobs are the other scheduler's now, their slots, targets and sockets too.
                log.error("this scheduler acts no more: %s", error)
                os._exit(1)
            log.error("the job stopped:\n%s", traceback.format_exc())
            self._failure = Failure(
                error=str(error), kind=type(error).__name__, user=isinstance(error, UserError)
            )
        finally:
            if self.run is not None:
                self.run.close()
            write_targets(self.folder.targets, {}, self.folder.path.name)
            threading.Thread(target=self._end, daemon=True, name="end").start()

    def _hold(self) -> str:
        """Keep others out of the run folder; says who works there already.

        A scheduler of this job that is not quite dead is fenced by the journal, not waited for.
        """
        gcs = ray.get_runtime_context().gcs_address
        self._lock = lock.hold(self.folder.path, job=self.job, ray=gcs)
        other = lock.holder(self.folder.path) if self._lock is None else None
        if other is None or other.get("job") == self.job:
            return ""
        return f"run_dir={self.folder.path} is in use by process {other.get('pid')} on {other.get('host')}; give another"

    def _drive(self) -> None:
        cluster = self.config.cluster
        metrics = Metrics({"slot": "scheduler"}, declare="scheduler")
        bind_host = own_address(cluster.bind_host)
        own = metrics.serve(bind_host)
        directory = private_directory(self.job) if cluster.transport == "ipc" else None
        mailbox = Mailbox(ZmqTransport("scheduler", directory, bind_host), SCHEDULER, self.job)

        def show_targets(members: dict[int, Member]) -> None:
            targets = {f"slot-{slot}": member.metrics for slot, member in members.items()}
            write_targets(self.folder.targets, targets | {"scheduler": own}, self.folder.path.name)

        def fleet_of(journal: Journal, history: JobHistory, spec: JobSpec) -> RayFleet:
            ids = itertools.count(max(history.slots, default=-1) + 1)

            def next_slot() -> int:
                slot = next(ids)
                journal.append("slot", generation=0, step=0, slot=slot, job=self.job)
                return slot

            self._fleet = RayFleet(
                self.job, cluster, spec, self._pool, next_slot, show_targets, journal.leads
            )
            return self._fleet

        try:
            run = self.run = Run.open(
                self.config,
                mailbox,
                fleet_of,
                metrics,
                task=self.task,
                on_record=self._tell,
                should_stop=self._should_stop,
                offers=lambda: self._offers(self),
            )
            self._open_slots(run)
            run.drive()
        finally:
            metrics.close()
            if self.run is None:
                mailbox.transport.close()

    def _open_slots(self, run: Run) -> None:
        """Find the slots of a job that goes on; start those of one that begins."""
        assert self._fleet is not None
        register_run(self.folder.path, ray.get_runtime_context().gcs_address)
        self._fleet.is_spare = run.generations.is_spare
        if self.is_serving:
            self._fleet.loan = partial(self._loan, kind_of(self.config.cluster))
        self._fleet.reopen()
        if run.history.plan is None:
            self._fleet.open(slots_of(self.config, run.generations.workload.inventory))

    def _should_stop(self) -> bool:
        """A run outlives its driver; a server without an ingress serves nobody."""
        is_alone = self.is_serving and time.monotonic() - self._asked > DRIVER_GONE_S
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
        forget_run(self.folder.path)
        remove_directory(self.job)
        if self._lock is not None:
            self._lock.close()
        self._closed.set()
        self._on_end(self)

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
        while self._told <= after and self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)
        done = not self.is_running
        told, kept = self._told, list(self._records)
        new = kept[max(0, len(kept) - (told - after)) :] if told > after else []
        return Progress(epoch=self._epoch, seen=told, records=new, done=done, failure=self._failure)

    def stop(self) -> None:
        """Stop after the current step, with a checkpoint."""
        self._stopping.set()

    def release(self, wait_s: float = 10.0) -> bool:
        """Give all slots back; True once that is done. Called by the driver that has seen the end."""
        self._released.set()
        return self._closed.wait(wait_s)

    def abandon(self, wait_s: float = 10.0) -> bool:
        """End at once, without a checkpoint; True once that is done."""
        self._stopping.set()
        if self._fleet is not None and self.is_running:
            self._fleet.close()
        return self.release(wait_s)

    def scale(self, role: str, count: int) -> str:
        """Ask for another number of slots of a role.

        Args:
            role: attention, experts or memory.
            count: wanted slots.

        Returns:
            Why it is refused, and nothing is changed; empty otherwise.
        """
        if self.run is None or self.run.generations.plan is None or not self.is_running:
            return "the job is not running (yet); ask again once it has made a step"
        try:
            self.run.reconciler.request(role, count)
        except (UserError, FencedError) as error:
            return str(error)
        return ""

    @property
    def is_leaving(self) -> bool:
        """Whether it has slots on a node that is to be drained."""
        return self._fleet is not None and bool(self._fleet.draining())

    @property
    def server(self) -> Server | None:
        """What drives a job that serves, while it does."""
        server = self.run.driver if self.run is not None and self.is_running else None
        return server if isinstance(server, Server) else None

    # -- lending -------------------------------------------------------------------------------

    def lender(self) -> Lender | None:
        """What it could lend and has lent; None for a server, and for a run that does not lend or is not there yet."""
        cluster, run = self.config.cluster, self.run
        if self.is_serving or not cluster.lend or run is None or run.generations.plan is None:
            return None
        generations = run.generations
        # Fewer holders of experts and memory than replicas would be fewer replicas, before long.
        least = (
            max(cluster.min_expert_shards, cluster.replication),
            max(cluster.min_memory_shards, cluster.replication),
        )
        return Lender(
            job=self.job,
            roles=generations.wish.roles,
            standby=cluster.standby,
            least=Roles(attention=cluster.min_attention_workers, experts=least[0], memory=least[1]),
            lent=generations.wish.lent,
            replication=cluster.replication,
            colocated=cluster.colocated,
            is_settled=run.reconciler.is_settled() and self.lacking() >= 0,
        )

    def lacking(self) -> int:
        """Slots that it wants, spare ones among them, beyond those it has; below zero for too many."""
        if self.run is None:
            return 0
        generations, colocated = self.run.generations, self.config.cluster.colocated
        wanted = num_slots(generations.wanted, colocated=colocated) + generations.standby
        return wanted - (len(generations.fleet.members()) - len(generations.fleet.draining()))

    def lend(self, loan: Loan, why: str) -> None:
        """Do without more slots from now on, or less; the change goes on from the next step.

        Args:
            loan: what is lent in all.
            why: for people.
        """
        assert self.run is not None
        generations = self.run.generations
        generations.ask(lent=loan.lent)
        kind = "lent" if loan.count > 0 else "returned"
        generations.tell(kind, self.run.driver.step, f"{kind} {why}")
        generations.events.metrics.record("elastic_slots", generations.lent_slots, role="lent")

    def status(self) -> dict[str, Any]:
        """What there is to see: plan, roles, replicas, slots, last events, last steps."""
        found: dict[str, Any] = {
            "run_dir": str(self.folder.path),
            "state": self.state(),
            "steps": self.config.train.steps,
            "records": [r for r in list(self._records)[-400:] if "loss" in r][-50:],
            "events": self.folder.event_lines()[-12:],
            "pool": self._pool.status(),
        }
        run = self.run
        if run is None or run.generations.plan is None:
            return found
        generations, fleet, plan = run.generations, run.generations.fleet, run.generations.plan
        ages = fleet.ages()
        found |= {
            "generation": plan.generation,
            "settled": run.reconciler.is_settled(),
            "sizes": run.reconciler.sizes(),
            "wanted": asdict(generations.wanted),
            "lent": generations.lent_slots,
            "draining": {
                slot: None if left == inf else round(left) for slot, left in fleet.draining().items()
            },
            "starting": fleet.starting(),
            "room": fleet.room(),
            "replicas": {"target": self.config.cluster.replication, "actual": generations.replicas()},
            "goodput": run.reconciler.ledger.goodput,
            "load": run.reconciler.load.tolist(),
            "versions": self.server.versions if self.server else [],
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

    def plan(self) -> dict[str, Any] | None:
        """Configuration and plan in force, as plain values; None before there is one."""
        plan = None if self.run is None else self.run.generations.plan
        return None if plan is None else {"config": to_dict(self.config), "plan": to_plain(plan)}

    def state(self) -> str:
        """What it does, in a word or with the reason of its failure."""
        if self._failure is not None:
            return f"failed: {self._failure.error}"
        if self.is_running:
            doing = "serving" if self.is_serving else "training"
            return "stopping" if self._stopping.is_set() else doing
        return "ended" if self._thread.ident else "starting"
