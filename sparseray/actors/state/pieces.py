"""The pieces that state is cut into: what can lie on a slot of its own, and move.

The least units that a plan places: all dense weights, one routed expert, one bucket of a memory table;
each with its optimizer state. Placement, moves, holdings and checkpoints speak of nothing smaller.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sparseray.model.buckets import bucket_bounds

Piece = tuple[str, int, int]
"""("dense", 0, 0), ("expert", moe layer, expert) or ("bucket", dse layer, bucket)."""

Key = tuple[int, int]
"""(moe layer, expert) or (dse layer, bucket), where the kind is clear."""

DENSE: Piece = ("dense", 0, 0)


def keys_of(pieces: Iterable[Piece], kind: str) -> list[Key]:
    """Keys of the pieces of one kind, "expert" or "bucket", in their order."""
    return [(layer, index) for name, layer, index in pieces if name == kind]


def bucket_sizes(table_rows: Sequence[int], num_buckets: int) -> list[list[int]]:
    """Rows of every bucket, [dse layers][buckets]; `table_rows` has the rows of each layer's table."""
    return [np.diff(bucket_bounds(rows, num_buckets)).tolist() for rows in table_rows]
