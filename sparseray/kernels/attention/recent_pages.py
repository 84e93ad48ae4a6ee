"""`recent_pages`: where the rows of a call lie in the pools of the newest tokens, in one launch for all layers of a step.

A decode step that a CUDA graph holds knows its tables and places on the device alone. Oracle: `PagedPlainOps.recent_pages`.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE = 1024
"""Entries of a table, and places, of a program."""


@triton.jit(do_not_specialize=["num_entries", "num_places"])
def recent_pages_kernel(
    p_recent, p_table, p_places, p_own_table, p_own_places, num_entries, num_places, PAGE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A tile of the table, and one of the places."""
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    m_table = o < num_entries
    b_page = tl.load(p_table + o, mask=m_table, other=0)
    tl.store(p_own_table + o, tl.load(p_recent + b_page, mask=m_table, other=0), mask=m_table)
    m_place = o < num_places
    b_place = tl.load(p_places + o, mask=m_place, other=0)
    b_own = tl.load(p_recent + b_place // PAGE, mask=m_place, other=0).to(b_place.dtype)
    tl.store(p_own_places + o, b_own * PAGE + b_place % PAGE, mask=m_place)


def recent_pages(
    recent: Tensor, table: Tensor, places: Tensor, own_table: Tensor, own_places: Tensor, page: int
) -> None:
    """Find the recent page of everything in a table, and the recent place of every place.

    Args:
        recent: int32 [pages], the recent page of every page.
        table: int32, any shape, contiguous; places: integers [R].
        own_table, own_places: likewise, written.
        page: tokens of a page.
    """
    most = max(table.numel(), places.numel())
    launch_kernel(
        recent_pages_kernel, (triton.cdiv(most, TILE),), recent, table, places, own_table, own_places, table.numel(),
        places.numel(), PAGE=page, BN=TILE, num_warps=4,
    )  # fmt: skip
