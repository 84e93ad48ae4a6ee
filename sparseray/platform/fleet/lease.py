"""What passes between the platform's pool and a slot's process about who it works for; light, as the actor imports it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an actor reserves of its machine; a lease takes one of just its own kind.

    Args:
        cpus: CPUs.
        gpus: GPUs, 0 or 1.
        threads: torch threads, part of the bits of a result.
    """

    cpus: float = 1.0
    gpus: int = 0
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right of a job to an actor; its number is the id that the job knows the slot by.

    Args:
        job: identifier of the job.
        slot: slot id; never used twice in a job.
    """

    job: str
    slot: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an actor says of itself, to a scheduler that knows nothing of it.

    Args:
        kind: what it reserves.
        lease: that it has; None while it is free.
        pid: of its process.
        namespace: set of processes within which that means the same.
        node: of the cluster.
    """

    kind: Kind
    lease: Lease | None
    pid: int
    namespace: str
    node: str
