"""`nsa_decode`: one to eight query tokens per sequence against paged NSA caches.

The three branches have their own pages and block tables: compressed tokens (one every `stride` positions),
selection keys (all positions) and window keys (pages wholly before the window may be freed and their table
entries left stale). A `DecodeWorkspace` holds everything a step writes, so a step allocates nothing, reads no
length on the host and can be captured in a CUDA graph. Source: arXiv 2502.11089 section 3 and table 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.decode_kernels import (
    candidate_kernel,
    dense_split_kernel,
    merge_kernel,
    selected_split_kernel,
)
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.reference import check_blocks, num_compressed
from sparseray.kernels.nsa.tiles import next_power_of_2, precision, split_width
from sparseray.kernels.nsa.tuning import LAUNCH, warps_of

CANDIDATE_BLOCKS = 128
"""Selection blocks whose best are found together."""


def _splits(name: str, rows: int, tiles: int) -> int:
    """Parts into which a row of key tiles is cut, all but the last of them alike, for enough programs."""
    launch = LAUNCH[name]
    per = max(launch["least"], tiles // max(1, launch["programs"] // rows))
    return -(-tiles // max(per, -(-tiles // 64)))


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """Buffers of a decode step for a fixed batch, number of query tokens and longest context.

    Attributes:
        logits: fp32 [B * Lq * HQ, compressed tokens, padded], base-2 scaled logits of the compressed branch.
        keys, blocks: int32 [B * Lq, H, tiles, kept], the best selection blocks of every tile of them.
        part_max, part_sum: fp32 [B * Lq * HQ, parts]; part_out: fp32 [B * Lq * HQ, parts, Dv].
        splits: parts of the compressed branch, the selected blocks and the window.
    """

    logits: Tensor
    keys: Tensor
    blocks: Tensor
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
        count = max(1, num_compressed(max_context, block, stride))
        tiles = -(-max_context // (select_block * CANDIDATE_BLOCKS))
        tile = CANDIDATE_BLOCKS * (select_block // stride)
        width = -(-max(count, tiles * tile + next_power_of_2(select_block // stride)) // 16) * 16
        kept = (batch * query_len, num_kv, tiles, min(num_selected, CANDIDATE_BLOCKS))
        tokens, keys = batch * query_len, LAUNCH["decode_cmp"]["keys"]
        cmp_splits = _splits("decode_cmp", batch * num_kv, -(-count // keys))
        slc_splits = _splits("decode_slc", tokens * num_kv, num_selected)
        win_splits = _splits("decode_win", batch * num_kv, -(-(window + query_len - 1) // keys))
        rows, parts = batch * query_len * heads, cmp_splits + slc_splits + win_splits
        fp32 = {"dtype": torch.float32, "device": device}
        int32 = {"dtype": torch.int32, "device": device}
        return cls(
            logits=torch.empty(rows, width, **fp32),  # type: ignore[call-overload]
            keys=torch.empty(kept, **int32),  # type: ignore[call-overload]
            blocks=torch.empty(kept, **int32),  # type: ignore[call-overload]
            part_max=torch.empty(rows, parts, **fp32),  # type: ignore[call-overload]
            part_sum=torch.empty(rows, parts, **fp32),  # type: ignore[call-overload]
            part_out=torch.empty(rows, parts, value_dim, **fp32),  # type: ignore[call-overload]
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
    # More than 64 rows a program do not fit the registers; the next tokens' program finds the keys in the cache.
    lp = max(min(next_power_of_2(query_len), 64 // gp), 16 // min(gp, 16))
    d0, d1 = split_width(width)
    scale2 = (width**-0.5 if scale is None else scale) * LOG2E
    cmp_splits, slc_splits, win_splits = workspace.splits
    parts = cmp_splits + slc_splits + win_splits
    _, _, tiles, keep = workspace.keys.shape
    tile = {
        "DQ": width,
        "D0": d0,
        "D1": d1,
        "DV": value_dim,
        "DVP": max(16, next_power_of_2(value_dim)),
        "IP": precision(q.dtype),
    }
    w = workspace
    dense_split_kernel[(cmp_splits + win_splits, num_kv, batch * -(-query_len // lp))](
        q, *cmp_cache, *win_cache, cmp_table, win_table, context_lens, w.logits, w.part_max, w.part_sum,
        w.part_out, cmp_table.shape[1], win_table.shape[1], w.logits.shape[1], parts, scale2,
        H=num_kv, G=group, GP=gp, LQ=query_len, LP=lp, BN=LAUNCH["decode_cmp"]["keys"], CMP=cmp_splits,
        SLC=slc_splits, WINP=win_splits, CMP_PAGE=cmp_cache[0].shape[1], WIN_PAGE=win_cache[0].shape[1],
        LEN=block, STRIDE=stride, WIN=window, **tile, **warps_of("decode_cmp", width, q.element_size()),
    )  # fmt: skip
    candidate_kernel[(tiles, num_kv, batch * query_len)](
        w.logits, w.part_max, w.part_sum, context_lens, w.keys, w.blocks, w.logits.shape[1], parts,
        H=num_kv, G=group, GP=gp, LQ=query_len, BJ=CANDIDATE_BLOCKS, RP=next_power_of_2(select_block // stride),
        CMP=cmp_splits, SP=next_power_of_2(cmp_splits), KEEP=keep, LEN=block, STRIDE=stride,
        SELECT=select_block, INITIAL=num_initial, LOCAL=num_local, **warps_of("decode_score"),
    )  # fmt: skip
    selected_split_kernel[(slc_splits, num_kv, batch * query_len)](
        q, *slc_cache, slc_table, context_lens, w.keys, w.blocks, w.part_max, w.part_sum, w.part_out,
        slc_table.shape[1], tiles * keep, parts, num_selected, scale2,
        H=num_kv, G=group, GP=max(16, gp), LQ=query_len, FIRST=cmp_splits, PER=-(-num_selected // slc_splits),
        CP=next_power_of_2(tiles * keep), BJ=CANDIDATE_BLOCKS, KEEP=keep,
        BN=max(16, next_power_of_2(select_block)), SELECT=select_block, PAGE=slc_cache[0].shape[1], **tile,
        **warps_of("decode_slc", width, q.element_size()),
    )  # fmt: skip
    merge_kernel[(batch * query_len * heads,)](
        w.part_max, w.part_sum, w.part_out, gates, out, parts, CMP=cmp_splits, SLC=slc_splits,
        PP=next_power_of_2(parts), DV=value_dim, DVP=max(16, next_power_of_2(value_dim)), **warps_of("decode_merge"),
    )  # fmt: skip
    return out
