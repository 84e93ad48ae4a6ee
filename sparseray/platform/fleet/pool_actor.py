"""An actor of the platform's pool: a process that slots live in, what it reserves, its name, and its start."""

import os
from dataclasses import dataclass
from typing import Any

import ray

from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.lease import Kind, Lease
from sparseray.platform.fleet.slot_actor import SlotActor

NAMESPACE = "sparseray"


@dataclass(kw_only=True)
class Actor:
    """A process of the pool.

    Args:
        number: part of its name; never used twice in a platform.
        handle: Ray's.
        kind: what it reserves.
        lease: that it has; None while it is free.
        started: when it was asked for, `time.monotonic`.
        is_new: whether no job has had it yet.
        is_warm: whether it has loaded what every job needs.
        leaving: since when it closes the slot of an ended lease, None if it does not.
        node: of the cluster; empty before it is warm.
    """

    number: int
    handle: Any
    kind: Kind
    lease: Lease | None = None
    started: float = 0.0
    is_new: bool = True
    is_warm: bool = False
    leaving: float | None = None
    node: str = ""


def kind_of(config: ClusterConfig) -> Kind:
    """What a slot of a configuration reserves."""
    gpus = 1 if config.device == "cuda" else 0
    return Kind(cpus=config.cpus_per_slot, gpus=gpus, threads=config.threads_per_slot)


def actor_name(platform: str, number: int) -> str:
    """Ray's name of an actor.

    Args:
        platform, number: their identifiers.
    """
    return f"sparseray-{platform[:12]}-slot-{number}"


def start_actor(platform: str, number: int, kind: Kind) -> Any:
    """Start a slot actor; Ray shows it the GPU that it reserves, and no other.

    Args:
        platform, number: its name's.
        kind: what it reserves.
    """
    # A process with an environment of its own waits for one more of Ray's daemons.
    own = {"OMP_NUM_THREADS": str(kind.threads)}
    runtime = {"env_vars": own} if not own.items() <= os.environ.items() else None
    return (
        ray.remote(SlotActor)
        .options(
            num_cpus=kind.cpus,
            num_gpus=kind.gpus,
            max_concurrency=8,
            name=actor_name(platform, number),
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy="SPREAD",
            runtime_env=runtime,
        )
        .remote(kind)
    )
