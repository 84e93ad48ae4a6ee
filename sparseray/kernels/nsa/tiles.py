"""Small device functions shared by the NSA kernels: masked tile loads, split head sizes, visible ranges."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def split_width(width: int) -> tuple[int, int]:
    """Cut a head size into a power of two and a padded rest: 192 -> (128, 64), 128 -> (128, 0)."""
    if width <= 16:
        return 16, 0
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if rest == 0:
        return first, 0
    return first, max(16, next_power_of_2(rest))


def precision(dtype: torch.dtype) -> str:
    """How tl.dot treats operands of this dtype: exact for fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@lru_cache(maxsize=16)
def _compute_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def can_copy(x: Tensor) -> bool:
    """Whether the hardware's bulk copies can read tiles of x, [S, H, D] and contiguous."""
    return (
        x.is_cuda
        and x.element_size() == 2
        and x.shape[0] > 0
        and x.shape[1] * x.shape[2] % 8 == 0
        and x.data_ptr() % 16 == 0
        and _compute_capability(x.device) >= 9
    )


def on_hopper(x: Tensor) -> bool:
    """Whether x is on a GPU that has the matrix products of warpgroups: those before and after it have not."""
    return x.is_cuda and _compute_capability(x.device) == 9


def copy_source(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Descriptor by which a kernel copies tiles of [rows, width] of x, [S, H, D] read as [S, H * D]."""
    wide = x.shape[1] * x.shape[2]
    return TensorDescriptor(x, [x.shape[0], wide], [wide, 1], [rows, width])


@triton.jit
def fetch(
    src, row, o_row, m_row, i_kv, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr,
    MASK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """A tile of one key/value head's rows: by one bulk copy from `row` on, or by pointers to `o_row`.

    A bulk copy does not mask: rows and columns that do not belong to the tile hold other finite values.
    """
    if BULK:
        b = src.load([row.to(tl.int32), i_kv * WIDTH + START])
    else:
        b = load_tile(src, o_row, m_row, WIDTH, START, SIZE, MASK)
    return b


@triton.jit
def load_tile(
    p, o_row, m_row, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, MASK: tl.constexpr
):
    """Columns [START, START + SIZE) of rows of WIDTH values; what is masked or beyond WIDTH reads as 0."""
    o_col = START + tl.arange(0, SIZE)
    p_tile = p + o_row[:, None] * WIDTH + o_col[None, :]
    if START + SIZE > WIDTH:
        m_col = o_col < WIDTH
        b = tl.load(p_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)
    elif MASK:
        b = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        b = tl.load(p_tile)
    return b


@triton.jit
def store_tile(p, o_row, m_row, b, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    o_col = START + tl.arange(0, SIZE)
    m_tile = m_row[:, None] & (o_col < WIDTH)[None, :]
    tl.store(p + o_row[:, None] * WIDTH + o_col[None, :], b.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def add_tile(
    p, o_row, m_row, b, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, ADD: tl.constexpr
):
    """Store a tile, or add it to what is there."""
    o_col = START + tl.arange(0, SIZE)
    m_tile = m_row[:, None] & (o_col < WIDTH)[None, :]
    p_tile = p + o_row[:, None] * WIDTH + o_col[None, :]
    if ADD:
        b += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def page_rows(p_table, o_t, m_t, PAGE):
    """Row in a paged cache of every token position."""
    b_page = tl.load(p_table + o_t // PAGE, mask=m_t, other=0).to(tl.int64)
    return b_page * PAGE + o_t % PAGE


@triton.jit
def key_rows(p_table, offset, o_i, m_i, PAGE: tl.constexpr):
    """Rows of keys: packed ones follow `offset`; paged ones (PAGE > 0) are in the table from `offset` on."""
    if PAGE > 0:
        b = page_rows(p_table + offset, o_i, m_i, PAGE)
    else:
        b = offset + o_i
    return b


@triton.jit
def block_rows(i_row, o_c, p_tiles, p_meta, num_blocks, H: tl.constexpr, SELECT: tl.constexpr):
    """A row of the inverse table (`inverse.py`): its head, the positions of keys o_c of its block, which of them
    there are, and their packed rows."""
    i_kv = i_row // num_blocks
    p_tile = p_tiles + (i_row % num_blocks) * 2
    p_seq = p_meta + tl.load(p_tile) * 12
    o_i = tl.load(p_tile + 1) * SELECT + o_c
    m_i = (o_c < SELECT) & (o_i < tl.load(p_seq + 7).to(tl.int32))
    return i_kv, o_i, m_i, (tl.load(p_seq + 6) + o_i) * H + i_kv


@triton.jit
def num_visible(t, start, LEN: tl.constexpr, STRIDE: tl.constexpr):
    """How many keys of LEN tokens every STRIDE tokens, the first at `start`, end at or before position t."""
    return tl.maximum(t - start - LEN + 1 + STRIDE, 0) // STRIDE


@triton.jit
def take_top(b_key, n):
    """Which of the keys are among the n largest that are not negative, and their rank by position.

    Halving finds a threshold that n keys reach: 31 counts at most, fewer once exactly n do. With fewer than n keys
    it ends at 0 and all are taken; ties go to lower positions.
    """
    lo = 0
    s = 30
    while s >= 0:
        mid = lo | (1 << s)
        reach = tl.sum((b_key >= mid).to(tl.int32), 0)
        lo = tl.where(reach >= n, mid, lo)
        s = tl.where(reach == n, -1, s - 1)
    b_take = b_key >= lo
    if tl.sum(b_take.to(tl.int32), 0) > n:
        b_above = b_key > lo
        b_equal = b_key == lo
        room = n - tl.sum(b_above.to(tl.int32), 0)
        b_take = b_above | (b_equal & (tl.cumsum(b_equal.to(tl.int32), 0) <= room))
    return b_take, tl.cumsum(b_take.to(tl.int32), 0) - 1
