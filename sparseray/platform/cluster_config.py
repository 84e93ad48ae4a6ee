"""The configuration's section on slots: how many there are of each role, where, and what is done when they fail."""

import typing
from dataclasses import dataclass

from sparseray.model.limits import check, count, within

MOST_SLOTS = 1 << 16
OF_NODE = "node"
"""`bind_host` that is another address on each machine."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How many slots play which role, and where.

    Args:
        attention_workers, expert_shards, memory_shards: slots of each role.
        replication: holders of every piece of state.
        colocated: roles share slots; a call from a slot to itself is a function call.
        device: "cpu", "cuda" (a GPU for each slot, and slots share all roles), or "auto": cuda where the command finds as
            many GPUs of compute capability 9 or more and the roles share slots.
        threads_per_slot: torch threads, and parts of a step that a slot with all roles runs side by side; part of the
            bits of a result.
        cpus_per_slot: CPUs that Ray reserves for a slot.
        address: Ray address to join, for example "auto"; empty starts a local Ray.
        transport: "ipc" (Unix sockets, one host) or "tcp".
        bind_host: address that TCP sockets and metrics bind to; "node": each machine's own, by which Ray knows it, as several
            hosts need it.
        exchange: of slots that train in step (on GPUs, or in bfloat16). "peers": through each other's memory, on one host;
            "collective": by collectives of a group, NCCL or gloo; "auto": by these where the slots are on several hosts.
        deadline_s: seconds without an answer after which all slots are probed.
        hang_s: seconds without a sign of life after which a slot counts as lost.
        standby: warm slots without a role, ready to take over a lost one's.
        max_slots: most slots of the job, 0 for as many as the cluster has room for.
        rebalance_above: load of the busiest expert shard over the mean that moves experts, 0 for never.
        rebalance_every: least number of steps between two such moves.
        lend: give slots of a training run to servers of the same platform that lack some, and take them back.
        lend_return_s: seconds for which lent slots must have been idle before they go back.
        min_attention_workers, min_expert_shards, min_memory_shards: slots of each role that are never lent; of the
            latter two there stay as many as replicas.
    """

    attention_workers: int = count(1, 1, MOST_SLOTS)
    expert_shards: int = count(1, 1, MOST_SLOTS)
    memory_shards: int = count(1, 1, MOST_SLOTS)
    replication: int = count(1, 1, MOST_SLOTS)
    colocated: bool = False
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_slot: int = count(1, 1, 1024)
    cpus_per_slot: float = within(1.0, 0.0, 1024.0)
    address: str = ""
    transport: typing.Literal["ipc", "tcp"] = "ipc"
    bind_host: str = "127.0.0.1"
    exchange: typing.Literal["auto", "peers", "collective"] = "auto"
    deadline_s: float = within(30.0, above=0.0, at_most=1e6)
    # Below that, a busy machine would look like a dead one.
    hang_s: float = within(0.7, 0.3, 1e6)
    standby: int = count(0, 0, MOST_SLOTS)
    max_slots: int = count(0, 0, MOST_SLOTS)
    rebalance_above: float = within(0.0, 0.0, 1e6)
    rebalance_every: int = count(50)
    lend: bool = False
    lend_return_s: float = within(10.0, 0.0, 1e6)
    min_attention_workers: int = count(1, 1, MOST_SLOTS)
    min_expert_shards: int = count(1, 1, MOST_SLOTS)
    min_memory_shards: int = count(1, 1, MOST_SLOTS)

    def __post_init__(self) -> None:
        check("cluster", self)
