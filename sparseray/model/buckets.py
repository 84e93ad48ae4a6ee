"""Where a memory table is cut into buckets; without torch, since plans are made before it is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np


def bucket_bounds(num_rows: int, num_buckets: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """First row of every bucket of a table.

    Args:
        num_rows: rows of the table.
        num_buckets: contiguous ranges that it is cut into.

    Returns:
        int64 [num_buckets + 1], the number of rows last.
    """
    return np.arange(num_buckets + 1, dtype=np.int64) * num_rows // num_buckets
