"""The pieces that state is cut into: what can lie on a slot of its own, and move.

The least units that a plan places: all dense weights, one routed expert, one bucket of a memory table;
each with its optimizer state. Placement, moves, holdings and checkpoints speak of nothing smaller.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sparseray.model.buckets import bucket_bounds
from sparseray.model.config import DSEConfig

Piece = tuple[str, int, int]
"""("dense", 0, 0), ("expert", moe layer, expert) or ("bucket", dse layer, bucket)."""

Key = tuple[int, int]
"""(moe layer, expert) or (dse layer, bucket), where the kind is clear."""

DENSE: Piece = ("dense", 0, 0)


def keys_of(pieces: Iterable[Piece], kind: str) -> list[Key]:
    """Keys of the pieces of one kind, "expert" or "bucket", in their order.

    Args:
        pieces: of any kind.
        kind: dense, expert or bucket.
    """
    return [(layer, index) for name, layer, index in pieces if name == kind]


def following(keys: Iterable[Key]) -> list[tuple[int, int, int]]:
    """(layer, first index, how many) of keys whose indices follow each other.

    Args:
        keys: in any order.
    """
    found: list[tuple[int, int, int]] = []
    for layer, index in sorted(keys):
        of, first, count = found[-1] if found else (-1, 0, 0)
        if (of, first + count) == (layer, index):
            found[-1] = layer, first, count + 1
        else:
            found.append((layer, index, 1))
    return found


def bucket_sizes(table_rows: Sequence[int], num_buckets: int) -> list[list[int]]:
    """Rows of every bucket, [dse layers][buckets]; `table_rows` has the rows of each layer's table.

    Args:
        table_rows: rows of each memory layer's table.
        num_buckets: of each table.
    """
    return [np.diff(bucket_bounds(rows, num_buckets)).tolist() for rows in table_rows]


def row_bytes(config: DSEConfig, *, with_optimizer: bool = True) -> int:
    """Bytes of one table row.

    Args:
        config: of the memory.
        with_optimizer: count its state too: first moment of every element (fp32), second moment (fp32) and updates
            (int64) of the row.
    """
    element = 2 if config.row_dtype == "bfloat16" else 4
    return config.head_dim * element + (config.head_dim * 4 + 4 + 8 if with_optimizer else 0)
