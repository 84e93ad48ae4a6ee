"""What the pipelined kernels share (Gluon, Hopper): work items, the ring of key tiles that one warp fills, rows of queries,
and which keys they see.

A work item is a few query tokens with all query heads of one key/value head, for two warpgroups. Programs stay and take
item after item, those with the most keys first; every warp finds out by itself what an item is, so nothing but tiles and
barriers passes between them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 64
"""Rows of a warpgroup: query tokens times query heads of one key/value head."""
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Triton 3.7 renamed it."""
NEVER = gl.constexpr(0x7FFFFFFF)
WIDTHS = (64, 128)
"""Head sizes for which the tiles fit shared memory and the layouts below are right."""


@gluon.jit
def item_of(
    item, p_tiles, p_meta, num_tiles,
    H: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr,
    WIN: gl.constexpr,
):  # fmt: skip
    """Of a work item: key/value head, first query in its sequence, row of the table, first key, number of key tiles.

    It has 2 * BQ queries; its tiles of BN keys begin at the first key that one of them sees.
    """
    i_kv = item % H
    i_tile = num_tiles - 1 - item // H
    i_seq = gl.load(p_tiles + i_tile * 2)
    i_q = gl.load(p_tiles + i_tile * 2 + 1) * (2 * BQ)
    p_row = p_meta + gl.maximum(i_seq, 0) * 12
    q_len = gl.load(p_row + 1).to(gl.int32)
    q_start = gl.load(p_row + 2).to(gl.int32)
    k_len = gl.load(p_row + KIND + 1).to(gl.int32)
    k_start = gl.load(p_row + KIND + 2).to(gl.int32)
    t_last = q_start + gl.minimum(i_q + 2 * BQ, q_len) - 1
    seen = gl.minimum(gl.maximum(t_last - k_start - LEN + 1 + STRIDE, 0) // STRIDE, k_len)
    i_first = 0
    if WIN > 0:
        i_first = gl.maximum(q_start + i_q - WIN + 1 - k_start, 0)
    # A tile whose queries see nothing still takes a turn, which writes zeros.
    count = gl.where(i_seq < 0, 0, gl.maximum((seen - i_first + BN - 1) // BN, 1))
    return i_kv, i_q, p_row, i_first, count


@gluon.jit
def whole_tiles(
    p_row, i_q, i_first, count, BQ: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr,
    STRIDE: gl.constexpr, WIN: gl.constexpr,
):  # fmt: skip
    """First and end of the key tiles of which BQ queries from i_q on see every key."""
    q_start = gl.load(p_row + 2).to(gl.int32)
    k_len = gl.load(p_row + KIND + 1).to(gl.int32)
    k_start = gl.load(p_row + KIND + 2).to(gl.int32)
    seen = gl.minimum(gl.maximum(q_start + i_q - k_start - LEN + 1 + STRIDE, 0) // STRIDE, k_len)
    end = gl.minimum(gl.maximum(seen - i_first, 0) // BN, count)
    first = 0
    if WIN > 0:
        first = gl.maximum(q_start + i_q + BQ - WIN - k_start - i_first + BN - 1, 0) // BN
    return gl.minimum(first, end), end


@gluon.jit
def forced_tiles(
    p_row,
    i_q,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    SELECT: gl.constexpr,
    INITIAL: gl.constexpr,
    LOCAL: gl.constexpr,
):
    """Key tiles of an item in the first INITIAL and last LOCAL selection blocks of its queries: how many there are in
    the former, the first key of the latter, and how many in all."""
    q_len = gl.load(p_row + 1).to(gl.int32)
    q_start = gl.load(p_row + 2).to(gl.int32)
    seen = gl.minimum(q_start + gl.minimum(i_q + 2 * BQ, q_len), gl.load(p_row + 7).to(gl.int32))
    initial = (gl.minimum(seen, INITIAL * SELECT) + BN - 1) // BN
    i_first = gl.maximum(((q_start + i_q) // SELECT - LOCAL + 1) * SELECT, INITIAL * SELECT)
    local = (gl.maximum(seen - i_first, 0) + BN - 1) // BN
    return initial, i_first, gl.maximum(initial + local, 1)


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Of a ring of key tiles that two warpgroups read, STAGES each: keys are there, values are there, keys are read,
    values are read."""
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(2 * STAGES + i), count=2)
    fence_async_shared()
    thread_barrier()
    return bars


@gluon.jit
def _load_tile(
    d_k, d_v, s_k, s_v, bars, row, i_kv, turn, DQ: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr
):
    stage = turn % STAGES
    phase = (turn // STAGES & 1) ^ 1
    b_k = bars.index(stage)
    b_v = bars.index(STAGES + stage)
    mbarrier.wait(bars.index(2 * STAGES + stage), phase)
    mbarrier.expect(b_k, d_k.block_type.nbytes)
    tma.async_copy_global_to_shared(d_k, [row, i_kv * DQ], b_k, s_k.index(stage))
    mbarrier.wait(bars.index(3 * STAGES + stage), phase)
    mbarrier.expect(b_v, d_v.block_type.nbytes)
    tma.async_copy_global_to_shared(d_v, [row, i_kv * DV], b_v, s_v.index(stage))


@gluon.jit
def load_keys(
    d_k, d_v, d_k2, d_v2, s_k, s_v, bars, p_tiles, p_meta, num_tiles,
    H: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr,
    LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr,
    LOCAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of keys and values of every work item, the last first; then those of the blocks that are always selected."""
    turn = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_q, p_row, i_first, count = item_of(
            item, p_tiles, p_meta, num_tiles, H, BQ, BN, KIND, LEN, STRIDE, WIN
        )  # fmt: skip
        k_off = gl.load(p_row + KIND).to(gl.int32) + i_first
        for j in range(0, count):
            _load_tile(d_k, d_v, s_k, s_v, bars, k_off + (count - 1 - j) * BN, i_kv, turn, DQ, DV, STAGES)
            turn += 1
        if SELECT > 0:
            initial, i_first, forced = forced_tiles(p_row, i_q, BQ, BN, SELECT, INITIAL, LOCAL)
            k_off = gl.load(p_row + 6).to(gl.int32)
            for j in range(0, gl.where(count > 0, forced, 0)):
                i_k = key_of(forced - 1 - j, initial, i_first, BN)
                _load_tile(d_k2, d_v2, s_k, s_v, bars, k_off + i_k, i_kv, turn, DQ, DV, STAGES)
                turn += 1


@gluon.jit
def key_of(j, initial, i_first, BN: gl.constexpr):
    """First key of the j-th tile where the first `initial` tiles begin at 0 and the others at i_first."""
    return gl.where(j < initial, j * BN, i_first + (j - initial) * BN)


@gluon.jit
def load_rows(
    p_x,
    p_row,
    i_q,
    i_kv,
    H: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """The rows of BQ queries from i_q on, [BQ * GP, WIDTH]; those that are none read as 0."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    o_row, m_row = rows_of(p_row, i_q, i_kv, H, G, GP, BQ, gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, WIDE))
    return gl.load(p_x + o_row[:, None] * WIDTH + o_d[None, :], mask=m_row[:, None], other=0.0)


@gluon.jit
def rows_of(
    p_row,
    i_q,
    i_kv,
    H: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Packed rows of BQ queries from i_q on, and which of them there are."""
    o_m = gl.arange(0, BQ * GP, layout=LAYOUT)
    o_q = i_q + o_m // GP
    m_row = (o_q < gl.load(p_row + 1).to(gl.int32)) & (o_m % GP < G)
    return (gl.load(p_row) + o_q) * (H * G) + i_kv * G + o_m % GP, m_row


@gluon.jit
def visible(o_end, b_t, WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr):
    """Which keys, by their last positions, the queries at positions b_t see."""
    b_see = o_end[None, :] <= b_t[:, None]
    if WIN > 0:
        b_see = b_see & (o_end[None, :] > b_t[:, None] - WIN)
    if SELECT > 0:
        b_local = o_end[None, :] >= ((b_t // SELECT - LOCAL + 1) * SELECT)[:, None]
        b_see = b_see & (b_local | (o_end < INITIAL * SELECT)[None, :])
    return b_see


@gluon.jit
def last_positions(
    i,
    end,
    p_row,
    KIND: gl.constexpr,
    LEN: gl.constexpr,
    STRIDE: gl.constexpr,
    BN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Of BN keys from i on; of those that are none, or not before `end`, one that nothing reaches."""
    o_n = i + gl.arange(0, BN, layout=LAYOUT)
    k_len = gl.load(p_row + KIND + 1).to(gl.int32)
    k_start = gl.load(p_row + KIND + 2).to(gl.int32)
    return gl.where(o_n < gl.minimum(k_len, end), k_start + o_n * STRIDE + LEN - 1, NEVER)


@gluon.jit
def forced_positions(
    j,
    initial,
    i_first,
    p_row,
    SELECT: gl.constexpr,
    INITIAL: gl.constexpr,
    BN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Positions of the keys of the j-th tile of `forced_tiles`: each key in one tile only."""
    end = gl.where(j < initial, INITIAL * SELECT, NEVER)
    return last_positions(key_of(j, initial, i_first, BN), end, p_row, 6, 1, 1, BN, LAYOUT)


@dataclass(frozen=True, kw_only=True)
class Forced:
    """The blocks that are selected whatever the scores.

    Attributes:
        k, v: keys and values [S, H, D | Dv] of the selected branch.
        num_initial, num_local: how many of the first and of the last blocks; the latter at least 1.
    """

    k: Tensor
    v: Tensor
    select_block: int
    num_initial: int
    num_local: int

    def constants(self) -> dict[str, int]:
        return {"SELECT": self.select_block, "INITIAL": self.num_initial, "LOCAL": self.num_local}


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Output [T, HQ, Dv] and base-2 log-sum-exp [T, HQ] over the forced blocks, and how many those are."""

    out: Tensor
    lse: Tensor
    num_initial: int
    num_local: int


NO_BLOCKS = {"SELECT": 0, "INITIAL": 0, "LOCAL": 0}


@lru_cache(maxsize=16)
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory, for copies and products alike."""
    return gl.NVMMASharedLayout.get_default_for(
        list(shape), gl.float16 if dtype == torch.float16 else gl.bfloat16
    )


def source_of(x: Tensor, keys: int) -> TensorDescriptor:
    """Descriptor of tiles of `keys` rows of one head of x, [S, H, D] read as [S, H * D]."""
    wide = x.shape[1] * x.shape[2]
    return TensorDescriptor(
        x, [x.shape[0], wide], [wide, 1], [keys, x.shape[2]], layout_of((keys, x.shape[2]), x.dtype)
    )
