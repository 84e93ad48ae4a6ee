"""What primaries give the backups of their experts in each step: the gradients, summed over all parts.

A backup computes no row and applies the same update, so whoever dies leaves nothing that another slot has not. Experts of
one layer that go from one slot to another lie side by side, so they are one piece of memory.

Shapes: E experts, I inner width, H hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.peers.link import Link
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.slab_experts import SlabExperts


@dataclass(frozen=True, kw_only=True)
class Share:
    """Experts of one layer that one slot is the primary of and another backs up.

    Args:
        layer: index among the MoE layers.
        source: the primary.
        experts: rising.
        first: of all experts that the backup is given, the number of those before.
    """

    layer: int
    source: int
    experts: tuple[int, ...]
    first: int


def shares_of(plan: Plan, backup: int) -> list[Share]:
    """What a slot is given.

    Args:
        plan: of the generation.
        backup: the slot.
    """
    found, count = [], 0
    for layer, row in enumerate(plan.experts):
        by_source: dict[int, list[int]] = {}
        for expert, holders in enumerate(row):
            if backup in holders[1:]:
                by_source.setdefault(holders[0], []).append(expert)
        for source, experts in sorted(by_source.items()):
            found.append(Share(layer=layer, source=source, experts=tuple(experts), first=count))
            count += len(experts)
    return found


def num_shared(plan: Plan) -> int:
    """Experts that any one slot is given, at most."""
    return max(sum(len(s.experts) for s in shares_of(plan, slot)) for slot in plan.peers)


class ExpertShares:
    """The way of experts' gradients to their backups in one generation.

    Args:
        plan: of the generation.
        held: experts of this slot, and their gradients.
        table: the slots and their memory.
        me: own slot id.
        link: to the others' memory.
    """

    def __init__(self, plan: Plan, held: SlabExperts, table: Table, me: int, link: Link) -> None:
        self.held, self.table, self.me, self.link = held, table, me, link
        self._places: dict[tuple[int, ...], Tensor] = {}
        self.given = shares_of(plan, me)
        self.others = {slot: shares_of(plan, slot) for slot in plan.peers if slot != me}

    def share(self, count: int, dtype: torch.dtype) -> None:
        """Give what others back up, and take what is backed up here.

        Args:
            count: of the word that says so.
            dtype: of the sums, in every slot.
        """
        total = self.held.sum.total
        for slot, shares in self.others.items():
            theirs, own = self.table.regions[slot], [share for share in shares if share.source == self.me]
            for share in own:
                assert total is not None
                for matrix, into in enumerate(self._matrices(theirs.shares_N, share, dtype)):
                    gradient = total[2 * share.layer + matrix]
                    assert gradient.dtype == dtype
                    self.link.put(gradient[self._rows(share)], into)
            if own:
                self.link.signal(theirs.flags_S, self.table.rank(self.me), count)
        sources = sorted({share.source for share in self.given})
        self.link.wait(self.table.regions[self.me].flags_S, self.table.ranks(sources), count)
        if self.given:
            self._take(dtype)

    def _take(self, dtype: torch.dtype) -> None:
        total = self.held.sum.total or list(self._empty(dtype))
        shares_N = self.table.regions[self.me].shares_N
        for share in self.given:
            for matrix, from_ in enumerate(self._matrices(shares_N, share, dtype)):
                total[2 * share.layer + matrix][self._rows(share)] = from_
        self.held.sum.complete(total)

    def _rows(self, share: Share) -> slice | Tensor:
        """Where a share's experts lie in the slabs; where they are neighbours nothing is copied to give them."""
        rows = [self.held.slabs[share.layer].rows[expert] for expert in share.experts]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        key = share.layer, *rows
        if key not in self._places:
            self._places[key] = torch.tensor(rows, device=self.held.device)
        return self._places[key]

    def _matrices(self, shares_N: Tensor, share: Share, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, H] and down [E, H, I] of a share in the backup's memory."""
        shares_N = shares_N.view(dtype)
        slab, count = self.held.slabs[share.layer], len(share.experts)
        both, down = count * 2 * slab.inner * slab.hidden, count * slab.inner * slab.hidden
        start = share.first * 3 * slab.inner * slab.hidden
        gate_up = shares_N[start : start + both].view(count, 2 * slab.inner, slab.hidden)
        return gate_up, shares_N[start + both : start + both + down].view(count, slab.hidden, slab.inner)

    def _empty(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Of a slot that computes no expert."""
        for slab in self.held.slabs:
            for master in slab.weights:
                yield torch.zeros_like(master, dtype=dtype)
