"""The own buffer and those of the others, from one generation to the next.

A slot keeps one of these over all generations. Inside a host entering one takes a message to each other slot and no group:
what was mapped before stays mapped. Slots of several hosts map nothing and form a group, whose first one is asked where.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import Caller
from sparseray.actors.peers.collective_link import far_regions
from sparseray.actors.peers.dense_slices import num_nodes, slice_bounds
from sparseray.actors.peers.expert_shares import num_shared
from sparseray.actors.peers.group import Group, host_of
from sparseray.actors.peers.regions import Regions, Sizes, room_for
from sparseray.actors.peers.table import Table
from sparseray.actors.peers.token_exchange import num_returned
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.shared_buffer import Buffer, BufferHandle, Introduce, Introduced, open_buffer
from sparseray.errors import SlotLostError

if TYPE_CHECKING:
    from sparseray.actors.peers.device_rounds import RoundTables


class Peers:
    """What one slot knows of the memory of the others.

    Args:
        me: own slot id.
    """

    def __init__(self, me: int) -> None:
        self.me = me
        self.signs: tuple[Tensor, Tensor] | None = None
        """Of a slot with a GPU, its state there and what ends waits; they outlive what is launched in a generation."""
        self.tables: RoundTables | None = None
        """Of a slot with a GPU that serves in rounds."""
        self.group: Group | None = None
        """Of the generation, where its slots exchange by collectives."""
        self._sizes: Sizes | None = None
        self._own: Buffer | None = None
        self._mapped: dict[int, tuple[BufferHandle, Tensor]] = {}

    def introduction(self) -> Introduced:
        """How the own buffer is opened, and where the group of the generation meets."""
        assert self._own is not None
        return Introduced(handle=self._own.handle, meeting="" if self.group is None else self.group.meeting)

    @property
    def own(self) -> Regions:
        """The own buffer, cut."""
        assert self._own is not None and self._sizes is not None
        return self._sizes.cut(self._own.bytes)

    @property
    def own_bytes(self) -> Tensor:
        """The part of the own buffer that is cut."""
        assert self._own is not None and self._sizes is not None
        return self._own.bytes[: self._sizes.num_bytes]

    def leave(self) -> None:
        """Have done with the group of a generation."""
        if self.group is not None:
            self.group.abort()
        self.group = None

    def meet(self, plan: Plan, call: Caller, device: torch.device) -> None:
        """Begin to form the group of a plan, instead of mapping the buffers of the others.

        Args:
            plan: of the generation.
            call: asks the first of its slots.
            device: of the slot.

        Raises:
            SlotLostError: that one is gone.
        """
        rank, meeting = plan.peers.index(self.me), ""
        if rank:
            meeting = call([(plan.peers[0], Introduce())], Introduced)[0].meeting
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        host = host_of(plan.addresses[self.me])
        # A little more than what a slot waits for another.
        timeout_s = call.deadline_s + 1.0
        self.group = Group(rank, len(plan.peers), device, host, meeting=meeting, timeout_s=timeout_s)

    def prepare(self, sizes: Sizes, device: torch.device) -> None:
        """Have a buffer for the next generation, which nobody of an older one writes to.

        The host's memory is made anew: who was given up and lives may still write to the old one. A GPU's stays, for
        what its peers have mapped it cannot give back; what they launched ends with their processes, or at a wait.

        Args:
            sizes: of the generation.
            device: of the slot.
        """
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.synchronize(device)
        if self._own is None or not is_gpu or self._own.num_bytes < sizes.num_bytes:
            self._own = None
            self._own = Buffer(sizes.num_bytes, device)
        self._sizes = sizes
        if is_gpu:
            from sparseray.kernels import peer  # and Triton, which a CPU does without

            self.signs = self.signs or (peer.new_state(device), peer.new_end(device))
            for sign in self.signs:
                sign.zero_()
            torch.cuda.synchronize(device)

    def introduce(self, plan: Plan, call: Caller, device: torch.device) -> Table:
        """Map the buffers of all others of a plan, unless they meet as a group.

        Args:
            plan: of the generation.
            call: asks them.
            device: of the slot.

        Raises:
            SlotLostError: one of them is gone.
        """
        assert self._own is not None and self._sizes is not None
        slots = plan.peers
        if self.group is not None:
            return Table(slots=slots, regions={**far_regions(self._sizes, slots), self.me: self.own})
        others = [slot for slot in slots if slot != self.me]
        self._mapped = {slot: found for slot, found in self._mapped.items() if slot in others}
        for slot, reply in zip(others, call([(slot, Introduce()) for slot in others], Introduced)):
            if slot not in self._mapped or self._mapped[slot][0] != reply.handle:
                self._mapped.pop(slot, None)
                try:
                    self._mapped[slot] = reply.handle, open_buffer(reply.handle, device, slot)
                except OSError as error:
                    raise SlotLostError(f"the memory of slot {slot} is gone: {error}", [slot]) from None
        regions = {slot: self._sizes.cut(self._mapped[slot][1]) for slot in others}
        return Table(slots=slots, regions={**regions, self.me: self.own})


def sizes_of(plan: Plan, dense: DenseSlabs, part_tokens: int) -> Sizes:
    """What the buffers of a plan are cut into.

    Args:
        plan: of the generation.
        dense: weights of any of its slots.
        part_tokens: tokens of a part.
    """
    config, count = dense.model.config, dense.num_elements
    bounds = slice_bounds(count, len(plan.dense))
    return Sizes(
        slots=len(plan.peers),
        tokens=room_for(part_tokens),
        top_k=config.moe.top_k,
        hidden=config.hidden,
        returned=num_returned(plan, config.moe.top_k, dense.sum.determinism),
        dtype=dense.dtype,
        nodes=num_nodes(plan, dense.sum.determinism),
        dense=count,
        dense_slice=max(b - a for a, b in pairwise(bounds)),
        shares=num_shared(plan) * 3 * config.moe.expert_dim * config.hidden,
    )
