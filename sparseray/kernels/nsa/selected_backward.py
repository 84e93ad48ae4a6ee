"""Key and value gradients of the selected branch: for every block, the queries that selected it.

The inverse of the selection is a compressed-row table made by a stable sort, so the queries of a block are in
ascending order and the sums are bitwise repeatable. Block 0 is read by every query: rows longer than `chunk`
are cut into parts with fp32 partial sums that a second kernel adds in order. No atomics.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.nsa.geometry import KEYS, Geometry
from sparseray.kernels.nsa.range_forward import LOG2E, tokens_per_tile
from sparseray.kernels.nsa.selected_forward import query_sequences, shared_constants
from sparseray.kernels.nsa.tiles import load_tile, store_tile
from sparseray.kernels.nsa.tuning import LAUNCH


@dataclass(frozen=True, kw_only=True)
class InverseSelection:
    """Which queries selected each block, and the parts the rows are cut into.

    Attributes:
        queries: int32 [entries], packed query index, rows one after the other.
        starts: int64 [rows + 1]; a row is (key/value head, packed block).
        parts: int32 [programs, 4]: row (-1: none), part inside the row, parts of the row, first partial slot.
        num_slots: upper bound of the fp32 partial sums.
    """

    queries: Tensor
    starts: Tensor
    parts: Tensor
    num_slots: int


def invert_selection(index: Tensor, geometry: Geometry, *, select_block: int, chunk: int) -> InverseSelection:
    """Build the table without a host synchronisation; equal keys keep the order of the queries."""
    tokens, num_kv, n = index.shape
    meta = geometry.meta
    blocks = (meta[:, 7] + select_block - 1) // select_block
    first = blocks.cumsum(0) - blocks
    num_blocks = geometry.num_tiles(KEYS, select_block)
    rows = num_kv * num_blocks
    head = torch.arange(num_kv, device=index.device, dtype=torch.int32)[None, :, None] * num_blocks
    base = first[query_sequences(geometry).long()].int()[:, None, None]
    keys = torch.where(index < 0, rows, index + base + head).flatten()
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, device=index.device, dtype=torch.int32))
    queries = (order // (num_kv * n)).int()
    counts = starts[1:] - starts[:-1]
    parts = ((counts + chunk - 1) // chunk).clamp(min=1)
    ends = parts.cumsum(0)
    shared = torch.where(parts > 1, parts, torch.zeros_like(parts))
    slot = shared.cumsum(0) - shared
    entries = tokens * num_kv * n
    ids = torch.arange(rows + entries // chunk, device=index.device)
    row = torch.searchsorted(ends, ids, right=True)
    known = row.clamp(max=rows - 1)
    part = ids - (ends - parts)[known]
    row = torch.where(row < rows, row, torch.full_like(row, -1))
    table = torch.stack([row, part, parts[known], slot[known]], 1).int().contiguous()
    return InverseSelection(queries=queries, starts=starts, parts=table, num_slots=2 * (entries // chunk) + 1)


@triton.jit
def selected_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_dg, p_dk, p_dv, p_part_k, p_part_v, p_queries, p_starts, p_parts, p_tiles, p_meta,
    p_pos, num_blocks, chunk, scale, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    p_part = p_parts + tl.program_id(0) * 4
    i_row = tl.load(p_part)
    if i_row < 0:
        return
    i_part = tl.load(p_part + 1)
    num_parts = tl.load(p_part + 2)
    i_slot = tl.load(p_part + 3) + i_part
    i_kv = i_row // num_blocks
    i_seq = tl.load(p_tiles + (i_row % num_blocks) * 2)
    if i_seq < 0:
        return
    i_block = tl.load(p_tiles + (i_row % num_blocks) * 2 + 1)
    k_off = tl.load(p_meta + i_seq * 12 + 6)
    k_len = tl.load(p_meta + i_seq * 12 + 7).to(tl.int32)
    o_c = tl.arange(0, BN)
    o_i = i_block * SELECT + o_c
    m_i = (o_c < SELECT) & (o_i < k_len)
    o_key = (k_off + o_i) * H + i_kv
    b_k0 = load_tile(p_k, o_key, m_i, DQ, 0, D0, True)
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    if D1 > 0:
        b_k1 = load_tile(p_k, o_key, m_i, DQ, D0, D1, True)
        b_dk1 = tl.zeros([BN, D1], tl.float32)
    b_v = load_tile(p_v, o_key, m_i, DV, 0, DVP, True)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    e_lo = tl.load(p_starts + i_row) + i_part * chunk
    e_hi = tl.minimum(tl.load(p_starts + i_row + 1), e_lo + chunk)
    o_m = tl.arange(0, BQ * GP)
    for e in range(e_lo, e_hi, BQ):
        o_e = e + o_m // GP
        m_e = o_e < e_hi
        b_i = tl.load(p_queries + o_e, mask=m_e, other=0)
        b_t = tl.load(p_pos + b_i, mask=m_e, other=-1)
        m_q = m_e & (o_m % GP < G)
        o_row = b_i.to(tl.int64) * (H * G) + i_kv * G + o_m % GP
        b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
        b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision=IP)
        if D1 > 0:
            b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
            b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision=IP)
        b_do = load_tile(p_do, o_row, m_q, DV, 0, DVP, True)
        b_lse = tl.load(p_lse + o_row, mask=m_q, other=float("inf"))
        b_dg = tl.load(p_dg + o_row, mask=m_q, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=IP)
        b_see = m_i[:, None] & (o_i[:, None] <= b_t[None, :])
        b_p = tl.where(b_see, tl.exp2(b_s * scale2 - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=IP)
        b_ds = (b_p * (b_dp - b_dg[None, :])).to(b_q0.dtype)
        b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=IP)
        if D1 > 0:
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=IP)
    if num_parts == 1:
        store_tile(p_dk, o_key, m_i, b_dk0 * scale, DQ, 0, D0)
        if D1 > 0:
            store_tile(p_dk, o_key, m_i, b_dk1 * scale, DQ, D0, D1)
        store_tile(p_dv, o_key, m_i, b_dv, DV, 0, DVP)
    else:
        o_out = i_slot.to(tl.int64) * SELECT + o_c
        store_tile(p_part_k, o_out, m_i, b_dk0 * scale, DQ, 0, D0)
        if D1 > 0:
            store_tile(p_part_k, o_out, m_i, b_dk1 * scale, DQ, D0, D1)
        store_tile(p_part_v, o_out, m_i, b_dv, DV, 0, DVP)


@triton.jit
def add_parts_kernel(
    p_out, p_part_sum, p_parts, p_tiles, p_meta, num_blocks,
    H: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    p_part = p_parts + tl.program_id(0) * 4
    i_row = tl.load(p_part)
    num_parts = tl.load(p_part + 2)
    # The first part of a row adds them all.
    if (i_row < 0) | (num_parts == 1) | (tl.load(p_part + 1) > 0):
        return
    i_kv = i_row // num_blocks
    i_seq = tl.load(p_tiles + (i_row % num_blocks) * 2)
    i_block = tl.load(p_tiles + (i_row % num_blocks) * 2 + 1)
    k_off = tl.load(p_meta + i_seq * 12 + 6)
    k_len = tl.load(p_meta + i_seq * 12 + 7).to(tl.int32)
    o_c = tl.program_id(1) * BN + tl.arange(0, BN)
    o_i = i_block * SELECT + o_c
    m_i = (o_c < SELECT) & (o_i < k_len)
    i_slot = tl.load(p_part + 3).to(tl.int64)
    b_sum = tl.zeros([BN, DP], tl.float32)
    for i in range(0, num_parts):
        b_sum += load_tile(p_part_sum, (i_slot + i) * SELECT + o_c, m_i, D, 0, DP, True)
    store_tile(p_out, (k_off + o_i) * H + i_kv, m_i, b_sum, D, 0, DP)


def selected_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, index: Tensor, positions: Tensor,
    geometry: Geometry, *, select_block: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv of the selected branch, in the dtype of k; rows as in `range_backward`."""
    heads, num_kv = q.shape[1], k.shape[1]
    launch = LAUNCH["selected_dkdv"]
    inverse = invert_selection(index, geometry, select_block=select_block, chunk=launch["chunk"])
    tokens, padded = tokens_per_tile(launch["rows"], heads // num_kv)
    tiles = geometry.tiles(KEYS, select_block)
    num_blocks = tiles.shape[0]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    shape = (inverse.num_slots, select_block)
    part_k = torch.empty(*shape, k.shape[-1], dtype=torch.float32, device=k.device)
    part_v = torch.empty(*shape, v.shape[-1], dtype=torch.float32, device=k.device)
    constants = shared_constants(q, k, v, select_block)
    programs = inverse.parts.shape[0]
    selected_dkdv_kernel[(programs,)](
        q, k, v, do, row_lse, row_dg, dk, dv, part_k, part_v, inverse.queries, inverse.starts, inverse.parts, tiles,
        geometry.meta, positions, num_blocks, launch["chunk"], scale, scale * LOG2E, GP=padded, BQ=tokens,
        **constants, num_warps=launch["num_warps"], num_stages=launch["num_stages"],
    )  # fmt: skip
    for out, part, width in ((dk, part_k, constants["D0"] + constants["D1"]), (dv, part_v, constants["DVP"])):
        padded_width = 1 << (width - 1).bit_length()
        add_parts_kernel[(programs, triton.cdiv(select_block, 16))](
            out, part, inverse.parts, tiles, geometry.meta, num_blocks, H=num_kv, SELECT=select_block, BN=16,
            D=out.shape[-1], DP=padded_width, num_warps=4,
        )  # fmt: skip
    return dk, dv
