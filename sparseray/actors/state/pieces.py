"""The pieces that state is cut into: what can lie on a slot of its own, and move.

The least units that a plan places: all dense weights, one routed expert, one bucket of a memory table;
each with its optimizer state. Placement, moves, holdings and checkpoints speak of nothing smaller.
"""

from collections.abc import Iterable, Sequence

import numpy as np

Piece = tuple[str, int, int]
"""("dense", 0, 0), ("expert", moe layer, expert) or ("bucket", dse layer, bucket)."""

Key = tuple[int, int]
"""(moe layer, expert) or (dse layer, bucket), where the kind is clear."""

DENSE: Piece = ("dense", 0, 0)


def keys_of(pieces: Iterable[Piece], kind: str) -> list[Key]:
    """Keys of the pieces of one kind, "expert" or "bucket", in their order."""
    return [(layer, index) for name, layer, index in pieces if name == kind]


def bucket_bounds(num_rows: int, num_buckets: int) -> np.ndarray:
    """First row of every bucket of a table.

    Args:
        num_rows: rows of the table.
        num_buckets: contiguous ranges that it is cut into.

    Returns:
        int64 [num_buckets + 1], the number of rows last.
    """
    return np.arange(num_buckets + 1, dtype=np.int64) * num_rows // num_buckets


def bucket_sizes(table_rows: Sequence[int], num_buckets: int) -> list[list[int]]:
    """Rows of every bucket, [dse layers][buckets]; `table_rows` has the rows of each layer's table."""
    return [np.diff(bucket_bounds(rows, num_buckets)).tolist() for rows in table_rows]
