"""The platform's scheduler: one named actor of a Ray cluster, which hosts its jobs and owns the pool of slots.

It belongs to no driver, and Ray restarts it when it dies. What it decides is in a journal of its own first (which jobs
there are, which actors), what a job decides in the job's (job.py): the new one reads them, finds the actors by name
and goes on; neither training nor a stream notices.
"""

import itertools
import os
import threading
import time
from dataclasses import asdict
from typing import Any

import ray

from sparseray.errors import SchedulerLostError, UserError
from sparseray.log import get_logger
from sparseray.platform.composition import Task
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.fleet.pool import Pool
from sparseray.platform.fleet.pool_actor import NAMESPACE
from sparseray.platform.job import Job
from sparseray.platform.loans import Loans
from sparseray.platform.offers import Offers
from sparseray.platform.opening import Validation
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.progress import Progress
from sparseray.platform.run.registry import forget_platform, platform_folder
from sparseray.platform.scheduler_actor import PLATFORM
from sparseray.platform.server import Server
from sparseray.platform.serving import Served
from sparseray.platform.trainer import Trainer

log = get_logger(__name__)

TASKS: dict[str, type[Validation] | type[Served]] = {kind.__name__: kind for kind in (Validation, Served)}
KEPT_ENDED = 8
LINGER_S = 2.0
"""A platform that nobody asked to last waits that long for another job."""
STOP_S = 60.0
LEND_EVERY_S = 0.05
LEAVE_S = 5.0
"""Before its node is gone: it leaves, whoever is there still."""


class Scheduler:
    """Hosts the jobs of a platform.

    Args:
        platform: its identifier; Ray gives a restarted one the same.
        lasts: whether it stays when no job is left.
        kept: actors to keep warm.
        ahead: actors that were started ahead of it, with the first numbers.
        kind: of those.
    """

    def __init__(self, *, platform: str, lasts: bool, kept: int, ahead: int, kind: Kind) -> None:
        folder = platform_folder(platform)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._platform, self._lasts = platform, lasts
        self._node = ray.get_runtime_context().get_node_id()
        self._journal = Journal(folder / "journal.sqlite")
        self._journal.lead()
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._is_over = False
        used = [entry["actor"] for entry in self._entries("actor")]
        numbers = itertools.count(max([*used, ahead - 1]) + 1)

        def next_number() -> int:
            number: int = next(numbers)
            self._journal.append("actor", generation=0, step=0, actor=number)
            return number

        self._pool = Pool(platform, next_number, kept=kept, kind=kind)
        self._loans = Loans(self._pool)
        if self._entries("begun"):
            self._pool.find()
        else:
            self._journal.append("begun", generation=0, step=0)
            self._pool.adopt(ahead)
        self._pool.start()
        self._go_on()
        threading.Thread(target=self._lend, daemon=True, name="lending").start()

    def _entries(self, kind: str) -> list[dict[str, Any]]:
        return self._journal.read(kind, limit=1 << 30)

    def _go_on(self) -> None:
        """Take the jobs over from a scheduler that died."""
        ended = {entry["job"] for entry in self._entries("ended")}
        begun = [entry for entry in reversed(self._entries("job")) if entry["job"] not in ended]
        for entry in begun:
            self._begin(entry["job"], entry["config"], TASKS[entry["task"]](**entry["about"]))
        self._pool.give_back_others(set(self._jobs))

    def _begin(self, job: str, config: dict[str, Any], task: Task) -> None:
        made = Job(
            job,
            from_dict(RunConfig, config),
            task,
            self._pool,
            leads=self._journal.leads,
            on_end=self._ended,
            loan=self._to_borrow,
            offers=self._offers,
        )
        self._jobs[job] = made
        made.start()

    def _ended(self, job: Job) -> None:
        """Take note that a job holds nothing any more; the last one ends a platform that does not last."""
        self._journal.append("ended", generation=0, step=0, job=job.job)
        with self._lock:
            over = [name for name, found in self._jobs.items() if found.is_over]
            for name in over[:-KEPT_ENDED]:
                del self._jobs[name]
        if not self._lasts:
            threading.Thread(target=self._end_if_idle, daemon=True, name="linger").start()

    def _end_if_idle(self) -> None:
        time.sleep(LINGER_S)
        with self._lock:
            if self._is_over or self._running():
                return
            self._is_over = True
        self._pool.close()
        forget_platform(self._platform)
        ray.kill(ray.get_actor(PLATFORM, namespace=NAMESPACE))

    def _lend(self) -> None:
        """Look for loans, and whether to leave, as long as this process lives."""
        while True:
            time.sleep(LEND_EVERY_S)
            try:
                self._loans.turn(self._running())
                self._leave()
            except Exception as error:
                log.error("lending: %s: %s", type(error).__name__, error)

    def _leave(self) -> None:
        """On a node that is to be drained: end after the jobs' slots have left, and let Ray start the next one elsewhere."""
        nodes = self._pool.nodes
        if self._node not in nodes.draining or not nodes.num_staying:
            return
        is_late = nodes.draining[self._node] - time.time() < LEAVE_S
        if is_late or not any(job.is_leaving for job in self._running()):
            log.warning("this node is drained: the scheduler goes on at another one")
            os._exit(1)

    def _running(self) -> list[Job]:
        with self._lock:
            return [job for job in self._jobs.values() if not job.is_over]

    def _to_borrow(self, kind: Kind) -> int:
        return self._loans.to_borrow(self._running(), kind)

    def _offers(self, asker: Job) -> Offers | None:
        """What another job offers one: a run that trains to the server that follows it, and that server to the run."""
        for job in self._running():
            driver = job.run.driver if job.run is not None and job.is_running else None
            if isinstance(asker.task, Served):
                if isinstance(driver, Trainer) and str(job.folder.path) == asker.task.run:
                    return driver.offers
            elif isinstance(driver, Server) and driver.can_give(asker.config.model, str(asker.folder.path)):
                return driver.offers
        return None

    # -- jobs --------------------------------------------------------------------------------------

    def submit(self, job: str, config: dict[str, Any], task: Task) -> bool:
        """Start a job; without effect where it runs already. False when this platform is ending.

        Args:
            job: its identifier.
            config: the run, as plain values; `run_dir` and `data.path` absolute.
            task: what it is for.
        """
        with self._lock:
            if self._is_over:
                return False
            if job not in self._jobs:
                self._journal.append(
                    "job",
                    generation=0,
                    step=0,
                    job=job,
                    config=config,
                    task=type(task).__name__,
                    about=asdict(task),
                )
                self._begin(job, config, task)
            return True

    def find(self, run_dir: str) -> str:
        """Identifier of the job that goes on in a folder, empty for none; what has ended there lets go of it."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if str(job.folder.path) == run_dir]
        for job in jobs:
            if job.is_running:
                return job.job
            job.release()
        return ""

    def jobs(self) -> list[dict[str, Any]]:
        """What goes on: identifier, folder and state of every job."""
        return [
            {"job": job.job, "run_dir": str(job.folder.path), "state": job.state()} for job in self._running()
        ]

    def _job(self, job: str) -> Job:
        with self._lock:
            found = self._jobs.get(job)
        if found is None:
            raise SchedulerLostError("this job has ended")
        return found

    def progress(self, job: str, after: int, epoch: str = "") -> Progress:
        """`Job.progress` of a job.

        Args:
            job, after, epoch: which, and what the caller has of it.
        """
        return self._job(job).progress(after, epoch)

    def stop(self, job: str) -> None:
        """Stop a job after its current step, with a checkpoint."""
        self._job(job).stop()

    def release(self, job: str) -> bool:
        """`Job.release` of a job that has ended."""
        return self._job(job).release()

    def abandon(self, job: str) -> bool:
        """End a job at once."""
        return self._job(job).abandon()

    def scale(self, job: str, role: str, count: int) -> str:
        """`Job.scale` of a job.

        Args:
            job, role, count: whose role shall have how many slots.
        """
        return self._job(job).scale(role, count)

    def publish(self, job: str, checkpoint: str) -> tuple[str, str]:
        """Have a server go on with other weights.

        Args:
            job, checkpoint: as in `Server.publish`.

        Returns:
            The version's name, and why it is refused; one of them is empty.
        """
        server = self._job(job).server
        if server is None:
            return "", "that job is no server, or is not running (yet)"
        try:
            return server.publish(checkpoint), ""
        except UserError as error:
            return "", str(error)

    def join(self, job: str, address: str) -> int:
        """`Serving.join` of a server; 0 while it is not there.

        Args:
            job, address: which, and of the ingress.
        """
        server = self._job(job).server
        return 0 if server is None else server.serving.join(address)

    def status(self, job: str) -> dict[str, Any]:
        """`Job.status` of a job."""
        return self._job(job).status()

    def plan(self, job: str) -> dict[str, Any] | None:
        """`Job.plan` of a job."""
        return self._job(job).plan()

    # -- the platform ------------------------------------------------------------------------------

    def room(self, kind: Kind, may_borrow: bool) -> int:
        """Slots that a job could be given now.

        Args:
            kind: of slot.
            may_borrow: whether training runs would lend it theirs.
        """
        return self._pool.room(kind) + (self._to_borrow(kind) if may_borrow else 0)

    def pool(self) -> dict[str, int]:
        """What the actors do."""
        return self._pool.status()

    def pid(self, job: str) -> int:
        """Process id of this scheduler, which hosts a job."""
        self._job(job)
        return os.getpid()

    def close(self) -> list[str]:
        """Stop every job after its step, with a checkpoint, and end the pool; the folders of jobs that did not stop."""
        with self._lock:
            self._is_over = True
        jobs = self._running()
        for job in jobs:
            job.stop()
        deadline, late = time.monotonic() + STOP_S, []
        for job in jobs:
            while job.is_running and time.monotonic() < deadline:
                time.sleep(0.05)
            late += [str(job.folder.path)] if job.is_running else []
            if job.is_running:
                job.abandon()
            else:
                job.release()
        self._pool.close()
        forget_platform(self._platform)
        return late
