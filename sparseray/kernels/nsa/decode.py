"""`nsa_decode`: one to eight query tokens per sequence against paged NSA caches.

The three branches have their own pages and block tables: compressed tokens (one every `stride` positions),
selection keys (all positions) and window keys (pages wholly before the window may be freed and their table
entries left stale). A `DecodeWorkspace` holds everything a step writes, so a step allocates nothing, reads no
length on the host and can be captured in a CUDA graph. Source: arXiv 2502.11089 section 3 and table 4.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.decode_kernels import (
    choose_kernel,
    compressed_split_kernel,
    merge_kernel,
    selected_split_kernel,
)
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.reference import check_blocks
from sparseray.kernels.nsa.tiles import next_power_of_2, precision, split_width
from sparseray.kernels.nsa.tuning import LAUNCH


def blocks_per_tile(select_block: int, stride: int) -> int:
    """Selection blocks whose compressed tokens make a tile of the compressed branch."""
    return max(1, LAUNCH["decode_compressed"]["keys"] // next_power_of_2(select_block // stride))


def blocks_in_window(window: int, select_block: int) -> int:
    """The most selection blocks that a window reaches into."""
    return (window + select_block - 2) // select_block + 1


def _splits(name: str, rows: int, most: int) -> int:
    """Parts of every row, so that all rows together make about as many programs as measured best."""
    return min(most, max(1, LAUNCH[name]["programs"] // rows))


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """Buffers of a decode step for a fixed batch, number of query tokens and longest context.

    Attributes:
        fold: fp32 [B * Lq, H, tiles, 2, G, blocks of a tile], probabilities of the compressed tokens of a block,
            weighted as eq. 9 adds them to this block and to the next one, against the tile's largest logit.
        tops: fp32 [B * Lq, H, tiles, G], that logit, base 2.
        scores: fp32 [B * Lq, H, 2, selection blocks], the two rows of `fold` added over the heads.
        ended: int32 [B * Lq, H], 0 between steps: programs whose scores are written.
        index: int32 [B * Lq, H, n], the blocks selected, ascending.
        part_max, part_sum: fp32 [B * Lq * HQ, parts]; part_out: fp32 [B * Lq * HQ, parts, Dv].
        splits: parts of the compressed branch, the selected blocks and the window.
        num_blocks: selection blocks of the longest context.
    """

    fold: Tensor
    tops: Tensor
    scores: Tensor
    ended: Tensor
    index: Tensor
    part_max: Tensor
    part_sum: Tensor
    part_out: Tensor
    splits: tuple[int, int, int]
    num_blocks: int

    @classmethod
    def create(
        cls, batch: int, query_len: int, heads: int, num_kv: int, value_dim: int, max_context: int, *,
        block: int,
        stride: int, select_block: int, num_selected: int, window: int, device: torch.device | str,
    ) -> "DecodeWorkspace":  # fmt: skip
        """Buffers for `batch` sequences of at most `max_context` tokens."""
        blocks, bj = -(-max_context // select_block), blocks_per_tile(select_block, stride)
        tiles, queries = -(-blocks // bj), batch * query_len
        most = min(tiles, LAUNCH["decode_compressed"]["splits"])
        splits = (
            _splits("decode_compressed", batch * num_kv, most),
            _splits("decode_selected", queries * num_kv, num_selected),
            _splits("decode_choose", queries * num_kv, blocks_in_window(window, select_block)),
        )
        rows, parts = queries * heads, sum(splits)

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            fold=fp32(queries, num_kv, tiles, 2, heads // num_kv, bj),
            tops=fp32(queries, num_kv, tiles, heads // num_kv),
            scores=fp32(queries, num_kv, 2, blocks),
            ended=torch.zeros(queries, num_kv, dtype=torch.int32, device=device),
            index=torch.empty(queries, num_kv, num_selected, dtype=torch.int32, device=device),
            part_max=fp32(rows, parts), part_sum=fp32(rows, parts), part_out=fp32(rows, parts, value_dim),
            splits=splits, num_blocks=blocks,
        )  # fmt: skip


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
    (batch, query_len, heads, width), (num_kv, value_dim) = q.shape, slc_cache[1].shape[2:]
    if not 1 <= query_len <= 8:
        raise ConfigError(
            f"nsa: decode takes 1 to 8 query tokens a sequence, got {query_len} (q {tuple(q.shape)})"
        )
    w, group, dvp = workspace, heads // num_kv, max(16, next_power_of_2(value_dim))
    gp, queries = next_power_of_2(group), batch * query_len
    d0, d1 = split_width(width)
    scale2 = (width**-0.5 if scale is None else scale) * LOG2E
    cmp_splits, slc_splits, win_splits = w.splits
    parts, tiles = sum(w.splits), w.tops.shape[2]
    shared: dict[str, Any] = {
        "H": num_kv, "G": group, "LQ": query_len, "SELECT": select_block, "DQ": width, "D0": d0, "D1": d1,
        "DV": value_dim, "DVP": dvp, "IP": precision(q.dtype),
    }  # fmt: skip
    shape = {"LEN": block, "STRIDE": stride, "BJ": w.fold.shape[-1]}
    part = (w.part_max, w.part_sum, w.part_out)
    compressed_split_kernel[(cmp_splits, num_kv, batch)](
        q, *cmp_cache, cmp_table, context_lens, w.fold, w.tops, *part, cmp_table.shape[1], tiles, parts, scale2,
        GP=gp, LP=max(next_power_of_2(query_len), 16 // min(gp, 16)), RP=next_power_of_2(select_block // stride),
        SPLITS=cmp_splits, PAGES=next_power_of_2(-(-tiles // cmp_splits)), PAGE=cmp_cache[0].shape[1], **shape,
        **shared, **_launch("decode_compressed"),
    )  # fmt: skip
    # Small batches are latency: many small programs; large ones would wait for the window's programs.
    choose = LAUNCH["decode_choose"]
    scored = min(choose["blocks"], max(choose["fewest"], next_power_of_2(8 * queries * num_kv)))
    chunks, bn = triton.cdiv(w.num_blocks, scored), max(16, next_power_of_2(select_block))
    num_score, per = (
        chunks * queries * num_kv,
        triton.cdiv(blocks_in_window(window, select_block), win_splits),
    )
    choose_kernel[(num_score + win_splits * queries * num_kv,)](
        q, *win_cache, win_table, context_lens, *part, w.fold, w.tops, w.scores, w.ended, w.index,
        win_table.shape[1], num_score, w.num_blocks, tiles, parts, num_selected, scale2, GP=max(16, gp),
        SPLITS=cmp_splits, SP=next_power_of_2(cmp_splits), BC=scored, BW=max(16, next_power_of_2(w.num_blocks)),
        CHUNKS=chunks, FIRST=cmp_splits + slc_splits, WINP=win_splits, PER=per, ITEMS=next_power_of_2(per),
        WIN=window, BN=bn, PAGE=win_cache[0].shape[1], INITIAL=num_initial, LOCAL=num_local, **shape, **shared,
        **_launch("decode_choose"),
    )  # fmt: skip
    per = triton.cdiv(num_selected, slc_splits)
    selected_split_kernel[(slc_splits, num_kv, queries)](
        q, *slc_cache, slc_table, context_lens, w.index, *part, slc_table.shape[1], parts, num_selected, scale2,
        GP=max(16, gp), FIRST=cmp_splits, PER=per, ITEMS=next_power_of_2(per), BN=bn, PAGE=slc_cache[0].shape[1],
        **shared, **_launch("decode_selected"),
    )  # fmt: skip
    merge_kernel[(queries * heads,)](
        *part, gates, out, parts, CMP=cmp_splits, SLC=slc_splits, PP=next_power_of_2(parts), DV=value_dim,
        DVP=dvp, num_warps=1,
    )  # fmt: skip
    return out


def _launch(name: str) -> dict[str, int]:
    return {k: LAUNCH[name][k] for k in ("num_warps", "num_stages")}
