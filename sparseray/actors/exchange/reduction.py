"""The gradients' way of one step: from logical shards to one sum at every holder, then `prepared`.

Dense gradients go to the first dense holder, which shares the sum; experts and memory rows are
reduced where they live, and primaries send the sum to their backups. Sums follow tree.py, so
arrival order is free. Phase one of the commit (platform/training.py has phase two).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import SCHEDULER, Message

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What one logical shard of a step gave.

    Args:
        loss_sum: cross-entropy summed over its tokens, nats.
        aux_loss: balance loss.
        tokens: number of targets.
        counts_LE: int64, tokens per moe layer and expert.
        gradient: fp32 [P], dense gradient.
        rows: row gradients of each memory layer, (rows rising, sums).
    """

    loss_sum: float
    aux_loss: float
    tokens: int
    counts_LE: Tensor
    gradient: Tensor
    rows: list[tuple[np.ndarray, np.ndarray]]


class Reduction:
    """Reduces the gradients of what one slot holds, in one generation.

    Args:
        mailbox: of the slot.
        plan: who holds what.
        dense, experts, memory: the slot's states, None for what it does not hold.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        plan: Plan,
        dense: DenseState | None,
        experts: ExpertShard | None,
        memory: MemoryShard | None,
    ) -> None:
        self.mailbox, self.plan = mailbox, plan
        self.dense, self.experts, self.memory = dense, experts, memory
        self._parts_due: dict[int, set[int]] = {}
        self.handlers: dict[str, Callable[[Message], None]] = {
            "finish_shard": self._finish_shard,
            "expert_part": self._expert_part,
            "dense_nodes": self._dense_nodes,
            "dense_reduced": self._dense_reduced,
            "expert_reduced": self._expert_reduced,
            "rows_reduced": self._rows_reduced,
        }

    def send_shard(
        self, step: int, shard: int, result: ShardResult, owner_of: Callable[[int, np.ndarray], np.ndarray]
    ) -> None:
        """At an attention worker: send a finished shard's row gradients, and word of its end, to all holders.

        Args:
            step, shard: what was finished.
            result: of the shard.
            owner_of: slot that answers for each row of a memory layer.
        """
        assert self.dense is not None
        self.dense.tree.add(0, shard, result.gradient)
        owners = [owner_of(layer, rows) for layer, (rows, _) in enumerate(result.rows)]
        memory_slots = self.plan.memory_primaries
        for slot in sorted(set(self.plan.expert_primaries) | set(memory_slots)):
            arrays: Arrays = ()
            if slot in memory_slots:
                arrays = tuple(a[owner == slot] for owner, pair in zip(owners, result.rows) for a in pair)
            if slot == self.mailbox.slot:
                self.finish(step, shard, arrays)
            else:
                self.mailbox.post(slot, "finish_shard", step=step, shard=shard, arrays=arrays)

    def send_dense(self, step: int) -> None:
        """At an attention worker: send the subtrees of its shards to the reducer."""
        assert self.dense is not None
        reducer = self.plan.dense[0]
        nodes = self.dense.tree.nodes()
        if reducer == self.mailbox.slot:
            self._dense_complete(step)
        else:
            self.mailbox.post(
                reducer,
                "dense_nodes",
                step=step,
                body={"nodes": [(level, index) for level, index, _ in nodes]},
                arrays=tuple(value.numpy() for _, _, value in nodes),
            )

    def _finish_shard(self, message: Message) -> None:
        self.finish(message.step, message.shard, message.arrays)

    def finish(self, step: int, shard: int, arrays: Arrays) -> None:
        """Take note that a logical shard has sent all its gradients here."""
        plan, me = self.plan, self.mailbox.slot
        if self.experts is not None and self.experts.computed:
            for primary, keys in self._elsewhere(shard).items():
                part = (self.experts.part(shard, keys).numpy(),)
                self.mailbox.post(
                    primary, "expert_part", step=step, shard=shard, body={"keys": keys}, arrays=part
                )
            self._expert_shard_in(step, shard, me)
        if self.memory is not None and self.memory.primary:
            pairs = [(np.array(arrays[i]), np.array(arrays[i + 1])) for i in range(0, len(arrays), 2)]
            if self.memory.add_gradients(shard, pairs):
                for slot, owned in _backups(plan.buckets, me).items():
                    packed = tuple(array for key in owned for array in self.memory.reduced[key])
                    self.mailbox.post(slot, "rows_reduced", step=step, body={"keys": owned}, arrays=packed)
                self._prepared(step, "memory")

    def _elsewhere(self, shard: int) -> dict[int, list[tuple[int, int]]]:
        """Experts that are computed here for a shard and summed elsewhere, by the slot that sums them."""
        assert self.experts is not None
        found: dict[int, list[tuple[int, int]]] = {}
        for key in self.experts.computed:
            computing = self.plan.computing(*key)
            if computing[shard % len(computing)] == self.mailbox.slot != computing[0]:
                found.setdefault(computing[0], []).append(key)
        return found

    def _expert_part(self, message: Message) -> None:
        assert self.experts is not None
        keys = [(layer, expert) for layer, expert in message.body["keys"]]
        self.experts.take_part(message.shard, keys, torch.tensor(message.arrays[0]))
        self._expert_shard_in(message.step, message.shard, message.source)

    def _expert_shard_in(self, step: int, shard: int, source: int) -> None:
        """Note that one of those who compute our experts for a shard has sent all; sum up once all have."""
        assert self.experts is not None
        me, plan = self.mailbox.slot, self.plan
        if not self.experts.primary:
            return
        if shard not in self._parts_due:
            holders = [plan.computing(*key) for key in self.experts.primary]
            self._parts_due[shard] = {slots[shard % len(slots)] for slots in holders} | {me}
        self._parts_due[shard].discard(source)
        if self._parts_due[shard]:
            return
        del self._parts_due[shard]
        if self.experts.finish_part(shard):
            for slot, owned in _backups(plan.experts, me).items():
                self.mailbox.post(
                    slot,
                    "expert_reduced",
                    step=step,
                    body={"keys": owned},
                    arrays=(self.experts.pack(owned).numpy(),),
                )
            self._prepared(step, "expert")

    def _dense_nodes(self, message: Message) -> None:
        assert self.dense is not None
        for (level, index), array in zip(message.body["nodes"], message.arrays):
            self.dense.tree.add(level, index, torch.tensor(array))
        self._dense_complete(message.step)

    def _dense_complete(self, step: int) -> None:
        """At the reducer: once all shards are in, share the sum with the other replicas."""
        assert self.dense is not None
        self.dense.reduced = self.dense.tree.root
        if self.dense.reduced is not None:
            for slot in self.plan.dense[1:]:
                self.mailbox.post(
                    slot, "dense_reduced", step=step, arrays=(self.dense.reduced.numpy().copy(),)
                )
            self._prepared(step, "dense")

    def _dense_reduced(self, message: Message) -> None:
        assert self.dense is not None
        self.dense.reduced = torch.tensor(message.arrays[0])
        self._prepared(message.step, "dense")

    def _expert_reduced(self, message: Message) -> None:
        assert self.experts is not None
        self.experts.unpack(
            [(layer, expert) for layer, expert in message.body["keys"]], torch.from_numpy(message.arrays[0])
        )
        self._prepared(message.step, "expert")

    def _rows_reduced(self, message: Message) -> None:
        assert self.memory is not None
        for i, (layer, bucket) in enumerate(message.body["keys"]):
            self.memory.reduced[(layer, bucket)] = (
                np.array(message.arrays[2 * i]),
                np.array(message.arrays[2 * i + 1]),
            )
        self._prepared(message.step, "memory")

    def _prepared(self, step: int, role: str) -> None:
        """Tell the scheduler, once a role has all reduced gradients, their norms and digests."""
        plan = self.plan
        norms: dict[str, float] = {}
        digests: dict[str, int] = {}
        if role == "dense" and self.dense is not None:
            norms = self.dense.norms() if plan.dense[0] == self.mailbox.slot else {}
            digests = {"dense": self.dense.digest()} if len(plan.dense) > 1 else {}
        if role == "expert" and self.experts is not None:
            if not self.experts.is_reduced:
                return
            norms = self.experts.norms()
            digests = self.experts.digests(
                [k for k in self.experts.owned if len(plan.experts[k[0]][k[1]]) > 1]
            )
        if role == "memory" and self.memory is not None:
            if not self.memory.is_reduced:
                return
            norms = self.memory.norms()
            digests = self.memory.digests([k for k in self.memory.owned if len(plan.buckets[k[0]][k[1]]) > 1])
        body = {"role": role, "norms": norms, "digests": digests}
        self.mailbox.post(SCHEDULER, "prepared", step=step, body=body)


def _backups(
    placement: tuple[tuple[tuple[int, ...], ...], ...], slot: int
) -> dict[int, list[tuple[int, int]]]:
    """Keys of which `slot` is the primary, by the slots that back them up."""
    found: dict[int, list[tuple[int, int]]] = {}
    for layer, row in enumerate(placement):
        for index, holders in enumerate(row):
            if holders[0] == slot:
                for backup in holders[1:]:
                    found.setdefault(backup, []).append((layer, index))
    return found
