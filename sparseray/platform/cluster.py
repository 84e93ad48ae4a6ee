"""Starts or joins Ray and starts slots on it; the only file that does.

Without an address a local Ray is started for this run alone, with more logical CPUs than it has slots:
on a laptop several slots share a core on purpose, and a run must be able to grow.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import ray

from sparseray.errors import ClusterError, SchedulerLostError
from sparseray.log import get_logger
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.ray_fleet import NAMESPACE, slot_name
from sparseray.platform.fleet.transport import remove_directory
from sparseray.platform.run.registry import RegisteredRun, forget_run, scheduler_name
from sparseray.platform.scheduler import Scheduler

log = get_logger(__name__)

OBJECT_STORE_BYTES = 128 << 20
LOCAL_CPUS = 16
CURES = {"CPU": "a smaller cluster.cpus_per_slot", "GPU": "cluster.device=cpu"}


class Cluster:
    """A Ray connection with the slots of one job.

    Args:
        config: how to reach Ray and what a slot reserves.
        num_slots: slots to start.
        run_dir: of the run or server; where it is going on already in this cluster, no room is needed.

    Raises:
        ClusterError: Ray cannot be reached, refuses the token, or has too few free CPUs.
    """

    def __init__(self, config: ClusterConfig, num_slots: int, run_dir: Path) -> None:
        self.config, self.num_slots, self._run_dir = config, num_slots, run_dir
        self.job = uuid.uuid4().hex
        self.scheduler: Any = None
        _connect(config, num_slots)
        if self.find_scheduler(run_dir) is None:
            self._check_room()

    def _check_room(self) -> None:
        free, all_ = ray.available_resources(), ray.cluster_resources()
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

    def start_scheduler(self, run_dir: Path, **arguments: Any) -> Any:
        """Start the scheduler of a run; Ray restarts it when it dies, and it outlives this process."""
        actor = ray.remote(Scheduler)
        self.scheduler = actor.options(
            name=scheduler_name(run_dir),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=8,
        ).remote(job=self.job, **arguments)
        return self.scheduler

    def find_scheduler(self, run_dir: Path) -> Any | None:
        """The scheduler of a run that is going on, or None."""
        try:
            self.scheduler = ray.get_actor(scheduler_name(run_dir), namespace=NAMESPACE)
        except ValueError:
            self.scheduler = None
        return self.scheduler

    def stop(self, *, at_once: bool = False) -> None:
        """End all actors of the job, and Ray itself if it was started here; no socket stays behind.

        Args:
            at_once: do not wait for the scheduler to come to an end by itself.
        """
        if self.scheduler is not None:
            try:
                self.job = ray.get(self.scheduler.job.remote(), timeout=5.0)
                if not at_once:
                    ray.get(self.scheduler.release.remote(), timeout=15.0)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                log.warning("the scheduler did not end by itself: %s", " ".join(str(error).split())[:200])
            ray.kill(self.scheduler)
            self.scheduler = None
            self._end_slots()
        forget_run(self._run_dir)
        ray.shutdown()
        remove_directory(self.job)

    def _end_slots(self) -> None:
        """End detached slots that their scheduler could not."""
        prefix = slot_name(self.job, 0).removesuffix("0")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
                try:
                    ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE))
                except ValueError:
                    log.debug("%s has ended already", entry["name"])


def attach(run: RegisteredRun) -> Any:
    """Connect to the scheduler of a run that is going on (platform/run/registry.py).

    Raises:
        ClusterError: its cluster or its scheduler is gone.
    """
    try:
        ray.init(address=run.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        return ray.get_actor(scheduler_name(Path(run.run_dir)), namespace=NAMESPACE)
    # Ray says with a bare Exception that nobody answers.
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            f"the run in {run.run_dir} does not answer at {run.address} ({' '.join(str(error).split())[:160]}); "
            "it has ended or its machine is gone; start it again with its `pretrain` command"
        ) from None


def detach() -> None:
    """Leave a cluster that `attach` joined."""
    ray.shutdown()


def ask(scheduler: Any, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
    """Call a method of a scheduler and wait for the answer.

    Args:
        scheduler: handle of the actor.
        method: its name.
        arguments: of the call.
        timeout_s: seconds to wait.

    Raises:
        SchedulerLostError: it is gone, or being restarted.
    """
    try:
        return ray.get(getattr(scheduler, method).remote(*arguments), timeout=timeout_s)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        raise SchedulerLostError(" ".join(str(error).split())[:200]) from None


def _connect(config: ClusterConfig, num_slots: int) -> None:
    # Slots and scheduler report through the run's folder; Ray's own words on each death would bury it.
    # Slots decide about their own threads; without this Ray warns and sets OMP_NUM_THREADS itself.
    environment = {"OMP_NUM_THREADS": str(config.threads_per_slot), "RAY_DEDUP_LOGS": "0"}
    runtime = {"env_vars": environment}
    try:
        if config.address:
            ray.init(
                address=config.address,
                namespace=NAMESPACE,
                runtime_env=runtime,
                log_to_driver=False,
                logging_level="error",
            )
        else:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # Ray runs its workers at nice 15; a step waits for the slowest slot, so here they are not niced.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(
                address="local",
                num_cpus=max(LOCAL_CPUS, round(2 * num_slots * config.cpus_per_slot + 0.5)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                namespace=NAMESPACE,
                runtime_env=runtime,
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
