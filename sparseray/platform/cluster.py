"""Starts or joins Ray and the platform on it; the only file that does.

Without an address a local Ray is started for this command alone, with more logical CPUs than it has slots: on a
laptop several slots share a core on purpose, and a run must be able to grow. At an address the platform that runs there
is joined; where there is none, one is started that ends with its last job.
"""

import contextlib
import os
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from sparseray.errors import ClusterError, SchedulerLostError
from sparseray.log import get_logger
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.forked_workers import ForkedWorkers
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.fleet.pool_actor import NAMESPACE, actor_name, kind_of, start_actor
from sparseray.platform.fleet.transport import remove_directory
from sparseray.platform.ray_settings import OBJECT_STORE_BYTES, local_cpus, set_environment
from sparseray.platform.run.registry import RegisteredRun, forget_platform, forget_run
from sparseray.platform.scheduler_actor import PLATFORM, SchedulerActor

log = get_logger(__name__)

CURES = {"CPU": "a smaller cluster.cpus_per_slot", "GPU": "cluster.device=cpu"}
JOIN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class JobHandle:
    """One job of a platform, for `ask`.

    Args:
        platform: Ray's handle of the scheduler.
        job: identifier of the job.
    """

    platform: Any
    job: str


class Cluster:
    """A Ray connection for one job.

    Args:
        config: how to reach Ray and what a slot reserves.
        num_slots: slots to start.
        run_dir: of the run or server; where it is going on already in this cluster, no room is needed.
        may_borrow: whether slots count that training runs would lend.
        workers: that a Ray of its own shall take; None has each load what it needs.

    Raises:
        ClusterError: Ray cannot be reached, refuses the token, or has too few free CPUs.
    """

    def __init__(
        self,
        config: ClusterConfig,
        num_slots: int,
        run_dir: Path,
        *,
        may_borrow: bool = False,
        workers: ForkedWorkers | None = None,
    ) -> None:
        self.config, self.num_slots, self._run_dir = config, num_slots, run_dir
        self.job = uuid.uuid4().hex
        self._platform_id = uuid.uuid4().hex
        self.scheduler: JobHandle | None = None
        with nullcontext() if workers is None else workers.started_by_ray():
            _connect(config, num_slots)
        if not config.address:
            # Processes start and load side by side; the scheduler finds these when it is there.
            self._platform(ahead=num_slots)
        elif self.find_job() is None:
            self._check_room(may_borrow=may_borrow)

    def _check_room(self, *, may_borrow: bool) -> None:
        free, all_ = ray.available_resources(), ray.cluster_resources()
        platform = find_platform()
        if platform is not None and self.num_slots <= ask(platform, "room", kind_of(self.config), may_borrow):
            return
        asked = {"CPU": self.num_slots * self.config.cpus_per_slot}
        if self.config.device == "cuda":
            asked["GPU"] = float(self.num_slots)
        for kind, count in asked.items():
            if count > free.get(kind, 0.0):
                ray.shutdown()
                raise ClusterError(
                    f"{self.num_slots} slots of {count / self.num_slots:g} {kind} ask for {count:g} {kind}s, and "
                    f"{free.get(kind, 0.0):g} of the cluster's {all_.get(kind, 0.0):g} are free; ask for fewer actors "
                    f"(cluster.*), {CURES[kind]}, or stop another job"
                )

    def start_job(self, config: dict[str, Any], task: Any) -> JobHandle:
        """Start a job on the platform of this cluster; both outlive this process where Ray does.

        Args:
            config: of the run, as plain values.
            task: what the job is for.

        Raises:
            ClusterError: the platform does not answer.
        """
        deadline = time.monotonic() + JOIN_S
        while True:
            platform = self._platform()
            try:
                if ask(platform, "submit", self.job, config, task, timeout_s=120.0):
                    self.scheduler = JobHandle(platform=platform, job=self.job)
                    return self.scheduler
            except SchedulerLostError as error:
                if time.monotonic() > deadline:
                    where = self.config.address or "a Ray of its own"
                    raise ClusterError(
                        f"the platform's scheduler on {where} does not answer ({error}); the machine may be overloaded: "
                        "try again, or end the platform with `python -m sparseray down`"
                    ) from None
            # The one that runs has no job left and is ending.
            time.sleep(0.1)

    def _platform(self, ahead: int = 0) -> Any:
        kind = kind_of(self.config)
        for number in range(ahead):
            start_actor(self._platform_id, number, kind)
        return start_platform(self._platform_id, ahead=ahead, kind=kind)

    def find_job(self) -> JobHandle | None:
        """The job that is going on in the run's folder, or None; a Ray that was started here has none yet."""
        self.scheduler = None
        platform = find_platform() if self.config.address else None
        if platform is not None and (job := ask(platform, "find", str(self._run_dir.absolute()))):
            self.scheduler = JobHandle(platform=platform, job=job)
        return self.scheduler

    def stop(self, *, at_once: bool = False) -> None:
        """Give back all that the job has, and end Ray if it was started here; no socket stays behind.

        Args:
            at_once: end the job in the middle of what it does.
        """
        if self.scheduler is not None:
            self.job = self.scheduler.job
            try:
                if not (at_once and not self.config.address):
                    ask(self.scheduler, "abandon" if at_once else "release", timeout_s=15.0)
            except SchedulerLostError as error:
                log.warning("the job did not end by itself: %s", error)
            self.scheduler = None
        forget_run(self._run_dir)
        ray.shutdown()
        if not self.config.address:
            forget_platform(self._platform_id)
        remove_directory(self.job)


def find_platform() -> Any | None:
    """The scheduler of the cluster that this process is connected to, or None."""
    try:
        return ray.get_actor(PLATFORM, namespace=NAMESPACE)
    except ValueError:
        return None


def start_platform(
    platform: str, *, lasts: bool = False, kept: int = 0, ahead: int = 0, kind: Kind | None = None
) -> Any:
    """Return the scheduler of this cluster, started if there is none; Ray restarts it when it dies.

    Args:
        platform: identifier of one that is started.
        lasts: whether that stays when no job is left.
        kept: actors that it keeps warm.
        ahead: actors that were started ahead of it.
        kind: of those.
    """
    actor = ray.remote(SchedulerActor).options(
        name=PLATFORM,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=64,
    )
    return actor.remote(platform=platform, lasts=lasts, kept=kept, ahead=ahead, kind=kind or Kind())


def end_platform(platform: str) -> None:
    """End the scheduler of this cluster, and the actors that it could not end itself.

    Args:
        platform: its identifier.
    """
    scheduler, prefix = find_platform(), actor_name(platform, 0).removesuffix("0")
    left = [] if scheduler is None else [scheduler]
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
            with contextlib.suppress(ValueError):
                left.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    for actor in left:
        ray.kill(actor)


def connect(address: str) -> None:
    """Join the Ray at an address, to ask or to start a platform there.

    Raises:
        ClusterError: it cannot be reached, or refuses the token.
    """
    _connect(ClusterConfig(address=address), 0)


def attach(run: RegisteredRun) -> JobHandle:
    """Connect to a job that is going on (platform/run/registry.py).

    Raises:
        ClusterError: its cluster or the platform there is gone.
    """
    why = "no job goes on there"
    try:
        ray.init(address=run.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        platform = find_platform()
        if platform is not None and (job := ask(platform, "find", run.run_dir)):
            return JobHandle(platform=platform, job=job)
        forget_run(Path(run.run_dir))
    # Ray says with a bare Exception that nobody answers.
    except Exception as error:
        why = " ".join(str(error).split())[:160]
    ray.shutdown()
    raise ClusterError(
        f"the run in {run.run_dir} does not answer at {run.address} ({why}); "
        "it has ended or its machine is gone; start it again with its `pretrain` command"
    )


def detach() -> None:
    """Leave a cluster that `attach` joined."""
    ray.shutdown()


def ask(scheduler: Any, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
    """Call a method of a platform's scheduler, or one for a job of it, and wait for the answer.

    Args:
        scheduler: Ray's handle, or a `JobHandle`.
        method: its name.
        arguments: of the call.
        timeout_s: seconds to wait.

    Raises:
        SchedulerLostError: it is gone, or being restarted, or the job has ended.
    """
    if isinstance(scheduler, JobHandle):
        scheduler, arguments = scheduler.platform, (scheduler.job, *arguments)
    try:
        return ray.get(scheduler.call.remote(method, *arguments), timeout=timeout_s)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, SchedulerLostError) as error:
        raise SchedulerLostError(" ".join(str(error).split())[:200]) from None


def _connect(config: ClusterConfig, num_slots: int) -> None:
    # Slots and scheduler report through the run's folder; Ray's own words on each death would bury it.
    # Slots decide about their own threads; without this Ray warns and sets OMP_NUM_THREADS itself.
    threads = str(config.threads_per_slot)
    try:
        if config.address:
            ray.init(
                address=config.address,
                namespace=NAMESPACE,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
                log_to_driver=False,
                logging_level="error",
            )
        else:
            set_environment()
            os.environ["OMP_NUM_THREADS"] = threads
            ray.init(
                address="local",
                num_cpus=local_cpus(num_slots * config.cpus_per_slot),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                namespace=NAMESPACE,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level="error",
            )
    # Ray says with a bare Exception that its own daemons did not start in time.
    except Exception as error:
        raise ClusterError(_connection_message(config.address, error)) from None


def _connection_message(address: str, error: Exception) -> str:
    where = f"the Ray cluster at {address!r}" if address else "a local Ray"
    text = " ".join(str(error).split())[:300]
    if not address:
        return f"cannot start {where}: {text}; free memory or CPUs, and see Ray's logs in its session folder"
    # Ray reports a refused token on stderr only; its exception says no more than that it could not connect.
    return (
        f"cannot reach {where}: {text}; check the address with `ray status`, and if the cluster asks for a token "
        "set RAY_AUTH_MODE=token and put it into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )
