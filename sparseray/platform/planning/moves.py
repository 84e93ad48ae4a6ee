"""What a change of plan moves: which slot sends which pieces of state to which, and how many bytes that is.

Pure; `platform/planning/replan.py` makes the plans and offers these names too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import DENSE, Piece, bucket_sizes, row_bytes
from sparseray.model.config import ModelConfig

FP32_BYTES = 4


def holdings(plan: Plan) -> dict[Piece, tuple[int, ...]]:
    """Return the holders of every piece, primary first."""
    found: dict[Piece, tuple[int, ...]] = {DENSE: plan.dense}
    for kind, table in (("expert", plan.experts), ("bucket", plan.buckets)):
        for layer, row in enumerate(table):
            for index, holders in enumerate(row):
                found[(kind, layer, index)] = holders
    return found


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Transfers that bring state to where a plan wants it.

    Args:
        pulls: receiving slot -> source slot -> pieces.
        missing: pieces that nobody alive holds.
    """

    pulls: dict[int, dict[int, list[Piece]]]
    missing: tuple[Piece, ...]

    def num_bytes(self, size: Callable[[Piece], int]) -> int:
        """Bytes that travel."""
        return sum(size(p) for sources in self.pulls.values() for pieces in sources.values() for p in pieces)


def moves(held: Mapping[Piece, Collection[int]], new: Plan, size: Callable[[Piece], int]) -> Moves:
    """Find who must pull what from whom, such that sources send about the same number of bytes.

    Args:
        held: slots that have each piece; those without an address in `new` do not count.
        new: the plan to reach.
        size: bytes of a piece.
    """
    wanted = []
    missing = []
    for piece, holders in holdings(new).items():
        sources = sorted(set(held.get(piece, ())) & set(new.addresses))
        if not sources:
            missing.append(piece)
            continue
        wanted += [
            (len(sources), -size(piece), piece, slot, sources) for slot in holders if slot not in sources
        ]
    sent = dict.fromkeys(new.addresses, 0)
    pulls: dict[int, dict[int, list[Piece]]] = {}
    # Pieces without a choice first, then large ones: what comes last evens out the rest.
    for _, negative, piece, slot, sources in sorted(wanted):
        source = min(sources, key=lambda s: (sent[s], s))
        sent[source] -= negative
        pulls.setdefault(slot, {}).setdefault(source, []).append(piece)
    return Moves(pulls=pulls, missing=tuple(missing))


def piece_bytes(
    config: ModelConfig, table_rows: Sequence[int], dense_parameters: int, moments: str = "float32"
) -> Callable[[Piece], int]:
    """Return the function that gives a piece's bytes: weights and moments of Adam.

    Args:
        config: of the model.
        table_rows: rows of each memory layer's table.
        dense_parameters: number of dense parameters.
        moments: dtype of those of dense weights and experts.
    """
    parameter = FP32_BYTES + (2 * FP32_BYTES if moments == "float32" else FP32_BYTES)
    expert = parameter * 3 * config.hidden * config.moe.expert_dim
    row = row_bytes(config.dse)
    buckets = bucket_sizes(table_rows, config.dse.num_buckets)

    def size(piece: Piece) -> int:
        kind, layer, index = piece
        if kind == "dense":
            return parameter * dense_parameters
        if kind == "expert":
            return expert
        return buckets[layer][index] * row

    return size


def least_bytes(old: Plan, new: Plan, size: Callable[[Piece], int]) -> int:
    """Lower bound of the bytes that must travel for a placement as balanced as `new`'s.

    For dense weights, experts and buckets apart: each slot that holds some in `new` gains at least what
    it will hold beyond what it holds, and which of these slots holds how much is free to choose.

    Args:
        old: plan so far.
        new: plan to come.
        size: bytes of a piece.
    """
    total = 0
    for kind in ("dense", "expert", "bucket"):
        before, after = _bytes_by_slot(old, kind, size), _bytes_by_slot(new, kind, size)
        had = sorted(before.get(slot, 0) for slot in after)
        total += sum(max(0, now - then) for now, then in zip(sorted(after.values()), had))
    return total


def _bytes_by_slot(plan: Plan, kind: str, size: Callable[[Piece], int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for piece, holders in holdings(plan).items():
        if piece[0] == kind:
            for slot in holders:
                found[slot] = found.get(slot, 0) + size(piece)
    return found
