"""Dense gradients of all slots summed through each other's memory: each holder adds up one slice and gives it to all.

A slot sends, of each node of the tree of parts that it has (state/tree.py), every holder its slice; the holder goes on
along the tree. So the order of the sum is that of one slot, and each number travels twice, whatever the number of slots.

Shapes: P dense parameters, N nodes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.actors.peers.link import Link
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.gradient_sum import Determinism
from sparseray.actors.state.tree import TreeSum

Node = tuple[int, int]
"""Level and index."""
_STEP = 1024
"""A slice begins at a multiple of so many parameters."""


def slice_bounds(count: int, holders: int) -> list[int]:
    """Where the slices of `count` parameters begin, and where the last one ends.

    Args:
        count: P.
        holders: that share them.
    """
    each = -(-count // (holders * _STEP)) * _STEP
    return [min(count, each * index) for index in range(holders + 1)]


def nodes_of(plan: Plan, slot: int, determinism: Determinism) -> list[Node]:
    """The nodes of the tree that a slot has once it has run its parts.

    Args:
        plan: whose parts they are.
        slot: id.
        determinism: "fast" has one sum for each slot.
    """
    parts = plan.parts_of(slot)
    if determinism == "fast":
        return [(0, plan.attention.index(slot))] if parts else []
    tree: TreeSum[int] = TreeSum(len(plan.part_owners), lambda left, right: left + right)
    for part in parts:
        tree.add(0, part, 1)
    return [(level, index) for level, index, _ in tree.nodes()]


def num_nodes(plan: Plan, determinism: Determinism) -> int:
    """Nodes of all slots.

    Args:
        plan, determinism: as in `nodes_of`.
    """
    return sum(len(nodes_of(plan, slot, determinism)) for slot in plan.attention)


class DenseSlices:
    """The sum of dense gradients in one generation.

    Args:
        plan: of the generation.
        dense: weights and gradients of this slot.
        table: the slots and their memory.
        me: own slot id.
        link: to the others' memory.
    """

    def __init__(self, plan: Plan, dense: DenseSlabs, table: Table, me: int, link: Link) -> None:
        self.plan, self.dense, self.table, self.me, self.link = plan, dense, table, me, link
        self.bounds = slice_bounds(dense.num_elements, len(plan.dense))
        self.nodes = {slot: nodes_of(plan, slot, dense.sum.determinism) for slot in plan.attention}

    def sum_up(self, count: int) -> None:
        """Send what this slot has, sum the own slice, and take the whole sum over; all slots do this at once.

        Args:
            count: of the words that say so; the next two belong to this sum.
        """
        own, holders = self.table.regions[self.me], self.plan.dense if self.me in self.plan.dense else ()
        flats = self._send(count)
        sources = [slot for slot in self.nodes if slot != self.me and holders]
        self.link.wait(own.flags_S, self.table.ranks(sources), count)
        if holders:
            self._give(self._add_up(flats), count + 1)
        self.link.wait(own.flags_S, self.table.ranks([s for s in holders if s != self.me]), count + 1)
        if holders:
            self.dense.sum.complete(self.dense.cut(own.dense_P))

    def _give(self, total: Tensor, count: int) -> None:
        """Give every holder the sum of the own slice.

        Args:
            total: that sum.
            count: of the word that says so.
        """
        start = self.bounds[self.plan.dense.index(self.me)]
        for slot in self.plan.dense:
            theirs = self.table.regions[slot]
            self.link.put(total, theirs.dense_P[start : start + len(total)])
            if slot != self.me:
                self.link.signal(theirs.flags_S, self.table.rank(self.me), count)

    def _send(self, count: int) -> list[Tensor]:
        """Give every holder its slice of the own nodes, and return those whole."""
        flats = [self._flat(value) for _, _, value in self.dense.sum.nodes()]
        first = self._first(self.me)
        for index, slot in enumerate(self.plan.dense):
            if slot != self.me and flats:
                theirs, (start, stop) = self.table.regions[slot], self.bounds[index : index + 2]
                for place, flat in enumerate(flats):
                    self.link.put(flat[start:stop], theirs.nodes_NP[first + place, : stop - start])
                self.link.signal(theirs.flags_S, self.table.rank(self.me), count)
        return flats

    def _flat(self, gradients: Sequence[Tensor]) -> Tensor:
        """One fp32 tensor of all, made without another copy beside it."""
        flat = torch.empty(self.dense.num_elements, device=self.dense.device)
        torch._foreach_copy_(self.dense.cut(flat), list(gradients))
        return flat

    def _first(self, slot: int) -> int:
        """Place of a slot's first node among those of all."""
        found = 0
        for other, nodes in self.nodes.items():
            if other == slot:
                return found
            found += len(nodes)
        return found

    def _add_up(self, flats: Sequence[Tensor]) -> Tensor:
        """The sum of the own slice over all nodes."""
        index = self.plan.dense.index(self.me)
        start, stop = self.bounds[index : index + 2]
        received = self.table.regions[self.me].nodes_NP[:, : stop - start]
        every = [
            (node, flats[place][start:stop] if slot == self.me else received[self._first(slot) + place])
            for slot, nodes in self.nodes.items()
            for place, node in enumerate(nodes)
        ]
        is_tree = self.dense.sum.determinism == "bitwise"
        leaves = len(self.plan.part_owners) if is_tree else len(every)
        tree: TreeSum[Tensor] = TreeSum(leaves, lambda left, right: left.add_(right))
        for (level, place), value in every:
            tree.add(level, place, value)
        assert tree.root is not None
        return tree.root
