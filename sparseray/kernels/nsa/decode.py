"""`nsa_decode`: one to eight query tokens per sequence against paged NSA caches.

The three branches have their own pages and block tables: compressed tokens (one every `stride` positions),
selection keys (all positions) and window keys (pages wholly before the window may be freed and their table
entries left stale). A `DecodeWorkspace` holds everything a step writes, so a step allocates nothing, reads no
length on the host and can be captured in a CUDA graph. Source: arXiv 2502.11089 section 3 and table 4.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.decode_kernels import (
    block_score_kernel,
    choose_kernel,
    compressed_split_kernel,
    merge_kernel,
    sparse_split_kernel,
)
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.reference import check_blocks
from sparseray.kernels.nsa.tiles import next_power_of_2, precision, split_width

LAUNCH: dict = {"dense": {"num_warps": 4, "num_stages": 3}, "sparse": {"num_warps": 4, "num_stages": 3}, "mode": 2, "scored": 32, "score": 1, "choose": 1,
  "slc": None, "win": None, "cmp": None, "merge": 1}
TARGET_PROGRAMS = 528
"""Programs that fill an H100 or H200 (132 multiprocessors) four deep."""
KEYS = 64
"""Compressed tokens of a tile."""
SCORED = 256
"""Selection blocks whose scores are added up at a time."""


def blocks_per_tile(select_block: int, stride: int) -> int:
    """Selection blocks whose compressed tokens make a tile of the compressed branch."""
    return max(1, KEYS // next_power_of_2(select_block // stride))


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """Buffers of a decode step for a fixed batch, number of query tokens and longest context.

    Attributes:
        fold: fp32 [2, B * Lq * HQ, selection blocks], probabilities of the compressed tokens of a block, weighted as
            eq. 9 adds them to this block and to the next one, against the largest logit so far.
        tops: fp32 [B * Lq * HQ, tiles], that logit, base 2.
        scores: fp32 [B * Lq, H, 2, selection blocks].
        index: int32 [B * Lq, H, n], the blocks selected.
        part_max, part_sum: fp32 [B * Lq * HQ, parts]; part_out: fp32 [B * Lq * HQ, parts, Dv].
        splits: parts of the compressed branch, the selected blocks and the window.
    """

    fold: Tensor
    tops: Tensor
    scores: Tensor
    index: Tensor
    part_max: Tensor
    part_sum: Tensor
    part_out: Tensor
    splits: tuple[int, int, int]

    @classmethod
    def create(
        cls, batch: int, query_len: int, heads: int, num_kv: int, value_dim: int, max_context: int, *,
        block: int,
        stride: int, select_block: int, num_selected: int, window: int, device: torch.device | str,
    ) -> "DecodeWorkspace":  # fmt: skip
        """Buffers for `batch` sequences of at most `max_context` tokens."""
        blocks = -(-max_context // select_block)
        tiles = -(-blocks // blocks_per_tile(select_block, stride))
        cmp_splits = min(max(1, TARGET_PROGRAMS // (batch * num_kv)), tiles, 32)
        share = max(1, TARGET_PROGRAMS // (batch * query_len * num_kv))
        slc_splits = min(num_selected, max(1, -(-share // 2)), 8)
        win_splits = min(window // select_block + 1, max(1, -(-share // 4)), 8)
        cmp_splits = LAUNCH["cmp"] or cmp_splits
        slc_splits = LAUNCH["slc"] or slc_splits
        win_splits = LAUNCH["win"] or win_splits
        rows, parts = batch * query_len * heads, cmp_splits + slc_splits + win_splits

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            fold=fp32(2, rows, blocks),
            tops=fp32(rows, tiles),
            scores=fp32(batch * query_len, num_kv, 2, blocks),
            index=torch.empty(batch * query_len, num_kv, num_selected, dtype=torch.int32, device=device),
            part_max=fp32(rows, parts),
            part_sum=fp32(rows, parts),
            part_out=fp32(rows, parts, value_dim),
            splits=(cmp_splits, slc_splits, win_splits),
        )


def nsa_decode(
    q: Tensor,
    gates: Tensor,
    cmp_cache: tuple[Tensor, Tensor],
    slc_cache: tuple[Tensor, Tensor],
    win_cache: tuple[Tensor, Tensor],
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    context_lens: Tensor,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    window: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
) -> Tensor:
    """Attend from the last Lq tokens of every sequence to its caches.

    Args:
        q: [B, Lq, HQ, D], Lq from 1 to 8, contiguous; gates: [B, Lq, HQ, 3].
        cmp_cache, slc_cache, win_cache: keys [pages, page size, H, D] and values [pages, page size, H, Dv];
        the
            keys and values of the Lq tokens, and the compressed tokens they complete, are already in them.
        cmp_table, slc_table, win_table: int32 [B, pages of a sequence], page of every page-sized piece.
        context_lens: int32 [B], tokens of every sequence, the Lq new ones included, at least Lq.
        workspace: buffers for this batch; its size bounds the context.
        out: [B, Lq, HQ, Dv], written and returned.

    Raises:
        ConfigError: sizes for which the equations are not defined, or Lq outside 1 to 8.
    """
    check_blocks(block, stride, select_block, num_selected, window, num_initial, num_local)
    batch, query_len, heads, width = q.shape
    num_kv, value_dim = slc_cache[1].shape[2], slc_cache[1].shape[3]
    if not 1 <= query_len <= 8:
        raise ConfigError(
            f"nsa: decode takes 1 to 8 query tokens a sequence, got {query_len} (q {tuple(q.shape)})"
        )
    group = heads // num_kv
    gp = max(next_power_of_2(group), 1)
    lp = max(next_power_of_2(query_len), 16 // min(gp, 16))
    d0, d1 = split_width(width)
    scale2 = (width**-0.5 if scale is None else scale) * LOG2E
    cmp_splits, slc_splits, win_splits = workspace.splits
    parts = cmp_splits + slc_splits + win_splits
    blocks = workspace.scores.shape[-1]
    tile = {
        "DQ": width,
        "D0": d0,
        "D1": d1,
        "DV": value_dim,
        "DVP": max(16, next_power_of_2(value_dim)),
        "IP": precision(q.dtype),
    }
    w = workspace
    bj, rows, n = blocks_per_tile(select_block, stride), batch * query_len * heads, num_selected
    whole = cmp_cache[0].shape[1] % (bj * select_block // stride) == 0 and next_power_of_2(select_block // stride) * stride == select_block
    whole2 = slc_cache[0].shape[1] % select_block == 0 and win_cache[0].shape[1] % select_block == 0 and select_block == max(16, next_power_of_2(select_block))
    per, win_per = -(-n // slc_splits), -(-((window + select_block - 2) // select_block + 1) // win_splits)
    compressed_split_kernel[(cmp_splits, num_kv, batch)](
        q, *cmp_cache, cmp_table, context_lens, w.fold, w.tops, w.part_max, w.part_sum, w.part_out, cmp_table.shape[1],
        blocks, w.tops.shape[1], parts, rows, scale2, H=num_kv, G=group, GP=gp,
        LQ=query_len, LP=lp, BJ=bj, RP=next_power_of_2(select_block // stride), SPLITS=cmp_splits,
        PAGE=cmp_cache[0].shape[1], LEN=block, STRIDE=stride, SELECT=select_block,
        PAGES=next_power_of_2(-(-w.tops.shape[1] // cmp_splits)), MODE=LAUNCH["mode"] if whole else 0, **tile,
        **LAUNCH["dense"],
    )  # fmt: skip
    block_score_kernel[(triton.cdiv(blocks, LAUNCH["scored"]), num_kv, batch * query_len)](
        w.part_max, w.part_sum, w.fold, w.tops, context_lens, w.scores, blocks, w.tops.shape[1], parts, rows,
        H=num_kv, G=group, GP=gp, LQ=query_len, SPLITS=cmp_splits, SP=next_power_of_2(cmp_splits), BJ=bj,
        BC=LAUNCH["scored"], SELECT=select_block, num_warps=LAUNCH["score"],
    )  # fmt: skip
    choose_kernel[(batch * query_len * num_kv,)](
        w.scores, context_lens, w.index, blocks, n, H=num_kv, LQ=query_len, BW=max(16, next_power_of_2(blocks)),
        SELECT=select_block, INITIAL=num_initial, LOCAL=num_local, num_warps=LAUNCH["choose"],
    )  # fmt: skip
    sparse_split_kernel[(slc_splits + win_splits, num_kv, batch * query_len)](
        q, *slc_cache, *win_cache, slc_table, win_table, context_lens, w.index, w.part_max, w.part_sum,
        w.part_out, slc_table.shape[1], win_table.shape[1], parts, n, scale2,
        H=num_kv, G=group, GP=max(16, gp), LQ=query_len, FIRST=cmp_splits, SLC=slc_splits,
        PER=per, WIN_PER=win_per, ITEMS=next_power_of_2(max(per, win_per)),
        BN=max(16, next_power_of_2(select_block)), SELECT=select_block, WIN=window,
        WHOLE=whole2, SLC_PAGE=slc_cache[0].shape[1], WIN_PAGE=win_cache[0].shape[1], **tile,
        **LAUNCH["sparse"],
    )  # fmt: skip
    merge_kernel[(batch * query_len * heads,)](
        w.part_max, w.part_sum, w.part_out, gates, out, parts, CMP=cmp_splits, SLC=slc_splits,
        PP=next_power_of_2(parts), DV=value_dim, DVP=max(16, next_power_of_2(value_dim)), num_warps=LAUNCH["merge"],
    )  # fmt: skip
    return out
