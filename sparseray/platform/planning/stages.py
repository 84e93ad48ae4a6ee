"""A change that moves much state, cut into generations that move little: training waits for none of them for long.

After a loss those who are left go on with what they have, and the rest is a planned change. In one of these new holders get their pieces as backups beside the old ones, which keep their roles; the last plan is the one that was wished for
and moves what is left. A plan on the way is a plan like any other: whatever comes between, the next one is made from it. Pure;
times are passed in.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import inf

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.platform.planning.moves import moves
from sparseray.platform.planning.placement import split_evenly
from sparseray.platform.planning.shrink import left_of

Table = tuple[tuple[tuple[int, ...], ...], ...]

LEAST_BYTES = 100_000_000
"""Moved by a stage, before it is known how fast they move and at the least: fewer are hardly faster."""
PAUSE_S = 0.25
"""That training shall wait for a stage, where that is more bytes."""
REST = 4.0
"""Times as long as it has waited, training goes on before the next stage."""


def next_stage(
    now: Plan,
    wished: Plan,
    held: Mapping[Piece, Collection[int]],
    size: Callable[[Piece], int],
    budget: int,
) -> Plan:
    """Return the wished plan if it moves no more than the budget, or one piece; else the next one on the way there.

    Args:
        now: the plan in force.
        wished: the plan to reach.
        held: slots that have each piece.
        size: bytes of a piece.
        budget: bytes that a stage may move; a piece that is larger is moved alone.
    """
    pulls = moves(held, wished, size)
    is_whole = not pulls.missing and now.holders <= set(wished.addresses)
    if not is_whole or pulls.num_bytes(size) <= budget:
        return wished
    lacking = sorted(
        (piece, slot)
        for slot, sources in pulls.pulls.items()
        for pieces in sources.values()
        for piece in pieces
    )
    if len(lacking) == 1:
        return wished
    gained, left = dict[Piece, list[int]](), budget
    for piece, slot in lacking:
        if gained and size(piece) > left:
            break
        gained.setdefault(piece, []).append(slot)
        left -= size(piece)
    return replace(
        now,
        generation=wished.generation,
        addresses=wished.addresses,
        dense=_with(now.dense, gained.get(DENSE, ())),
        experts=_grown("expert", now.experts, gained),
        buckets=_grown("bucket", now.buckets, gained),
    )


def after_loss(
    now: Plan, wished: Plan, held: Mapping[Piece, Collection[int]], size: Callable[[Piece], int]
) -> Plan:
    """Return the wished plan if it moves little; else that of who is left, with what they have, if they have everything.

    Args:
        now: the plan in force when slots were lost.
        wished: the plan to reach, of the slots that are left and of new ones.
        held, size: as in `next_stage`.
    """
    pulls = moves(held, wished, size)
    if pulls.missing or pulls.num_bytes(size) <= LEAST_BYTES:
        return wished
    dense = [slot for slot in now.dense if slot in wished.addresses]
    workers = [slot for slot in now.attention if slot in dense] or dense[:1]
    if not workers:
        return wished
    owners = split_evenly(len(now.part_owners), workers)
    return left_of(now, wished.addresses, owners, wished.generation) or wished


def _grown(kind: str, table: Table, gained: Mapping[Piece, Sequence[int]]) -> Table:
    return tuple(
        tuple(_with(holders, gained.get((kind, layer, index), ())) for index, holders in enumerate(row))
        for layer, row in enumerate(table)
    )


def _with(holders: tuple[int, ...], more: Sequence[int]) -> tuple[int, ...]:
    return (*holders, *(slot for slot in more if slot not in holders))


class Pace:
    """How much the next stage moves, and when it may come."""

    def __init__(self) -> None:
        self._bytes_per_s, self._next_s = 0.0, -inf

    @property
    def budget(self) -> int:
        """Bytes of the next stage."""
        return max(LEAST_BYTES, int(PAUSE_S * self._bytes_per_s))

    def count(self, num_bytes: int, pause_s: float, now_s: float) -> None:
        """Take note of a stage.

        Args:
            num_bytes: that it moved.
            pause_s: that training waited for it.
            now_s: when it ended.
        """
        self._bytes_per_s, self._next_s = num_bytes / max(pause_s, 1e-3), now_s + REST * pause_s

    def is_due(self, now_s: float) -> bool:
        """Whether training has gone on for long enough.

        Args:
            now_s: on the same clock.
        """
        return now_s >= self._next_s

    def seconds(self, num_bytes: int) -> float:
        """How long it takes to move so much in one go, at what was measured or a budget each second."""
        return num_bytes / max(self._bytes_per_s, LEAST_BYTES)
