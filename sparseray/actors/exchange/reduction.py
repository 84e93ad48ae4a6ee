"""The gradients' way of one step: from parts to one sum at every holder, then `prepared`.

Dense gradients go to the first dense holder, which shares the sum; experts and memory rows are
reduced where they live, and primaries send the sum to their backups. Sums follow tree.py, so
arrival order is free. Phase one of the commit (platform/trainer.py has phase two).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import PartGradients
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import (
    DenseNode,
    DenseNodes,
    DenseReduced,
    ExpertPart,
    ExpertReduced,
    FinishPart,
    Key,
    Prepared,
    RowGradients,
    RowsReduced,
)
from sparseray.kernels.dse.cpu import segment_sum_rows

Rows = tuple[np.ndarray, np.ndarray]


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
        self.handlers: dict[type[Body], Callable[[Message[Any]], None]] = {
            FinishPart: self._finish_part,
            ExpertPart: self._expert_part,
            DenseNodes: self._dense_nodes,
            DenseReduced: self._dense_reduced,
            ExpertReduced: self._expert_reduced,
            RowsReduced: self._rows_reduced,
        }

    def add_dense(self, part: int, gradients: PartGradients) -> None:
        """At an attention worker: add a part's dense gradient [P] to what this slot has.

        Args:
            part: of the global batch.
            gradients: of that part; its dense gradient is fp32 [P].
        """
        assert self.dense is not None
        (gradient,) = gradients.dense
        self.dense.tree.add(0, part, gradient)

    def send_part(
        self,
        step: int,
        part: int,
        gradients: PartGradients,
        owner_of: Callable[[int, np.ndarray], np.ndarray],
    ) -> None:
        """At an attention worker: keep a finished part's dense gradient, and send the rest to all holders.

        Args:
            step, part: what was finished.
            gradients: of the part.
            owner_of: slot that answers for each row of a memory layer.
        """
        self.add_dense(part, gradients)
        self.send_rows(step, part, gradients, owner_of)

    def send_rows(
        self,
        step: int,
        part: int,
        gradients: PartGradients,
        owner_of: Callable[[int, np.ndarray], np.ndarray],
    ) -> None:
        """At an attention worker: send a finished part's row gradients, and word of its end, to all holders.

        Args:
            step, part, gradients, owner_of: as in `send_part`.
        """
        sums = [sum_rows(addresses, values) for addresses, values in gradients.rows]
        owners = [owner_of(layer, rows) for layer, (rows, _) in enumerate(sums)]
        memory_slots = self.plan.memory_primaries
        for slot in sorted(set(self.plan.expert_primaries) | set(memory_slots)):
            own: list[Rows] = []
            if slot in memory_slots:
                own = [(rows[at == slot], values[at == slot]) for at, (rows, values) in zip(owners, sums)]
            if slot == self.mailbox.slot:
                self.finish(step, part, own)
            else:
                self.mailbox.post(slot, FinishPart(rows=_row_gradients(own)), step=step, part=part)

    def send_dense(self, step: int) -> None:
        """At an attention worker: send the subtrees of its parts to the reducer."""
        assert self.dense is not None
        reducer = self.plan.dense[0]
        if reducer == self.mailbox.slot:
            self.dense_complete(step)
        else:
            nodes = tuple(
                DenseNode(level=level, index=index, gradient=value)
                for level, index, value in self.dense.tree.nodes()
            )
            self.mailbox.post(reducer, DenseNodes(nodes=nodes), step=step)

    def _finish_part(self, message: Message[FinishPart]) -> None:
        self.finish(message.step, message.part, [_copies(layer) for layer in message.body.rows])

    def finish(self, step: int, part: int, rows: Sequence[Rows]) -> None:
        """Take note that a part has sent all its gradients here.

        Args:
            step, part: which.
            rows: rising rows and sums, of the table rows that this slot answers for, by memory layer.
        """
        plan, me = self.plan, self.mailbox.slot
        if self.experts is not None and self.experts.computed:
            for primary, keys in self._elsewhere(part).items():
                gradients = self.experts.part(part, keys)
                self.mailbox.post(primary, ExpertPart(keys=keys, gradients=gradients), step=step, part=part)
            self._expert_part_in(step, part, me)
        if self.memory is not None and self.memory.primary and self.memory.add_gradients(part, rows):
            for keys, slots in _backups(plan.buckets, me).items():
                reduced = _row_gradients(self.memory.reduced[key] for key in keys)
                self._share(slots, RowsReduced(keys=keys, rows=reduced), step)
            self._prepared(step, "memory")

    def _share(self, slots: Sequence[int], body: Body, step: int) -> None:
        for slot in slots:
            self.mailbox.post(slot, body, step=step)

    def _elsewhere(self, part: int) -> dict[int, tuple[Key, ...]]:
        """Experts that are computed here for a part and summed elsewhere, by the slot that sums them."""
        assert self.experts is not None
        found: dict[int, list[Key]] = {}
        for key in self.experts.computed:
            computing = self.plan.computing(*key)
            if computing[part % len(computing)] == self.mailbox.slot != computing[0]:
                found.setdefault(computing[0], []).append(key)
        return {slot: tuple(keys) for slot, keys in found.items()}

    def _expert_part(self, message: Message[ExpertPart]) -> None:
        assert self.experts is not None
        self.experts.take_part(message.part, message.body.keys, message.body.gradients)
        self._expert_part_in(message.step, message.part, message.source)

    def _expert_part_in(self, step: int, part: int, source: int) -> None:
        """Note that one of those who compute our experts for a part has sent all; sum up once all have."""
        assert self.experts is not None
        me, plan = self.mailbox.slot, self.plan
        if not self.experts.primary:
            return
        if part not in self._parts_due:
            holders = [plan.computing(*key) for key in self.experts.primary]
            self._parts_due[part] = {slots[part % len(slots)] for slots in holders} | {me}
        self._parts_due[part].discard(source)
        if self._parts_due[part]:
            return
        del self._parts_due[part]
        if self.experts.finish_part(part):
            for keys, slots in _backups(plan.experts, me).items():
                gradients = self.experts.pack(keys)
                self._share(slots, ExpertReduced(keys=keys, gradients=gradients), step)
            self._prepared(step, "expert")

    def _dense_nodes(self, message: Message[DenseNodes]) -> None:
        assert self.dense is not None
        for node in message.body.nodes:
            self.dense.tree.add(node.level, node.index, node.gradient.clone())
        self.dense_complete(message.step)

    def dense_complete(self, step: int) -> None:
        """At the reducer: once all parts are in, share the sum with the other replicas."""
        assert self.dense is not None
        self.dense.reduced = self.dense.tree.root
        if self.dense.reduced is not None:
            if len(self.plan.dense) > 1:
                # One copy for all: frames leave later than the update, which scales the gradient in place.
                body = DenseReduced(gradient=self.dense.reduced.clone())
                self._share(self.plan.dense[1:], body, step)
            self._prepared(step, "dense")

    def _dense_reduced(self, message: Message[DenseReduced]) -> None:
        assert self.dense is not None
        self.dense.reduced = message.body.gradient.clone()
        self._prepared(message.step, "dense")

    def _expert_reduced(self, message: Message[ExpertReduced]) -> None:
        assert self.experts is not None
        self.experts.unpack(message.body.keys, message.body.gradients)
        self._prepared(message.step, "expert")

    def _rows_reduced(self, message: Message[RowsReduced]) -> None:
        assert self.memory is not None
        for key, rows in zip(message.body.keys, message.body.rows):
            self.memory.reduced[key] = _copies(rows)
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
        self.mailbox.post(SCHEDULER, Prepared(role=role, norms=norms, digests=digests), step=step)


def sum_rows(addresses: Tensor, values: Tensor) -> Rows:
    """Sum gradients of repeated rows.

    Args:
        addresses: int64 [N].
        values: [N, D].

    Returns:
        distinct rows, rising, and their sums.
    """
    return segment_sum_rows(addresses.cpu().numpy(), values.float().cpu().numpy())


def _row_gradients(pairs: Iterable[Rows]) -> tuple[RowGradients, ...]:
    return tuple(
        RowGradients(rows_U=torch.from_numpy(rows), sums_UD=torch.from_numpy(sums)) for rows, sums in pairs
    )


def _copies(rows: RowGradients) -> Rows:
    """The gradients in memory of their own: sums are made in place."""
    return rows.rows_U.numpy().copy(), rows.sums_UD.numpy().copy()


def _backups(
    placement: tuple[tuple[tuple[int, ...], ...], ...], slot: int
) -> dict[tuple[Key, ...], list[int]]:
    """Slots that back up what `slot` is the primary of, by the keys that they share: one message for all of them."""
    by_slot: dict[int, list[Key]] = {}
    for layer, row in enumerate(placement):
        for index, holders in enumerate(row):
            if holders[0] == slot:
                for backup in holders[1:]:
                    by_slot.setdefault(backup, []).append((layer, index))
    found: dict[tuple[Key, ...], list[int]] = {}
    for backup, keys in by_slot.items():
        found.setdefault(tuple(keys), []).append(backup)
    return found
