"""One MoE layer of all slots, through each other's memory: tokens go out, their experts' rows come back.

A slot gives its tokens to all that hold experts; each groups those of all sources by the experts that it has, computes
them as one operation, and gives back what belongs to each source. In the order of one slot ("bitwise") a row for each
(token, k) comes back, and gradients of each source's rows are kept apart; "fast" sums a token's rows where they are
computed, and the gradients of all sources at once.

Shapes: S sources, T tokens of a part, K experts per token, E experts here, R rows here, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.peers.link import Link
from sparseray.actors.peers.meter import Meter
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.gradient_sum import Determinism
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.kernels.ops import HeldRows

FEW = 3
"""Slots with experts, of which fewer all want nearly every token."""
Gradients = list[list[Tensor]]
"""Of the parts of a round, or of their sum: gate_up and down of every layer."""


def num_returned(plan: Plan, top_k: int, determinism: Determinism) -> int:
    """Rows that come back for a token.

    Args:
        plan: of the generation.
        top_k: K.
        determinism: order of sums.
    """
    return len(plan.expert_primaries) if determinism == "fast" else top_k


def share_of_tokens(plan: Plan, experts: int, top_k: int) -> float:
    """Of all tokens, those that go to a slot with experts if these are even: the host does not learn how many do.

    Args:
        plan: of the generation.
        experts: E of a layer.
        top_k: K.
    """
    owners = len(plan.expert_primaries)
    return 1.0 if owners < FEW else 1.0 - comb(experts - experts // owners, top_k) / comb(experts, top_k)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the backward pass of a layer's rows needs."""

    rows: HeldRows
    counts: list[int] | None
    weights_STK: Tensor
    saved: Any


class TokenExchange:
    """The exchange of tokens and rows in one generation.

    Args:
        plan: of the generation.
        dense: of this slot; its operations compute, its sums' order is the experts' too.
        experts: that this slot holds.
        table: the slots and their memory.
        me: own slot id.
        link: to the others' memory.
        meter: of what this costs.
    """

    def __init__(
        self,
        plan: Plan,
        dense: DenseSlabs,
        experts: SlabExperts,
        table: Table,
        me: int,
        link: Link,
        meter: Meter,
    ) -> None:
        self.held, self.table, self.me, self.link, self.ops = experts, table, me, link, dense.ops
        self._dense = dense
        self.meter = meter
        self._plan, self.owners = plan, plan.expert_primaries
        self.is_owner = me in self.owners
        self._share = share_of_tokens(plan, experts.config.moe.num_experts, experts.config.moe.top_k)
        self.is_summed = dense.sum.determinism == "fast"
        self.device = dense.device
        self.count = 0
        """Of the words of all exchanges; those who make others in between raise it."""
        self.counts_rows = True
        """Whether the host learns of how many rows there are; where there is room for all, it does not wait for that."""
        self._is_settled = False
        self._groups: dict[tuple[int, int], tuple[dict[int, int], Tensor]] = {}
        self._kept: dict[int, _Kept] = {}
        self._owners: dict[int, Tensor] = {}
        """Of each layer's experts the bit of the slot that computes them."""
        self._owners_of: dict[int, Tensor] = {}
        """Of each layer's tokens on their way, the bits of the slots that have experts of theirs."""
        self._has_met = False
        self._sending: list[Tensor] = []
        """What is on its way: its memory is used for nothing else meanwhile."""
        self._gradients: Gradients = []

    def clear(self) -> None:
        """Forget what a step left."""
        self._kept.clear()
        self._owners_of.clear()
        self._gradients.clear()
        self._has_met = False

    def meet(self, nothing: Tensor) -> None:
        """Wait for all slots, once in what they run together, and answer them meanwhile.

        Where rows go by message, nobody may begin before all have theirs: whoever waits for its device, or for room in its
        queue, answers nobody, and the device may wait for a slot that waits for an answer.

        Args:
            nothing: any number on the device.
        """
        if self._has_met:
            return
        self._has_met = True
        self.count += 1
        own, others = self.table.regions[self.me], [slot for slot in self.table.slots if slot != self.me]
        flags = [self.table.regions[slot].flags_S for slot in others]
        self.link.signal_all(flags, self.table.rank(self.me), self.count)
        self.link.wait(own.flags_S, self.table.ranks(others), self.count)
        self.link.read(nothing)

    def settle(self, sources: int, tokens: int) -> None:
        """After the first step, when its memory is known: do without counts where all rows would have room.

        Args:
            sources: slots that send tokens at the same time, at most.
            tokens: of each.
        """
        if self._is_settled or self.device.type != "cuda":
            return
        self._is_settled = True
        if not self.held.slabs:
            self.counts_rows = False
            return
        slab, layers = self.held.slabs[0], 1 if self._dense.model.recompute else len(self.held.slabs)
        # Kept of a row are both pre-activations; in passing there are activations, their gradients, and rows.
        each = slab.compute[0].element_size() * (2 * layers * slab.inner + 4 * slab.inner + 2 * slab.hidden)
        more = (sources - 1) * tokens * self.held.config.moe.top_k * each
        needed = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        # The first update would make them: for a large model a quarter of the memory.
        self._dense.moments()
        for slab in self.held.slabs:
            slab.moments()
        needed += torch.cuda.memory_allocated(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device)
        self.counts_rows = free - needed - more < total // 16

    def take_gradients(self) -> Gradients:
        """Take the experts' gradients of a round: of each source's part, or the sum of all."""
        found, self._gradients = self._gradients, []
        return found

    def leave_gradients(self, gradients: Gradients) -> None:
        """Have those of a round that a recording has computed.

        Args:
            gradients: as `take_gradients` gives them.
        """
        self._gradients = gradients

    def built_in(self, sources: Sequence[int]) -> tuple[object, ...]:
        """What recorded exchanges depend on: who sends tokens, and where what lies here is read.

        Args:
            sources: slots that send tokens.
        """
        lies: list[int] = []
        if self.is_owner:
            for layer, slab in enumerate(self.held.slabs):
                groups_SE = self._groups_of(layer, 1 if self.is_summed else len(sources))
                lies += [len(slab.rows), *(tensor.data_ptr() for tensor in (groups_SE, *slab.compute))]
        return (*sources, *lies)

    def rewind(self, count: int) -> None:
        """Be as before exchanges that were only recorded.

        Args:
            count: of the words, then.
        """
        self.count = count
        self._kept.clear()
        self._owners_of.clear()
        self._sending, self._gradients = [], []

    # -- of the own tokens -----------------------------------------------------------------------------

    def send(self, layer: int, tokens_TH: Tensor, chosen: tuple[Tensor, Tensor] | None) -> None:
        """Give those that hold experts of them the tokens of this slot, beside what is computed before they are waited for.

        Args:
            layer: index among the MoE layers.
            tokens_TH: tokens, or gradients of their outputs.
            chosen: their experts, int32, and routing weights, both [T, K]; None where these are known.
        """
        T, rank = tokens_TH.shape[0], self.table.rank(self.me)
        if chosen is not None:
            self._owners_of[layer] = self.ops.owners_of(chosen[0], self._owners_in(layer))
        theirs = [self.table.regions[slot] for slot in self.owners]
        others = [self.table.regions[slot].flags_S for slot in self.owners if slot != self.me]
        sent = [tokens_TH, *(chosen or ())]
        of_tokens, *of_others = (t.numel() * t.element_size() for t in sent)
        num_bytes = len(others) * (int(of_tokens * self._share) + sum(of_others))
        self._sending = sent
        with self.link.aside():
            with self.meter.phase("dispatch", num_bytes):
                places = [r.of_sources("x_STH", T)[rank] for r in theirs]
                if len(theirs) < FEW:
                    self.link.put_all(tokens_TH, places)
                else:
                    self.link.put_tokens(tokens_TH, self._owners_of[layer], places)
                for numbers, name in zip(chosen or (), ("ids_STK", "weights_STK")):
                    self.link.put_all(numbers, [r.of_sources(name, T)[rank] for r in theirs])
            self.link.signal_all(others, rank, self.count + 1)

    def returned(self, layer: int, tokens: int, weights_TK: Tensor | None) -> Tensor:
        """The sum of what came back for each token, [T, H].

        Args:
            layer: index among the MoE layers.
            tokens: T.
            weights_TK: of rows that come one by one; None for 1.
        """
        rows_RH = self.table.regions[self.me].rows_RH
        each = len(self.owners) if self.is_summed else self.held.config.moe.top_k
        rows_TKH = rows_RH[: tokens * each].view(tokens, each, -1)
        if self.is_summed:
            return self.ops.sum_of_owners(rows_TKH, self._owners_of[layer])
        return self.ops.combine_slots(rows_TKH, weights_TK)

    def returned_weights(self, tokens: int) -> Tensor:
        """Gradients of the routing weights, [T, K].

        Args:
            tokens: T.
        """
        top_k = self.held.config.moe.top_k
        return self.table.regions[self.me].row_weights_R[: tokens * top_k].view(tokens, top_k)

    # -- of the experts here ---------------------------------------------------------------------------

    def forward(self, layer: int, sources: Sequence[int], tokens: int, *, keep: bool) -> None:
        """Compute the rows of some slots whose experts are here, and take part until the own have come.

        Args:
            layer: index among the MoE layers.
            sources: slots that send tokens.
            tokens: of each.
            keep: what the backward pass needs.
        """
        self._await(sources)
        if self.is_owner:
            slab = self.held.slabs[layer]
            x_STH, ids_STK, weights_STK = (
                self._received(name, sources, tokens) for name in ("x_STH", "ids_STK", "weights_STK")
            )
            rows = self._grouped(layer, ids_STK, x_STH)
            counted = self._start_counting(rows)
            if keep:
                x_STH, weights_STK = x_STH.clone(), weights_STK.clone()
            weights_STK = weights_STK.contiguous()
            counts = counted()
            y_RH, saved = self.ops.held_forward(x_STH.flatten(0, 1), rows, counts, *slab.compute)
            if keep:
                self._kept[layer] = _Kept(rows=rows, counts=counts, weights_STK=weights_STK, saved=saved)
            self._give_back(y_RH, rows, weights_STK, sources, weighted=True)
            self._signal(sources)
        self._collect(sources)

    def backward(self, layer: int, sources: Sequence[int], tokens: int) -> None:
        """Give back the input gradients of what was computed here, and keep the experts' own.

        Args:
            layer, sources, tokens: as in `forward`, which kept what this needs.
        """
        self._await(sources)
        if self.is_owner:
            slab, kept = self.held.slabs[layer].compute, self._kept.pop(layer)
            dout_STH, weights_STK = self._received("x_STH", sources, tokens), kept.weights_STK
            found = self.ops.held_backward(
                dout_STH.flatten(0, 1), weights_STK.flatten(0, 1), kept.rows, kept.counts, kept.saved, *slab
            )
            self._give_back(found.dx_RH, kept.rows, weights_STK, sources, weighted=False)
            into = [self.table.regions[s].row_weights_R[: weights_STK[0].numel()] for s in sources]
            self.link.give_rows(found.dweights_R, kept.rows, into)
            self._signal(sources)
            self._keep_gradients(layer, found.dgate_up_GE2IH, found.ddown_GEHI)
        self._collect(sources)

    def _await(self, sources: Sequence[int]) -> None:
        """Let what follows begin when the tokens of all are here that come here; the own ones go aside."""
        self.link.join()
        others = [slot for slot in sources if slot != self.me and self.is_owner]
        self.link.wait(self.table.regions[self.me].flags_S, self.table.ranks(others), self.count + 1)

    def _received(self, name: str, sources: Sequence[int], tokens: int) -> Tensor:
        """What some slots have sent, [S, T, ...]; a copy where others have sent nothing."""
        every, ranks = self.table.regions[self.me].of_sources(name, tokens), self.table.ranks(sources)
        if ranks == list(range(ranks[0], ranks[0] + len(ranks))):
            return every[ranks[0] : ranks[0] + len(ranks)]
        # An index of numbers would be sent to the device, and waited for.
        return torch.stack([every[rank] for rank in ranks])

    def _grouped(self, layer: int, ids_STK: Tensor, like: Tensor) -> HeldRows:
        """The rows of experts here, those of each source apart if their gradients are."""
        (S, T, K), num_held = ids_STK.shape, len(self.held.slabs[layer].rows)
        sets = 1 if self.is_summed else S
        groups_SE = self._groups_of(layer, sets).expand(S, -1)
        groups_TK = groups_SE.gather(1, ids_STK.view(S, T * K).long()).view(S * T, K)
        return self.ops.group_held(groups_TK, sets, num_held, like)

    def _owners_in(self, layer: int) -> Tensor:
        """Of each expert the bit of the slot that computes it, int64 [experts]."""
        if layer not in self._owners:
            bits = [1 << self.owners.index(holders[0]) for holders in self._plan.experts[layer]]
            self._owners[layer] = torch.tensor(bits, dtype=torch.int64, device=self.device)
        return self._owners[layer]

    def _groups_of(self, layer: int, sets: int) -> Tensor:
        """Group of each expert that is computed here, int32 [sets, experts]; the number of groups for all others."""
        rows, key = self.held.slabs[layer].rows, (layer, sets)
        if key not in self._groups or self._groups[key][0] is not rows:
            computed, num_held = [e for e in rows if (layer, e) in self.held.computed], len(rows)
            groups_SE = torch.full((sets, self.held.config.moe.num_experts), sets * num_held).int()
            for index in range(sets):
                groups_SE[index, computed] = torch.tensor(
                    [index * num_held + rows[e] for e in computed]
                ).int()
            self._groups[key] = rows, groups_SE.to(self.device)
        return self._groups[key][1]

    def _start_counting(self, rows: HeldRows) -> Callable[[], list[int] | None]:
        """Rows of every group, for the host, or nothing."""
        if not self.counts_rows:
            return lambda: None
        read = self.link.start_read(rows.counts_E)
        return lambda: read()[:-1]

    def _give_back(
        self, rows_RH: Tensor, held: HeldRows, weights_STK: Tensor, sources: Sequence[int], *, weighted: bool
    ) -> None:
        """Put rows, or their sums, where the sources expect them."""
        (_, T, K), theirs = weights_STK.shape, [self.table.regions[slot].rows_RH for slot in sources]
        others, width = sum(slot != self.me for slot in sources), rows_RH.shape[1] * rows_RH.element_size()
        if self.is_summed:
            holders, own = len(self.owners), self.owners.index(self.me)
            into = [rows[: T * holders].view(T, holders, -1)[:, own] for rows in theirs]
            with self.meter.phase("combine", int(others * T * width * self._share)):
                self.link.give_sums(rows_RH, held, weights_STK, into, weighted=weighted)
        else:
            # How many rows of each source there are is known on the device alone: as many as of any other, about.
            with self.meter.phase("combine", others * T * K * width // len(self.owners)):
                self.link.give_rows(rows_RH, held, [rows[: T * K] for rows in theirs])

    def _signal(self, sources: Sequence[int]) -> None:
        others = [self.table.regions[slot].flags_S for slot in sources if slot != self.me]
        self.link.signal_all(others, self.table.rank(self.me), self.count + 2)

    def _collect(self, sources: Sequence[int]) -> None:
        """End an exchange: the rows of the own tokens are here."""
        others = [slot for slot in self.owners if slot != self.me and self.me in sources]
        self.link.wait(self.table.regions[self.me].flags_S, self.table.ranks(others), self.count + 2)
        self._sending = []
        self.count += 2

    def _keep_gradients(self, layer: int, *of_sets: Tensor) -> None:
        """Gradients of a layer, [sets, experts, ...]."""
        if not self._gradients:
            self._gradients = [
                [torch.empty(0)] * (2 * len(self.held.slabs)) for _ in range(of_sets[0].shape[0])
            ]
        for matrix, sets in enumerate(of_sets):
            for gradients, gradient in zip(self._gradients, sets):
                gradients[2 * layer + matrix] = gradient
