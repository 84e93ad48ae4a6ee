"""How a layer's memory table is cut into buckets: contiguous ranges of rows of about the same length.

A file of its own, because planning reads it and loads no torch.
"""

import numpy as np


def bucket_bounds(num_rows: int, num_buckets: int) -> np.ndarray:
    """First row of every bucket of a table.

    Args:
        num_rows: rows of the table.
        num_buckets: ranges that it is cut into.

    Returns:
        int64 [num_buckets + 1], the number of rows last.
    """
    return np.arange(num_buckets + 1, dtype=np.int64) * num_rows // num_buckets
