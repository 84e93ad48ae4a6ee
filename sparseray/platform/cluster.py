"""Starts or joins Ray and starts slots on it; the only file that does.

Without an address a local Ray is started for this run alone, with as many logical CPUs as the
placement has slots: on a laptop several slots share a core on purpose.
"""

import os
import uuid
from typing import Any

import ray

from sparseray.errors import ClusterError
from sparseray.log import get_logger
from sparseray.platform.config import ClusterConfig
from sparseray.platform.host import Host
from sparseray.platform.scheduler import Scheduler
from sparseray.platform.transport import remove_directory

log = get_logger(__name__)

NAMESPACE = "sparseray"
OBJECT_STORE_BYTES = 128 << 20


class Cluster:
    """A Ray connection with the slots of one job.

    Args:
        config: how to reach Ray and what a slot reserves.
        num_slots: slots to start.

    Raises:
        ClusterError: Ray cannot be reached, refuses the token, or has too few free CPUs.
    """

    def __init__(self, config: ClusterConfig, num_slots: int) -> None:
        self.config, self.num_slots = config, num_slots
        self.job = uuid.uuid4().hex
        self.slots: dict[int, Any] = {}
        self.scheduler: Any = None
        _connect(config, num_slots)
        self._check_room()

    def _check_room(self) -> None:
        free, all_ = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
        asked = self.num_slots * self.config.cpus_per_slot
        if asked > free:
            ray.shutdown()
            raise ClusterError(
                f"{self.num_slots} slots of {self.config.cpus_per_slot:g} CPU ask for {asked:g} CPUs, and {free:g} of the "
                f"cluster's {all_:g} are free; ask for fewer actors (cluster.*), a smaller cluster.cpus_per_slot, "
                "or stop another job"
            )

    def start(self) -> dict[int, str]:
        """Start all slots side by side and return their addresses."""
        arguments = {"job": self.job, "transport": self.config.transport, "bind_host": self.config.bind_host}
        actor = ray.remote(Host)
        self.slots = {
            slot: actor.options(num_cpus=self.config.cpus_per_slot, max_concurrency=4).remote(
                slot=slot, threads=self.config.threads_per_slot, **arguments
            )
            for slot in range(self.num_slots)
        }
        addresses = ray.get([handle.address.remote() for handle in self.slots.values()])
        for handle in self.slots.values():
            handle.serve.remote()
        return dict(zip(self.slots, addresses))

    def metric_targets(self) -> dict[str, str]:
        """Address of every slot's metrics."""
        found = ray.get([handle.metrics_address.remote() for handle in self.slots.values()])
        return {f"slot-{slot}": address for slot, address in zip(self.slots, found)}

    def start_scheduler(self, **arguments: Any) -> Any:
        """Start the named scheduler actor of this job."""
        actor = ray.remote(Scheduler)
        self.scheduler = actor.options(
            name=f"sparseray-scheduler-{self.job[:8]}", namespace=NAMESPACE, num_cpus=0, max_concurrency=4
        ).remote(job=self.job, transport=self.config.transport, bind_host=self.config.bind_host, **arguments)
        return self.scheduler

    def stop(self) -> None:
        """End all actors of the job, and Ray itself if it was started here; no socket stays behind."""
        for handle in [*self.slots.values(), self.scheduler]:
            if handle is not None:
                ray.kill(handle)
        self.slots = {}
        ray.shutdown()
        remove_directory(self.job)


def _connect(config: ClusterConfig, num_slots: int) -> None:
    # Slots decide about their own threads; without this Ray warns and sets OMP_NUM_THREADS itself.
    environment = {"OMP_NUM_THREADS": str(config.threads_per_slot), "RAY_DEDUP_LOGS": "0"}
    runtime = {"env_vars": environment}
    try:
        if config.address:
            ray.init(
                address=config.address,
                namespace=NAMESPACE,
                runtime_env=runtime,
                log_to_driver=True,
                logging_level="error",
            )
        else:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # Ray runs its workers at nice 15; a step waits for the slowest slot, so here they are not niced.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(
                address="local",
                num_cpus=max(1, round(num_slots * config.cpus_per_slot + 0.5)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                namespace=NAMESPACE,
                runtime_env=runtime,
                _node_ip_address="127.0.0.1",
                log_to_driver=True,
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
