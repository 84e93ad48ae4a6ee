"""Busy experts computed by several of their holders: what packing alone cannot even out.

Logical shard s of a step goes to computing holder s mod k, so any k that divides the shards takes equal
parts, and no bit changes: an expert's rows of one shard are computed in one place still. After the
redundant experts of EPLB (arXiv 2412.19437, section 3.4), whose replicas here are the backups first of all.
Pure.
"""

from collections.abc import Sequence

Table = tuple[tuple[tuple[int, ...], ...], ...]

EVEN_ENOUGH = 1.1
"""Peak over mean at which a layer is left alone."""
LEAST_GAIN = 0.05
"""Part of the mean by which doubling an expert's computing holders must relieve its most loaded slot."""
NEW_COPY = 0.1
"""Part of the mean that a slot without a copy must be less loaded to be preferred to one with it."""


def spread_hot(
    experts: Table, slots: Sequence[int], loads: Sequence[Sequence[float]], num_parts: int
) -> tuple[Table, tuple[tuple[int, ...], ...]]:
    """Let more holders compute the experts that overload a slot.

    Args:
        experts: holders of every expert, [moe layers][experts], primary first.
        slots: those that may compute.
        loads: tokens of every expert, [moe layers][experts].
        num_parts: parts of a step.

    Returns:
        holders again, the computing ones first, with copies added where they were lacking; and how many of
        each expert's holders compute, [moe layers][experts].
    """
    layers = [_Layer(row, slots, load, num_parts) for row, load in zip(experts, loads)]
    for layer in layers:
        while layer.improve():
            pass
    return tuple(tuple(layer.holders) for layer in layers), tuple(tuple(layer.spread) for layer in layers)


def slot_loads(
    holders: Sequence[tuple[int, ...]], spread: Sequence[int], loads: Sequence[float]
) -> dict[int, float]:
    """Tokens that each computing slot of a layer gets.

    Args:
        holders: of every expert of a layer.
        spread: how many of an expert's holders compute it, [experts].
        loads: tokens of every expert.
    """
    sums: dict[int, float] = {}
    for have, computing, load in zip(holders, spread, loads):
        for slot in have[:computing]:
            sums[slot] = sums.get(slot, 0.0) + load / computing
    return sums


class _Layer:
    """One layer on its way to an even load."""

    def __init__(
        self,
        holders: Sequence[tuple[int, ...]],
        slots: Sequence[int],
        loads: Sequence[float],
        num_parts: int,
    ) -> None:
        self.holders, self.slots, self.loads, self.num_parts = list(holders), list(slots), loads, num_parts
        self.spread = [1] * len(self.holders)
        self.mean = sum(loads) / max(1, len(self.slots))

    def improve(self) -> bool:
        """Double the computing holders of one expert of the most loaded slot; False when none is worth it."""
        sums = self._sums()
        hottest = max(self.slots, key=lambda slot: (sums[slot], -slot))
        if not self.mean or sums[hottest] <= EVEN_ENOUGH * self.mean:
            return False
        there = [e for e, have in enumerate(self.holders) if hottest in have[: self.spread[e]]]
        for expert in sorted(there, key=lambda e: (-self.loads[e] / self.spread[e], e)):
            before = self.holders[expert], self.spread[expert]
            if self._double(expert, sums):
                after = self._sums()
                touched = self.holders[expert][: self.spread[expert]]
                if max(after[slot] for slot in touched) <= sums[hottest] - LEAST_GAIN * self.mean:
                    return True
                self.holders[expert], self.spread[expert] = before
        return False

    def _sums(self) -> dict[int, float]:
        return dict.fromkeys(self.slots, 0.0) | slot_loads(self.holders, self.spread, self.loads)

    def _double(self, expert: int, sums: dict[int, float]) -> bool:
        have, now = self.holders[expert], self.spread[expert]
        free = [slot for slot in self.slots if slot not in have[:now]]
        if self.num_parts % (2 * now) or len(free) < now:
            return False
        price = {slot: sums[slot] + (0.0 if slot in have else NEW_COPY * self.mean) for slot in free}
        more = sorted(free, key=lambda slot: (price[slot], slot))[:now]
        rest = tuple(slot for slot in have[now:] if slot not in more)
        self.holders[expert] = (*have[:now], *more, *rest)
        self.spread[expert] = 2 * now
        return True
