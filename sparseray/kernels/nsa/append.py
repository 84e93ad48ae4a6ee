"""`append_rows`: all that a decoding step of NSA does between its projection and its attention, in one launch; `write_rows`
is the part of it that chunks of prompts share.

Of every new token the queries and keys are rotated, keys and values of the three branches go to their pages, the gates
are computed, and the compressed tokens that it completes (`compress_step`). What these four were as launches of their own
took longer to start than to compute. Oracle: `PagedPlainOps.paged_nsa_append`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.compress_step import compress_block, tile_of
from sparseray.kernels.nsa.tiles import next_power_of_2, num_visible, precision, split_width

GATES = 8
"""Gates of a program."""


@triton.jit
def _turn(p_from, p_to, p_cos, p_sin, N: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    """N heads of one row, rotated."""
    C: tl.constexpr = D // 2
    o_c = tl.arange(0, BC)[None, :]
    o = tl.arange(0, BN)[:, None] * D + o_c
    m = (tl.arange(0, BN)[:, None] < N) & (o_c < C)
    b_first = tl.load(p_from + o, mask=m, other=0.0).to(tl.float32)  # [BN, BC]
    b_second = tl.load(p_from + o + C, mask=m, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_c, mask=o_c < C, other=0.0)
    b_sin = tl.load(p_sin + o_c, mask=o_c < C, other=0.0)
    tl.store(p_to + o, (b_first * b_cos - b_second * b_sin).to(p_to.dtype.element_ty), mask=m)
    tl.store(p_to + o + C, (b_second * b_cos + b_first * b_sin).to(p_to.dtype.element_ty), mask=m)


@triton.jit
def _copy(p_from, p_to, N: tl.constexpr, BN: tl.constexpr):
    o = tl.arange(0, BN)
    tl.store(p_to + o, tl.load(p_from + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def _gates(p_x, p_weight, p_out, first, N: tl.constexpr, BN: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    """BN of a row's N gates."""
    o_n = first + tl.arange(0, BN)
    b = tl.zeros([BN], tl.float32)
    for h in range(0, H, BH):
        o_h = h + tl.arange(0, BH)
        b_x = tl.load(p_x + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        m = (o_n < N)[:, None] & (o_h < H)[None, :]
        b_w = tl.load(p_weight + o_n[:, None] * H + o_h[None, :], mask=m, other=0.0).to(tl.float32)
        b += tl.sum(b_w * b_x[None, :], 1)
    element = p_out.dtype.element_ty
    # Rounded where the product by itself would be.
    b = 1.0 / (1.0 + tl.exp(-b.to(element).to(tl.float32)))
    tl.store(p_out + o_n, b.to(element), mask=o_n < N)


@triton.jit
def _store_raw(
    p_fused, p_pool, p_recent, p_table, p_lens, p_places, p_w1, p_bias, p_w2, p_b2, p_out, p_cos, p_sin, table_width, i_r,
    START: tl.constexpr, WIDE: tl.constexpr, LQ: tl.constexpr, G: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, DP: tl.constexpr, BW: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    LEN: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, IP: tl.constexpr, ROTATE: tl.constexpr,
    COMPRESSES: tl.constexpr,
):  # fmt: skip
    """Keys or values to be compressed, of all new tokens of the sequence that row i_r ends, and the blocks that they end."""
    for i in range(i_r - LQ + 1, i_r + 1):
        place = tl.load(p_places + i).to(tl.int64)
        _copy(p_fused + i * WIDE + START, p_pool + place * (G * D), G * D, BW)
    if COMPRESSES:
        # This program's own stores are read.
        tl.debug_barrier()
        i_b = i_r // LQ
        n_ctx = tl.load(p_lens + i_b)
        p_recent += i_b * table_width
        p_table += i_b * table_width
        for i_c in range(num_visible(n_ctx - LQ - 1, 0, LEN, STRIDE), num_visible(n_ctx - 1, 0, LEN, STRIDE)):
            compress_block(
                i_c, p_pool, p_recent, p_w1, p_bias, p_w2, p_b2, p_out, p_table, p_cos, p_sin,
                G, HP, D, D0, D1, D, DP, F, BF, LEN, STRIDE, PAGE, PAGE // STRIDE, IP, ROTATE,
            )  # fmt: skip


@triton.jit
def append_kernel(
    p_fused, p_x, p_gate_weight, p_cos, p_sin, p_places, p_recent_places, p_q, p_gate, p_k_slc, p_v_slc, p_k_win, p_v_win, p_k_raw, p_v_raw,
    p_k_cmp, p_v_cmp, p_recent, p_table, p_lens, p_k_w1, p_k_bias, p_k_w2, p_k_b2, p_v_w1, p_v_bias, p_v_w2, p_v_b2, p_all_cos,
    p_all_sin, table_width,
    Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BRANCHES: tl.constexpr, LQ: tl.constexpr,
    BQ: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, HP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DP: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, DVP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HIDDEN: tl.constexpr, BH: tl.constexpr, GATES: tl.constexpr, FK: tl.constexpr, BFK: tl.constexpr, FV: tl.constexpr,
    BFV: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, IP: tl.constexpr,
    COMPRESSES: tl.constexpr,
):  # fmt: skip
    """One program a row and part: queries, selected and window branch, keys and values that are compressed, then gates."""
    KEYS: tl.constexpr = Q * D
    VALUES: tl.constexpr = (Q + BRANCHES * G) * D
    WIDE: tl.constexpr = VALUES + BRANCHES * G * DV
    i_r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    p_row = p_fused + i_r * WIDE
    p_cos += i_r * (D // 2)
    p_sin += i_r * (D // 2)
    if part == 0:
        _turn(p_row, p_q + i_r * (Q * D), p_cos, p_sin, Q, BQ, D, BC)
    elif part <= 2:
        place = tl.load(tl.where(part == 1, p_places, p_recent_places) + i_r).to(tl.int64)
        branch = part - 1 if BRANCHES == 3 else 0
        # Selected, not branched over: the compiler then still knows how the addresses are aligned.
        p_k = tl.where(part == 1, p_k_slc, p_k_win)
        p_v = tl.where(part == 1, p_v_slc, p_v_win)
        _turn(p_row + KEYS + branch * (G * D), p_k + place * (G * D), p_cos, p_sin, G, BG, D, BC)
        _copy(p_row + VALUES + branch * (G * DV), p_v + place * (G * DV), G * DV, BV)
    elif part == 3:
        if i_r % LQ == LQ - 1:
            _store_raw(
                p_fused, p_k_raw, p_recent, p_table, p_lens, p_recent_places, p_k_w1, p_k_bias, p_k_w2, p_k_b2, p_k_cmp, p_all_cos, p_all_sin,
                table_width, i_r, KEYS + (BRANCHES - 1) * G * D, WIDE, LQ, G, HP, D, D0, D1, DP, BK, FK, BFK, LEN, STRIDE,
                PAGE, IP, True, COMPRESSES,
            )  # fmt: skip
    elif part == 4:
        if i_r % LQ == LQ - 1:
            _store_raw(
                p_fused, p_v_raw, p_recent, p_table, p_lens, p_recent_places, p_v_w1, p_v_bias, p_v_w2, p_v_b2, p_v_cmp, p_all_cos, p_all_sin,
                table_width, i_r, VALUES + (BRANCHES - 1) * G * DV, WIDE, LQ, G, HP, DV, V0, V1, DVP, BV, FV, BFV, LEN,
                STRIDE, PAGE, IP, False, COMPRESSES,
            )  # fmt: skip
    else:
        first = (part - 5) * GATES
        _gates(p_x + i_r * HIDDEN, p_gate_weight, p_gate + i_r * (3 * Q), first, 3 * Q, GATES, HIDDEN, BH)


def write_rows(
    fused: Tensor,
    num_queries: int,
    pools: Sequence[tuple[Tensor, Tensor]],
    angles: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
) -> Tensor:
    """Write the branches' keys and values of some rows; the rotated queries, [R, Q, D].

    Args:
        fused, pools, angles, places: as of `append_rows`.
        num_queries: Q.
    """
    (num_kv, width), value_dim = pools[3][0].shape[2:], pools[3][1].shape[3]
    q = fused.new_empty(len(fused), num_queries, width)
    branches = (fused.shape[1] - num_queries * width) // (num_kv * (width + value_dim))
    # Of what is not compiled.
    none = {"HP": 16, "V0": 16, "V1": 0, "D0": 16, "D1": 0, "DP": 16, "DVP": 16, "IP": "ieee", "PAGE": 1}
    none |= {"HIDDEN": 1, "BH": 1, "GATES": 1, "FK": 1, "BFK": 1, "FV": 1, "BFV": 1, "LEN": 1, "STRIDE": 1}
    launch_kernel(
        append_kernel, (len(fused), 5),
        fused, fused, fused, *angles, *places, q, q, *(x for pool in pools[1:] for x in pool), *pools[0], *[places[0]] * 3,
        *[fused] * 8, *angles, 0, Q=num_queries, G=num_kv, D=width, DV=value_dim, BRANCHES=branches, LQ=1,
        **_rows_of(num_queries, num_kv, width, value_dim), COMPRESSES=False, **none, num_warps=4,
    )  # fmt: skip
    return q


def _rows_of(num_queries: int, num_kv: int, width: int, value_dim: int) -> dict[str, int]:
    """Padded sizes of a row's parts."""
    return {
        "BQ": next_power_of_2(num_queries),
        "BG": next_power_of_2(num_kv),
        "BC": next_power_of_2(width // 2),
        "BK": next_power_of_2(num_kv * width),
        "BV": next_power_of_2(num_kv * value_dim),
    }


def append_rows(
    fused: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    pools: Sequence[tuple[Tensor, Tensor]],
    phis: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    angles: tuple[Tensor, Tensor],
    all_angles: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    context_lens: Tensor,
    *,
    query_len: int,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Append the new tokens of B sequences; rotated queries [R, Q, D] and gates [R, Q, 3], of B * query_len rows.

    Args:
        fused: [R, ..], queries, keys of the selected, window and compressed branch, then their values; or keys and
            values that the branches share. Contiguous, as x is.
        x: [R, hidden], what the gates are computed from; gate_weight: [3 Q, hidden].
        pools: keys [pages, page size, G, D] and values [.., Dv] of the compressed, the selected and the window branch,
            and those that are compressed.
        phis: w1, bias, w2 and b2 of keys and of values, as in `compress_step`.
        angles: fp32 cosines and sines [R, D / 2] of the rows; all_angles: of all positions.
        places: integers [R], page * page size + position in the page, for the selected branch, and for the window and what
            is compressed, whose pages have numbers of their own.
        tables: int32 [B, pages of a sequence], of the compressed tokens, and of what is compressed; of the latter, only
            what the new tokens complete is read.
        context_lens: int32 [B], the new tokens included.
        query_len: new tokens of a sequence, whose rows follow one another.
        block, stride: of the compressed tokens.
    """
    compressed, selected, window, raw = pools
    (page, num_kv, width), value_dim = raw[0].shape[1:], raw[1].shape[3]
    queries, hidden, sequences = gate_weight.shape[0] // 3, x.shape[1], tables[0].shape[0]
    q, gates = fused.new_empty(len(fused), queries, width), fused.new_empty(len(fused), queries, 3)
    (d0, d1), (v0, v1), (stages, tile) = (
        split_width(width),
        split_width(value_dim),
        tile_of(raw[0].dtype, max(width, value_dim)),
    )
    hidden_k, hidden_v = phis[0][0].shape[0], phis[1][0].shape[0]
    branches = (fused.shape[1] - queries * width) // (num_kv * (width + value_dim))
    launch_kernel(
        append_kernel, (sequences * query_len, 5 + triton.cdiv(3 * queries, GATES)),
        fused, x, gate_weight, *angles, *places, q, gates, *selected, *window, *raw, *compressed, tables[1], tables[0],
        context_lens, *phis[0], *phis[1], *all_angles, tables[0].shape[1],
        Q=queries, G=num_kv, D=width, DV=value_dim, BRANCHES=branches,
        LQ=query_len, **_rows_of(queries, num_kv, width, value_dim), COMPRESSES=True,
        HP=max(16, next_power_of_2(num_kv)), D0=d0, D1=d1, DP=max(16, next_power_of_2(width)), V0=v0, V1=v1,
        DVP=max(16, next_power_of_2(value_dim)),
        HIDDEN=hidden, BH=min(512, next_power_of_2(hidden)), GATES=GATES,
        FK=hidden_k, BFK=min(tile, max(16, next_power_of_2(hidden_k))), FV=hidden_v,
        BFV=min(tile, max(16, next_power_of_2(hidden_v))), LEN=block, STRIDE=stride, PAGE=page, IP=precision(raw[0].dtype),
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return q, gates
